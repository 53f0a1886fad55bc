"""``tf.train.ExponentialMovingAverage`` on compiled kernels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import tensorflow as tf

# No public API reports whether a function is traced for XLA, which cannot call Python.
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from fastema.binding.swap import CallableWay, Swap
from fastema.bridges.tensorflow import Unshared, unshare
from fastema.engine.blocks import BlockSteps, RestoringBlock
from fastema.engine.interrupts import defer_signals
from fastema.errors import (
    ArgumentError,
    BridgeError,
    DTypeError,
    LayoutError,
    StateError,
    format_problems,
)
from fastema.plan import Plan
from fastema.tensorflow.names import name_of, stem_of
from fastema.tensorflow.sources import DecaySource, checked_number, variable_of
from fastema.tensorflow.state import CheckpointState, Registry, VariableGroup
from fastema.tensorflow.traced import TracedUpdate

__all__ = ["ExponentialMovingAverage"]

_FLOATS: Final = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def _refuse_replicas() -> None:
    if tf.distribute.has_strategy():
        strategy = type(tf.distribute.get_strategy()).__name__
        raise BridgeError(
            f"apply() within tf.distribute.{strategy}: variables of replicas are not averaged; use "
            "tf.train.ExponentialMovingAverage there"
        )


class ExponentialMovingAverage(tf.Module):  # type: ignore[misc]
    """Moving averages of variables, with the API of ``tf.train.ExponentialMovingAverage``.

    Each :meth:`apply` computes ``average -= (1 - decay) * (average - variable)``. If
    ``num_updates`` is given, ``min(decay, (1 + num_updates) / (10 + num_updates))`` replaces
    ``decay``. The average of a variable starts at the variable's value, the average of a tensor at
    zero. Averages are non-trainable ``tf.Variable`` objects in the variable's dtype. They are
    updated in place, a whole list in one call of a compiled kernel.

    It works eagerly and inside ``tf.function``, and is a ``tf.Module``: its averages are saved and
    restored in ``tf.train.Checkpoint(model=model, ema=ema)``, or as an attribute of a model.

    Parameters
    ----------
    decay : float, scalar tensor or variable
        Weight of the old average, in [0, 1]. A variable is read at each update.
    num_updates : number, scalar tensor or variable, optional
        Number of updates so far, >= 0, such as ``optimizer.iterations``. A variable is read at
        each update. At 0 the decay is at most 0.1.
    zero_debias : bool
        Divide averages of *tensors* by the total weight of the tensors, ``1 - product of the
        decays``, as in Adam, so that the first update returns the tensor itself (default False).
        Averages of variables need no correction.
    name : str
        Suffix that turns a variable's name into its average's name.
    rounding : {"stochastic", "nearest"}
        Rounding of float16 and bfloat16 averages, which are computed in float32. With "nearest", a
        bfloat16 average with a decay of 0.999 does not move; with "stochastic", the default, its
        expected value is right.
    seed : int
        Seed for stochastic rounding, >= 0. The random bits also depend on the average's name, the
        element's index and the number of the update, which is in the checkpoint.

    Attributes
    ----------
    shadow : mapping of str to tf.Variable
        The averages, by their names in a checkpoint. Read-only.

    Raises
    ------
    ArgumentError
        For a decay or a number of updates out of range. Inside ``tf.function``, TensorFlow raises
        its own error with this message.

    Notes
    -----
    Inside ``tf.function`` an update is a ``tf.py_function``: it runs in this process only, and
    tracing for XLA raises an error. ``docs/tensorflow.md`` describes names in a checkpoint,
    functions, and the differences from TensorFlow's class.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from fastema.tensorflow import ExponentialMovingAverage
    >>> w = tf.Variable([1.0, 2.0], name="w")
    >>> ema = ExponentialMovingAverage(decay=0.75)
    >>> ema.apply([w])
    >>> _ = w.assign([5.0, 2.0])
    >>> ema.apply([w])
    >>> ema.average(w).numpy().tolist()
    [2.0, 2.0]
    >>> with ema.swapped():
    ...     w.numpy().tolist()
    [2.0, 2.0]
    >>> checkpoint = tf.train.Checkpoint(w=w, ema=ema)

    References
    ----------
    TensorFlow, https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage

    D. Kingma and J. Ba, Adam: A Method for Stochastic Optimization, 2014, section 3,
    https://arxiv.org/abs/1412.6980
    """

    def __init__(
        self,
        decay: Any,
        num_updates: Any = None,
        zero_debias: bool = False,
        name: str = "ExponentialMovingAverage",
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"name={name!r}: expected a name for averages")
        Plan({}, {}, rounding=rounding, seed=seed)  # raises now for invalid options
        self._suffix, self._rounding, self._seed = name, rounding, seed
        self._decay_source = DecaySource(
            checked_number(decay, "decay"),
            None if num_updates is None else checked_number(num_updates, "num_updates"),
        )
        self._zero_debias = bool(zero_debias)
        self._registry = Registry()
        self._state = CheckpointState()
        self._unfinished: Swap | None = None
        self.shadow: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """The suffix of the averages' names."""
        return self._suffix

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def apply(self, var_list: Any = None) -> Any:
        """Update the averages of variables, after creating averages for new variables.

        Parameters
        ----------
        var_list : iterable of variables, or dict of str to variable or tensor, optional
            ``tf.Variable`` objects or, on the TensorFlow backend, Keras variables, of any shape, in
            float16, bfloat16, float32 or float64. The keys of a dict are the names in a checkpoint.
            A tensor needs a key, which identifies it in later steps. By default, all variables
            averaged so far.

        Returns
        -------
        tf.Operation or None
            The update's operation while a function is traced; None in eager mode.

        Raises
        ------
        BridgeError
            For an object that is not a variable, for variables of a ``tf.distribute`` strategy,
            inside a strategy's scope, inside ``tf.function(jit_compile=True)``, and in graphs of
            TensorFlow 1.
        DTypeError
            For other dtypes.
        ArgumentError
            For a name that another average has.
        LayoutError
            If a tensor's shape or dtype differs from its average's, or is unknown while tracing.
        StateError
            Inside :meth:`swapped`; for a variable without a value, such as one that the traced
            function creates; without a list if there are no averages yet.
        """
        _refuse_replicas()
        self._refuse_swapped()
        eager = tf.executing_eagerly()
        if not eager:
            self._refuse_graph()
        entry, tensors = self._split_variables(var_list)
        if not eager:
            return self._trace_update(entry, tensors)
        decay = self._decay_source.read_decay()
        if entry is not None:
            self._update(self._plan(entry), entry, decay)
        for name, tensor in tensors.items():
            self._update_tensor(name, self.shadow[name], tensor, decay)
        return None

    def average(self, var: Any) -> Any:
        """Return the variable that holds an average, or None if there is no such average.

        Inside :meth:`swapped` it holds the weights.

        Parameters
        ----------
        var : variable or str
            An averaged variable, or a key that was passed to :meth:`apply`.
        """
        name = var if isinstance(var, str) else self._registry.names.get(self._reference(var))
        return None if name is None else self.shadow.get(name)

    def average_name(self, var: Any) -> str:
        """Return the name that TensorFlow shows for an average, which need not exist yet.

        An example is ``dense/kernel/ExponentialMovingAverage``. A second average of the same name
        ends in ``_1``, once it exists. ``var`` is as in :meth:`average`.
        """
        average = self.average(var)
        if average is not None:
            return name_of(average)
        return f"{var if isinstance(var, str) else name_of(variable_of(var))}/{self._suffix}"

    def variables_to_restore(self, moving_avg_variables: Any = None) -> dict[str, Any]:
        """Return variables by their averages' names, to restore averages into the variables.

        Pass the result to a ``tf.compat.v1.train.Saver``; with ``tf.train.Checkpoint`` use
        :meth:`swapped`. By default, all averaged variables are returned.
        """
        chosen = self._list_variables() if moving_avg_variables is None else moving_avg_variables
        return {self.average_name(variable): variable_of(variable) for variable in chosen}

    def swapped(self, var_list: Any = None) -> RestoringBlock[None]:
        """Return a context manager in which variables hold their averages.

        The variables' own values are restored on exit, also after an exception. Variables and
        averages swap in place, bit for bit, without a third copy. Writes to variables inside the
        block change the averages.

        Parameters
        ----------
        var_list : iterable of variables, optional
            Averaged variables to swap; all of them by default.

        Raises
        ------
        StateError
            Inside another such block or ``tf.function``, or if there are no averages. Inside the
            block, :meth:`apply` and saving or restoring this object in a checkpoint raise it.
        ArgumentError
            For a variable without an average.
        """
        return RestoringBlock(lambda: self._swap_steps(var_list))

    def _swap_steps(self, var_list: Any) -> BlockSteps[None]:
        self._refuse_swapped()
        if not tf.executing_eagerly():
            raise StateError("swapped() inside tf.function: use it around the call of the function")
        chosen = self._list_variables() if var_list is None else self._as_list(var_list)
        strangers = [v for v in chosen if self._reference(v) not in self._registry.names]
        if strangers:
            raise ArgumentError(
                "there is no average of\n"
                + format_problems(f"{name_of(variable_of(v))!r}" for v in strangers)
            )
        plan = self._plan(self._get_group(chosen))
        swap = Swap(CallableWay(plan.swap_, plan.swap_))

        def apply() -> None:
            swap.apply()
            self._state.swapped = True

        def restore() -> None:
            self._unfinished = swap  # cleared only if restore() succeeds
            swap.restore()
            self._unfinished, self._state.swapped = None, False

        return BlockSteps(apply, restore)

    def _refuse_swapped(self) -> None:
        if self._unfinished is not None:
            self._unfinished.restore()
            self._unfinished, self._state.swapped = None, False
        if self._state.swapped:
            raise StateError("the variables hold their averages: leave the swapped() block first")

    @staticmethod
    def _refuse_graph() -> None:
        if not tf.compat.v1.executing_eagerly_outside_functions():
            raise BridgeError(
                "apply() in a graph of TensorFlow 1: use tf.train.ExponentialMovingAverage there"
            )
        if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise BridgeError(
                "apply() inside tf.function(jit_compile=True): XLA cannot call the kernel; call it "
                "from a plain tf.function or eagerly (in train_step() of a Keras model: "
                "compile(jit_compile=False), or fastema.keras.EMAWeights instead)"
            )

    # -- variables, tensors and their names --------------------------------------------------------

    @staticmethod
    def _as_list(var_list: Any) -> list[Any]:
        single = isinstance(var_list, tf.Tensor | tf.Module) or variable_of(var_list) is not None
        if single or not isinstance(var_list, Iterable):
            raise BridgeError(
                f"var_list is a {type(var_list).__qualname__}: expected a list of variables, such "
                "as model.trainable_variables"
            )
        return list(var_list)

    @staticmethod
    def _reference(var: Any) -> Any:
        inner = variable_of(var)
        if inner is None:
            raise BridgeError(
                f"cannot average a {type(var).__module__}.{type(var).__qualname__}; expected a "
                "tf.Variable or a Keras variable on the TensorFlow backend (a tensor needs a name: "
                'apply({"loss": tensor}))'
            )
        return inner.ref()

    def _list_variables(self) -> list[Any]:
        if not self._registry.names:
            raise StateError("no variables are averaged yet: call apply() with a list of them")
        return [reference.deref() for reference in self._registry.names]

    def _split_variables(self, var_list: Any) -> tuple[VariableGroup | None, dict[str, Any]]:
        """Split the argument of apply() into an entry for its variables, and its tensors."""
        if var_list is None:
            return self._get_group(self._list_variables()), {}
        if not isinstance(var_list, Mapping):
            return self._get_group(self._as_list(var_list)), {}
        strange = [name for name in var_list if not isinstance(name, str) or not name]
        if strange:
            raise ArgumentError(f"{strange[0]!r} is not a name: names of averages are strings")
        tensors = {name: x for name, x in var_list.items() if isinstance(x, tf.Tensor)}
        variables = {name: x for name, x in var_list.items() if name not in tensors}
        for name, tensor in tensors.items():
            self._check_tensor(name, tensor)
        entry = self._get_group(list(variables.values()), list(variables)) if variables else None
        for name, tensor in tensors.items():
            if name not in self.shadow:
                with tf.init_scope():
                    zero = tf.zeros(tensor.shape, tensor.dtype)
                    self._create_variable(name, f"{name}/{self._suffix}", zero)
        return entry, tensors

    def _check_tensor(self, name: str, tensor: Any) -> None:
        if name in self._registry.names.values():
            raise ArgumentError(f"{name!r} is the name of a variable's average; choose another")
        if tensor.dtype not in _FLOATS:
            raise DTypeError(f"{name!r} is {tensor.dtype.name}: expected a float of 16 to 64 bits")
        average = self.shadow.get(name)
        if average is None and not tensor.shape.is_fully_defined():
            raise LayoutError(f"the shape {tensor.shape} of {name!r} is not known while tracing")
        if average is not None and not (
            tensor.dtype == average.dtype and tensor.shape.is_compatible_with(average.shape)
        ):
            raise LayoutError(
                f"{name!r} is {tensor.dtype.name} of shape {tensor.shape}, and its average "
                f"{average.dtype.name} of shape {average.shape}"
            )

    def _get_group(self, given: list[Any], names: list[str] | None = None) -> VariableGroup:
        """Return the entry of a list of variables, cached by their identities and names."""
        key = (tuple(map(id, given)), names and tuple(names))
        entry = self._registry.entries.get(key)
        if entry is None:
            variables = {self._reference(one): one for one in given}  # without duplicates
            wanted = dict(zip(map(self._reference, given), names or [], strict=False))
            if names is not None and len(wanted) < len(names):
                raise ArgumentError("var_list has one variable under several names")
            self._check_names(wanted)
            new = [ref for ref in variables if ref not in self._registry.names]
            self._check_variables([ref.deref() for ref in new])
            self._create_averages(self._choose_names([variables[ref] for ref in new], wanted))
            keys = {self._registry.names[ref]: ref.deref() for ref in variables}
            entry = VariableGroup(
                given,
                {name: self.shadow[name] for name in keys},
                keys,
                self._rounding == "stochastic" and any(v.dtype.size == 2 for v in keys.values()),
            )
            self._registry.entries[key] = entry
        return entry

    def _check_names(self, wanted: dict[Any, str]) -> None:
        for reference, name in wanted.items():
            has = self._registry.names.get(reference)
            if has is None and name in self.shadow:
                raise ArgumentError(f"{name!r} is the name of another average; choose another")
            if has not in (None, name):
                raise ArgumentError(f"{name!r} is averaged already, as {has!r}")

    @staticmethod
    def _check_variables(variables: list[Any]) -> None:
        shared = [v for v in variables if isinstance(v, tf.distribute.DistributedValues)]
        if shared:
            raise BridgeError(
                "variables of a tf.distribute strategy are not averaged:\n"
                + format_problems(f"{name_of(v)!r} is a {type(v).__name__}" for v in shared)
                + "\nUse tf.train.ExponentialMovingAverage there."
            )
        others = [v for v in variables if v.dtype not in _FLOATS]
        if others:
            raise DTypeError(
                "expected floats of 16 to 64 bits:\n"
                + format_problems(f"{name_of(v)!r} is {v.dtype.name}" for v in others)
            )
        with tf.init_scope():
            empty = [v for v in variables if not v.is_initialized()]
        if empty:
            raise StateError(
                "an average starts at the variable's value, and there is none yet:\n"
                + format_problems(f"{name_of(v)!r}" for v in empty)
                + "\nA function creates its variables when its first call has been traced: create "
                "them, or call apply(), outside of it first."
            )

    def _choose_names(self, given: list[Any], wanted: dict[Any, str]) -> dict[Any, str]:
        """Return names for new averages: the requested names, or unique names of variables."""
        stems = {self._reference(one): stem_of(one) for one in given}
        taken, names = {*self.shadow, *wanted.values()}, {}
        for reference, (stem, _) in sorted(stems.items(), key=lambda item: item[1][1]):
            name = wanted.get(reference)
            if name is None:
                count, name = 0, stem
                while name in taken:
                    count += 1
                    name = f"{stem}#{count}"
                taken.add(name)
            names[reference] = name
        return {reference: names[reference] for reference in stems}

    def _create_averages(self, names: dict[Any, str]) -> None:
        for reference, name in names.items():
            variable = reference.deref()
            with tf.init_scope(), tf.device(variable.device):
                title = f"{name_of(variable)}/{self._suffix}"
                self._create_variable(name, title, variable.read_value())
            self._registry.names[reference] = name

    def _create_variable(self, name: str, title: str, value: Any) -> None:
        """Create an average that starts at a value, or at its value in a restored checkpoint."""
        unique, count = title, 0
        while unique in self._registry.titles:
            count += 1
            unique = f"{title}_{count}"
        self._registry.titles.add(unique)
        # A scope that ends in a slash is absolute, independent of the caller's scope.
        scope, _, last = unique.rpartition("/")
        with tf.name_scope(f"{scope}/"):
            average = tf.Variable(value, trainable=False, dtype=value.dtype, name=last)
        self.shadow[name] = average  # type: ignore[index]

    # -- the update --------------------------------------------------------------------------------

    def _plan(self, entry: VariableGroup) -> Plan:
        if entry.plan is None:
            entry.plan = Plan(
                entry.averages, entry.variables, rounding=self._rounding, seed=self._seed
            )
        return entry.plan

    def _lerp_and_count(self, plan: Plan, names: Iterable[str], weight: float) -> None:
        """Update averages, with random bits of the step that checkpoints count."""
        steps = self._state.steps
        step = max(steps.get(name, 0) for name in names)
        plan.calls = step  # the plan's own count is not in checkpoints
        with defer_signals():  # keeps averages and their step counts consistent
            plan.lerp_(weight)
            steps.update(dict.fromkeys(names, step + 1))

    def _update(self, plan: Plan, entry: VariableGroup, decay: float) -> None:
        if entry.rounds_stochastically:
            self._lerp_and_count(plan, entry.averages, 1.0 - decay)
        else:
            plan.lerp_(1.0 - decay)

    def _update_tensor(self, name: str, average: Any, tensor: Any, decay: float) -> None:
        remaining = self._state.remaining.get(name, 1.0) * decay
        weight = 1.0 - decay
        if self._zero_debias:
            # While all decays were 1, the average is still zero: take the tensor itself.
            weight = min(weight / (1.0 - remaining), 1.0) if remaining < 1.0 else 1.0
        plan = Plan({name: average}, {name: tensor}, rounding=self._rounding, seed=self._seed)
        with defer_signals():
            self._lerp_and_count(plan, [name], weight)
            self._state.remaining[name] = remaining

    def _trace_update(self, entry: VariableGroup | None, tensors: dict[str, Any]) -> Any:
        """Return the update as an operation of the function being traced."""
        numbers, named = self._decay_source.get_tensors(), [self.shadow[name] for name in tensors]
        averages = [] if entry is None else list(entry.averages.values())
        variables = [] if entry is None else list(entry.variables.values())
        call = None if entry is None else TracedUpdate(entry, self._rounding, self._seed)

        def update(*values: Any) -> None:
            rest = iter(values)
            decay = self._decay_source.compute_decay([float(next(rest)) for _ in numbers])
            given = [(name, next(rest), Unshared(next(rest))) for name in tensors]
            written = [Unshared(next(rest)) for _ in averages]
            read = [next(rest) for _ in variables]
            self._refuse_swapped()
            if call is not None and entry is not None:
                with call.bind(written, read) as plan:
                    self._update(plan, entry, decay)
            for name, tensor, average in given:
                self._update_tensor(name, average, tensor, decay)

        # Read the variables in the graph, as tensors of the variables' own memory. Reading them in
        # the call is slower, since each read is a separate eager operation.
        inputs = [
            *numbers,
            *(x for pair in zip(tensors.values(), map(unshare, named), strict=True) for x in pair),
            *map(unshare, averages),
            *(tf.raw_ops.ReadVariableOp(resource=v.handle, dtype=v.dtype) for v in variables),
            # The call ignores the handles. They let TensorFlow's automatic control dependencies
            # order the call among all other uses of the variables.
            *(variable.handle for variable in (*named, *averages, *variables)),
        ]
        return tf.py_function(update, inputs, [], name=re.sub(r"[^\w.]", "_", self._suffix))
