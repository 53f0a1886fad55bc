"""The base class of all averages of weights: update, apply, restore, save and load."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fastema.engine.program import Program
from fastema.errors import ArgumentError, StateError
from fastema.shadow.reports import describe_rule, report
from fastema.shadow.saving import SaveableAverage
from fastema.shadow.updating import Weights
from fastema.shadow.views import Drift

__all__ = ["Average", "Weights", "check_average"]


def check_average(value: Any, call: str) -> None:
    """Raise an ArgumentError unless a value is an average, such as :class:`fastema.EMA`."""
    if not isinstance(value, Average):
        raise ArgumentError(
            f"{call}: expected an average, such as fastema.EMA(model), as the first argument, got "
            f"a {type(value).__name__}"
        )


class Average(SaveableAverage[Weights]):
    """Base class of all averages of weights, kept in flat buffers and updated in one call.

    At the n-th update ``avg += w(n) * (x - avg)``, computed in float32 (in float64 if the average
    or the weights are float64). The average begins as a copy of the weights: build it after
    loading or initializing them.

    Parameters
    ----------
    weights, **options
        See :class:`EMA`.
    rules : rule or sequence of rules
        Rules of :mod:`fastema.rules`, which give ``w(n)``. Each rule has its own average; one pass
        over the weights updates all of them.
    ring : (int, dtype, bool), optional
        For a windowed mean: slots and dtype of its ring buffer, and whether the ring is in host
        memory.

    Raises
    ------
    ArgumentError
        If a parameter has an invalid value, or a pattern matches no name.
    LayoutError
        If there is nothing to average; if a tensor is expanded, read-only or partly overlaps
        another one; if ranks disagree.
    DTypeError, BridgeError
        For tensors that no kernel can average: integer weights, sparse or meta tensors.

    Examples
    --------
    >>> import numpy as np, fastema
    >>> w = np.array([1.0, 2.0])
    >>> mean = Average([w], fastema.rules.cumulative_mean())
    >>> for _ in range(3):
    ...     w += 1
    ...     mean.update()
    >>> mean.shadow["0"]
    array([3., 4.])

    Notes
    -----
    Several averages of one model are independent, but apply only one at a time: a second one
    would take the applied average for the weights.

    Calls are thread-safe: a call waits while another thread's call runs. During a call no other
    thread may re-point weights. Subnormal values cost up to a hundred times as much as normal
    ones, in any package.
    """

    @property
    def averaged_names(self) -> set[str]:
        """Names of the averaged tensors; all other tensors in :attr:`shadow` are copies."""
        return {name for name, entry in self._store.sets[0].items() if entry.averaged}

    @property
    def skipped_names(self) -> set[str]:
        """Names of the model's tensors that are neither averaged nor copied."""
        return set(self._names.skipped)

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied weights, each mapped to the name under which they are averaged."""
        return dict(self._names.aliases)

    @property
    def drifts(self) -> tuple[Drift, ...]:
        """Distance between every average and the weights, in the order of the rules."""
        program = self._drift_program
        if program is None:
            raise StateError("no drift was measured: build with drift=True, and update first")
        return tuple(self._drift(program, index) for index in range(len(self._store.sets)))

    @property
    def drift(self) -> Drift:
        """Distance between the average and the weights after the latest update, a :class:`Drift`.

        Reading it waits for the GPU. With several averages use :attr:`drifts`.

        Raises
        ------
        StateError
            If the average was built without ``drift=True``, or before the first update.
        ArgumentError
            If there are several averages.
        """
        return self.drifts[self._average_index(None)]

    def _drift(self, program: Program, index: int) -> Drift:
        distance, size, still = program.read_measures(index)
        entries = self._store.sets[index].values()
        reals = sum(e.spec.size * e.spec.kind.parts for e in entries if e.averaged)
        relative = distance / size if size else math.inf if distance else 0.0
        return Drift(distance, relative, still / max(reals, 1))

    if not TYPE_CHECKING:  # with it, type checkers would accept every attribute

        def __getattr__(self, name):
            try:
                return object.__getattribute__(self, name)
            except AttributeError as error:
                from fastema.hints import suggest_name

                raise AttributeError(f"{error}{suggest_name(name)}", name=name, obj=self) from None

    def report(self) -> str:
        """Return a description of what the average covers at this point of the run.

        For each average: the mean age of its weights in steps, its standard deviation, and the
        share of the initial weights that remains.
        """
        return report(self._kind, self._schedule, self.num_updates, self.num_skipped)

    def __repr__(self) -> str:
        averaged = [entry for entry in self._store.sets[0].values() if entry.averaged]
        elements = sum(entry.spec.size for entry in averaged)
        dtypes = "/".join(sorted({e.form.strip("~") or e.spec.dtype for e in averaged}))
        rules = "; ".join(describe_rule(rule) for rule in self._schedule.rules)
        state = ", applied" if self.applied else ""
        return (
            f"{self._kind}({elements:,} weights in {_format_count(len(averaged), 'tensor')}, "
            f"{dtypes}, {rules}, {_format_count(self.num_updates, 'update')}{state})"
        )


def _format_count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
