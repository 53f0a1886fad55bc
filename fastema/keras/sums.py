"""Sums of each batch, recovered from the means that a model reports while it trains.

Keras keeps a metric's sum and count since the epoch began, in float32. The difference of two such
sums has their rounding error, which grows during the epoch. This module reads what a batch adds
before it is rounded, within the compiled function. Keras's own results stay the same bit for bit.
On TensorFlow and PyTorch, where variables are written, it records what is added to them. On JAX,
the sums are zero at the beginning of each step: at the end they hold what the batch added, and then
the previous sums are added back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from operator import add
from typing import Any, Final

import keras
import numpy as np

from fastema.errors import StateError
from fastema.keras.guards import is_end_of_data

__all__ = ["BatchSums"]

_KEY: Final = "fastema: what the batch added"
"""Key of our entry in a step's logs; removed before callbacks see the logs."""

_MOST_PENDING: Final = 10_000
"""Most executions that may wait for the callback."""

_LIBRARY_STEP: Final = ("train_step", "compute_metrics", "get_metrics_result")
"""Methods that turn metrics into logs: if none is overridden, nothing else reads a metric."""


_ROOT: Final = keras.metrics.RootMeanSquaredError


def _is_mean(metric: Any) -> bool:
    return (
        isinstance(metric, keras.metrics.Mean)
        and type(metric).result in (keras.metrics.Mean.result, _ROOT.result)
        and len(metric.variables) == 2
    )


def _find_means(model: Any) -> list[Any]:
    """Return the metrics of a model that are a sum divided by a count, without duplicates."""
    found: dict[int, Any] = {}
    for one in model.metrics:
        for metric in getattr(one, "metrics", [one]):  # compile() groups its metrics in one
            if _is_mean(metric):
                found[id(metric)] = metric
    return list(found.values())


def _list_sum_variables(metrics: Sequence[Any]) -> list[Any]:
    """Return the variables of mean metrics: all totals, then all counts."""
    return [one.total for one in metrics] + [one.count for one in metrics]


def _is_library_step(model: Any) -> bool:
    return all(
        getattr(type(model), name) is getattr(keras.Model, name) and name not in vars(model)
        for name in _LIBRARY_STEP
    )


