"""The base of all averages of weights: update, apply, restore, save and load."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastema.engine.program import Program
from fastema.errors import StateError
from fastema.shadow.reports import named, report
from fastema.shadow.saving import Saveable
from fastema.shadow.updating import Weights
from fastema.shadow.views import Drift

__all__ = ["Average", "Weights"]


class Average(Saveable[Weights]):
    """Averages of weights in flat buffers, updated in one call: what all kinds have in common.

    At the n-th update ``avg += w(n) * (x - avg)``, computed in float32 (float64 where either side
    is). An average begins as a copy of the weights, so build it when the weights are as training
    starts from them.

    Parameters
    ----------
    weights, **options
        See :class:`EMA`.
    rules : rule or sequence of rules
        Of :mod:`fastema.rules`; several are followed in one pass over the weights.
    ring : (int, dtype, bool), optional
        Slots and dtype of the ring that a windowed mean needs, and whether it is on the host.

    Raises
    ------
    ArgumentError
        For a parameter without a valid value, and a pattern that matches no name.
    LayoutError
        If there is nothing to average, or a tensor is expanded, read-only or partly shares memory
        with another; if ranks do not agree.
    DTypeError, BridgeError
        For tensors that no kernel can average: integers as weights, sparse, on the meta device.

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
    Two objects that average one model are independent of each other, but only one can be applied at
    a time: the second would average, or keep, the first one's average.

    A call on other threads while one runs waits; weights must not be re-pointed by another thread
    during a call. Denormal values cost up to a hundred times as much as normal ones, in any
    package.
    """

    @property
    def averaged_names(self) -> set[str]:
        """Names of the tensors that are averaged; the others are copied."""
        return {name for name, entry in self._store.sets[0].items() if entry.averaged}

    @property
    def skipped_names(self) -> set[str]:
        """Names of the tensors that the average leaves out."""
        return set(self._names.skipped)

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied weights, to the name that their average has."""
        return dict(self._names.aliases)

    @property
    def drifts(self) -> tuple[Drift, ...]:
        """:attr:`drift` of every average."""
        program = self._measured
        if program is None:
            raise StateError("no drift was measured: build with drift=True, and update first")
        return tuple(self._drift(program, index) for index in range(len(self._store.sets)))

    @property
    def drift(self) -> Drift:
        """Distance between average and weights after the latest update.

        Raises
        ------
        StateError
            If it was not built with ``drift=True``, or before the first update.
        """
        return self.drifts[self._average_index(None)]

    def _drift(self, program: Program, index: int) -> Drift:
        distance, size, still = program.measured(index)
        entries = self._store.sets[index].values()
        reals = sum(e.spec.size * e.spec.kind.parts for e in entries if e.averaged)
        relative = distance / size if size else math.inf if distance else 0.0
        return Drift(distance, relative, still / max(reals, 1))

    if not TYPE_CHECKING:  # which would let every name pass

        def __getattr__(self, name):
            try:
                return object.__getattribute__(self, name)
            except AttributeError as error:
                from fastema.shadow.hints import hint

                raise AttributeError(f"{error}{hint(name)}", name=name, obj=self) from None

    def report(self) -> str:
        """In words, what the average averages over at this point of the run."""
        return report(self._kind, self._schedule, self.num_updates, self.num_skipped)

    def __repr__(self) -> str:
        averaged = [entry for entry in self._store.sets[0].values() if entry.averaged]
        elements = sum(entry.spec.size for entry in averaged)
        dtypes = "/".join(sorted({e.form.strip("~") or e.spec.dtype for e in averaged}))
        rules = "; ".join(named(rule) for rule in self._schedule.rules)
        state = ", applied" if self.applied else ""
        return (
            f"{self._kind}({elements:,} weights in {_counted(len(averaged), 'tensor')}, "
            f"{dtypes}, {rules}, {_counted(self.num_updates, 'update')}{state})"
        )


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