def _flatten_logs(logs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in logs.items():
        if isinstance(value, dict):
            yield from _flatten_logs(value)
        else:
            yield name, value


@contextmanager
def _replace_result(metrics: Sequence[Any], result: Callable[[Any], Any]) -> Iterator[None]:
    """Replace ``result`` of the metrics by another function within the block."""
    for one in metrics:
        vars(one)["result"] = lambda one=one: result(one)
    try:
        yield
    finally:
        for one in metrics:
            del vars(one)["result"]


class _Recorder:
    """Records the values that ``assign_add`` adds to a variable."""

    def __init__(self, variable: Any) -> None:
        self._variable = variable
        self._methods = vars(variable)
        self._add = variable.assign_add
        self._added: list[Any] = []
        self.has_additions = False  # whether anything was ever added

    def begin(self) -> None:
        """Forget earlier additions, and start recording."""
        self._added = []
        self._methods["assign_add"] = self

    def end(self) -> None:
        """Stop recording."""
        del self._methods["assign_add"]

    def __call__(self, value: Any) -> Any:
        """Record a value, and add it to the variable."""
        self.has_additions = True
        self._added.append(value.detach() if hasattr(value, "detach") else value)
        return self._add(value)

    def total(self) -> Any:
        """Return the sum of all additions in the graph being traced; None if some are unknown."""
        if not self._added:
            return None
        if not hasattr(self._added[0], "detach"):  # TensorFlow
            # Additions in a loop or a branch belong to another graph.
            here = getattr(_read(self._variable), "graph", None)
            if any(getattr(one, "graph", None) is not here for one in self._added):
                return None
            self._added = [keras.ops.cast(one, self._variable.dtype) for one in self._added]
        return reduce(add, self._added)


class BatchSums:
    """Replaces a model's train function, and records what each execution adds to its means.

    A custom step may compute with the metrics' results. On JAX it therefore gets the running sums,
    and this class takes their differences, which have the sums' rounding errors. It does the same
    for metrics that do not add to their sums by ``assign_add``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.run: Any = None  # ``params`` of the fit that installed this, shared by its callbacks
        self._backend = keras.backend.backend()
        self._starts_at_zero = _is_library_step(model)
        self._step: Callable[..., Any] | None = None
        self._function: Callable[..., Any] | None = None
        self._original_function: Callable[..., Any] | None = None
        self._metrics: list[Any] = []
        self._sources: list[tuple[str, Any]] = []  # names in the logs, and their metrics
        self.names: list[str] = []  # all names that a step logs
        self.means: list[str] = []  # names of mean metrics
        self._places: list[tuple[str, int, int, bool]] = []
        self._matched_results: dict[int, tuple[Any, Any]] = {}
        self._depth = 0
        self._unpatch = ExitStack()
        self._recorders: list[_Recorder] = []
        self._unheard: dict[int, Any] = {}  # variables that may change without a record
        self._execution_sums: Any = None
        self._parts: list[Any] = []
        self.num_executed = 0  # executions of this epoch
        self._pending: deque[tuple[int, list[Any]]] = deque()
        self._is_recording = False
        # Whether callbacks run asynchronously, and so cannot announce each execution.
        self.is_async = False

    # -- in the model ------------------------------------------------------------------------------

    @property
    def installed(self) -> bool:
        """Whether this object is the model's train function."""
        return self.model.train_function is self

    def install(self) -> None:
        """Replace the model's train function. Do nothing if it is already replaced."""
        if self.installed:
            return
        self.model.make_train_function()  # if there is none yet
        if isinstance(self.model.train_function, BatchSums):
            self.model.train_function.remove()  # left by a run that failed
        theirs = self.model.train_function
        if self._function is None or theirs is not self._original_function:
            self._metrics, self._sources, self._execution_sums = [], [], None
            self._function = self._wrap_train_function(theirs)
            self._original_function = theirs
        self.model.train_function = self
        self.begin()

    def start_recording(self) -> None:
        """Record the next execution; with asynchronous callbacks, all until ``end_recording``."""
        self._is_recording = True

    def end_recording(self) -> None:
        """Stop recording executions."""
        self._is_recording = False

    def remove(self) -> None:
        """Restore the model's own function, unless something else has replaced this one since."""
        if self.installed:
            self.model.train_function = self._original_function

    def _wrap_train_function(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """Return a train function whose logs include what the batch added."""
        model = self.model
        if self._backend == "torch":
            self._step = theirs
            return self._run_unrecorded_step if model.jit_compile else self._record_step
        self._step = model.train_step
        alone = self._backend == "jax" or model.distribute_strategy.num_replicas_in_sync == 1
        ours: dict[str, Any] = {
            "train_step": self._record_step if alone else self._run_unrecorded_step
        }
        if self._backend == "jax":
            ours = {
                "train_step": self._run_stateless_step,
                "_make_function": self._record_each(model),
            }
        before = {name: vars(model)[name] for name in ours if name in vars(model)}
        vars(model).update(ours)
        try:
            model.make_train_function(force=True)
            function: Callable[..., Any] = model.train_function
        finally:
            model.train_function = theirs
            for name in ours:
                del vars(model)[name]
            vars(model).update(before)
        return function

    def _record_each(self, model: Any) -> Callable[..., Any]:
        """Return a ``_make_function`` for JAX that records each step of an execution.

        Keras's own loop over several steps keeps only the logs of the last one.
        """
        make = model._make_function

        def make_function(step: Callable[..., Any], *args: Any, **options: Any) -> Any:
            def kept(*arguments: Any) -> Any:
                logs, state = step(*arguments)
                return self._record_execution(logs), state

            return make(kept, *args, **options)

        return make_function

    def _record_execution(self, logs: Any) -> Any:
        if isinstance(logs, dict) and _KEY in logs:
            logs = dict(logs)
            self._parts.append(logs.pop(_KEY))
        return logs

    def __call__(self, *args: Any) -> Any:
        """Run one execution of the train function, and record it if it was announced."""
        assert self._function is not None
        if not self._is_recording:
            # Another loop is training: after an error left this object behind, or in a callback.
            self.remove()
            assert self._original_function is not None
            return self._original_function(*args)
        self._is_recording = self.is_async
        self._parts = []
        try:
            if self._execution_sums is not None:
                _clear(self._execution_sums)
            found = self._function(*args)
        except BaseException as error:
            if not is_end_of_data(error):
                self.remove()
            raise
        if self._backend == "jax":
            logs, state = found
            found = self._record_execution(logs), state
        else:
            found = self._record_execution(found)
        self._pending.append((self.num_executed, self._parts))
        self.num_executed += 1
        if len(self._pending) > _MOST_PENDING:
            self.remove()  # the callback is gone: an error in another one ended its run
            self._pending.clear()
        return found

    # -- within a step -----------------------------------------------------------------------------

    def _run_unrecorded_step(self, data: Any) -> Any:
        """Run a step without recorders: compiled by PyTorch, or several replicas on TensorFlow."""
        self._update_metrics(data)
        sums = _list_sum_variables(self._metrics)
        before = [_read(one) for one in sums]
        if self._starts_at_zero:
            for one in sums:
                _clear(one)
        logs = self._run_step(data)
        added = [_read(one) for one in sums]
        if self._starts_at_zero:
            for one, old, new in zip(sums, before, added, strict=True):
                _write(one, old + new)
            logs.update((name, metric.result()) for name, metric in self._sources)
        else:
            added = [new - old for old, new in zip(before, added, strict=True)]
        logs[_KEY] = self._sum_over_execution(_stack(added))
        return logs

    def _record_step(self, data: Any) -> Any:
        """Run a step with recorders, on TensorFlow and PyTorch, where variables are written."""
        self._update_metrics(data)
        before = {i: _read(one) for i, one in self._unheard.items()}
        for note in self._recorders:
            note.begin()
        try:
            logs = self._run_step(data)
        finally:
            for note in self._recorders:
                note.end()
        added = [note.total() for note in self._recorders]
        for i, one in self._unheard.items():
            if added[i] is None:
                added[i] = _read(one) - before[i]
        if self._backend == "torch":
            self._unheard = {
                i: one for i, one in self._unheard.items() if not self._recorders[i].has_additions
            }
            logs[_KEY] = [0.0 if one is None else one for one in added]
        else:
            logs[_KEY] = self._sum_over_execution(_stack(added))
        return logs

    def _run_stateless_step(self, state: Any, data: Any) -> Any:
        """Run a step on JAX, where the sums are arguments and results."""
        self._update_metrics(data)
        *others, given = state
        places = {id(one): i for i, one in enumerate(self.model.metrics_variables)}
        where = [places[id(one)] for one in _list_sum_variables(self._metrics)]
        before, given = [given[i] for i in where], list(given)
        if self._starts_at_zero:
            for i in where:
                given[i] = keras.ops.zeros_like(given[i])
        found: list[Any] = []
        logs = self._run_step((*others, given), data, extra_outputs=found)
        *others, left = found[0]
        left = list(left)
        added = [left[i] for i in where]
        if self._starts_at_zero:
            for i, old, new in zip(where, before, added, strict=True):
                left[i] = old + new
            for name, metric in self._sources:
                own = [left[places[id(one)]] for one in metric.variables]
                logs[name] = metric.stateless_result(own)
        else:
            added = [new - old for old, new in zip(before, added, strict=True)]
        logs[_KEY] = _stack(added)
        return logs, (*others, left)

    def _update_metrics(self, data: Any) -> None:
        """Find the model's mean metrics."""
        model = self.model
        if self._metrics and self._backend == "torch":
            return  # do not walk through all layers in each step
        parts = (model._compile_metrics, model._compile_loss)
        if self._backend == "tensorflow" and any(one and not one.built for one in parts):
            # Otherwise the first step would build them, too late to begin at zero.
            model._symbolic_build(data_batch=data)
        self._metrics = _find_means(model)
        if self._backend != "jax":
            sums = _list_sum_variables(self._metrics)
            self._recorders = [_Recorder(one) for one in sums]
            self._unheard = dict(enumerate(sums))

    def _run_step(self, *args: Any, extra_outputs: list[Any] | None = None) -> dict[str, Any]:
        """Return the logs of the model's own step, and match them with metrics by results."""
        assert self._step is not None
        if self._backend == "torch" and (self._sources or self.model.jit_compile):
            logs = dict(_flatten_logs(self._step(*args)))
            if not self._sources:  # a compiled step returns other result objects
                self._match_by_name(logs)
            return logs
        # TensorFlow interleaves the traces of several replicas' steps.
        if not self._depth:
            self._matched_results = {}
            self._unpatch = ExitStack()
            self._unpatch.enter_context(_replace_result(self._metrics, self._remember_result))
        self._depth += 1
        try:
            found = self._step(*args)
        finally:
            self._depth -= 1
            if not self._depth:
                self._unpatch.close()
        if extra_outputs is not None:
            found, *others = found
            extra_outputs.extend(others)
        logs = dict(_flatten_logs(found))
        self._match_results(
            logs, {key: metric for key, (_, metric) in self._matched_results.items()}
        )
        if self._backend == "torch" and not self._sources:  # Keras before 3.13 logs plain floats
            self._match_by_name(logs)
        return logs

    def _match_by_name(self, logs: Mapping[str, Any]) -> None:
        with _replace_result(self._metrics, lambda metric: metric):
            named = self.model.get_metrics_result()
        self._match_results(logs, {id(logs[name]): named[name] for name in named if name in logs})

    def _remember_result(self, metric: Any) -> Any:
        value = type(metric).result(metric)
        self._matched_results[id(value)] = value, metric
        return value

    def _match_results(self, logs: Mapping[str, Any], metrics: Mapping[int, Any]) -> None:
        """Match logs with the metrics whose results they are."""
        self.names = list(logs)
        self._sources = [
            (name, metrics[id(value)]) for name, value in logs.items() if id(value) in metrics
        ]
        self.means = [name for name, _ in self._sources]
        place = {id(metric): i for i, metric in enumerate(self._metrics)}
        self._places = [
            (name, place[id(one)], place[id(one)] + len(place), isinstance(one, _ROOT))
            for name, one in self._sources
        ]

    def _sum_over_execution(self, added: Any) -> Any:
        """Return sums over an execution's steps; TensorFlow keeps only the last step's logs."""
        if self.model.steps_per_execution == 1:
            return added
        if self._execution_sums is None:
            self._execution_sums = keras.Variable(
                np.zeros(len(self._metrics) * 2),
                dtype=keras.backend.standardize_dtype(added.dtype),
                trainable=False,
                aggregation="sum",
                synchronization="on_read",
                name="recent",
            )
        self._execution_sums.assign_add(added)
        return _read(self._execution_sums)

    # -- for the callback --------------------------------------------------------------------------

    def begin(self) -> None:
        """Drop recorded executions, and count from 0 for a new epoch."""
        self._pending.clear()
        self.num_executed = 0

    def take(self, last: int | None) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield and drop recorded executions up to number ``last``, or all: numbers and means.

        The means, by name, cover that execution alone. Metrics with a count of 0 are left out.
        """
        while self._pending and (last is None or self._pending[0][0] <= last):
            number, parts = self._pending.popleft()
            yield number, self._read_means(parts)

    def _read_means(self, parts: list[Any]) -> dict[str, float]:
        rows = [_numbers(one) for one in parts]
        if not rows:
            raise StateError(
                f"the train function of the {type(self.model).__name__} {self.model.name!r} does "
                "not call its train_step (a make_train_function of its own, or Flax NNX): "
                "what a batch adds to its metrics is unknown"
            )
        sums = rows[0]
        if len(rows) > 1:
            sums = [math.fsum(column) for column in zip(*rows, strict=True)]
        values = {}
        for name, total, count, root in self._places:
            if sums[count]:
                mean = sums[total] / sums[count]
                if root:
                    # A difference of rounded sums may be negative.
                    mean = math.sqrt(0.0 if mean < 0.0 else mean)
                values[name] = mean
        return values


def _stack(sums: Sequence[Any]) -> Any:
    return keras.ops.stack(sums) if sums else keras.ops.zeros(0)


def _read(variable: Any) -> Any:
    """Return a copy of a variable's value."""
    value = variable.value
    return value.clone() if hasattr(value, "clone") else value.read_value()


def _clear(variable: Any) -> None:
    value = variable.value
    if hasattr(value, "zero_"):
        value.zero_()
    else:
        variable.assign(keras.ops.zeros_like(variable))


def _write(variable: Any, value: Any) -> None:
    own = variable.value
    if hasattr(own, "copy_"):
        own.copy_(value)
    else:
        variable.assign(value)


def _numbers(vector: Any) -> list[float]:
    if isinstance(vector, list):
        return [float(one) for one in vector]
    numbers: list[float] = (vector if hasattr(vector, "tolist") else vector.numpy()).tolist()
    return numbers
