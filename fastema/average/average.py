"""The base class of all averages of weights: update, apply, restore, save and load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from fastema.average.drift import Drift, measure
from fastema.average.reports import describe_rule, report
from fastema.average.saving import SaveableAverage
from fastema.average.updating import Weights
from fastema.errors import ArgumentError

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

    def drift(self, model: Any = None, *, which: int | None = None) -> Drift:
        """Return the distance between an average and the weights, a :class:`Drift`.

        Reads both once, in float32 (float64 if either is), a few million elements at a time, and
        adds up squares in float64. Waits for the GPU, and copies both to the host.

        Parameters
        ----------
        model : optional
            The weights, by default those that the average follows; for JAX, the arrays passed
            last.
        which : int, optional
            With several averages, the index of one.

        Raises
        ------
        StateError
            While the average is applied: the model does not hold the weights.
        ArgumentError
            If ``which`` is missing or out of range; if the weights are divided among ranks.
        LayoutError
            If names or shapes of the model's tensors have changed.
        DTypeError, BridgeError
            If ``model`` has tensors that cannot be compared: integers, meta tensors.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> w = np.array([3.0, 4.0])
        >>> ema = fastema.EMA([w], decay=0.5)
        >>> w *= 2
        >>> ema.drift()
        Drift(distance=5.0, relative=1.0)
        """
        index = self._average_index(which)
        with self._lock:
            self._refuse_applied("drift")
            if self._ranks is not None:
                self._refuse_parts()
            return self._measure_drift(model, index)

    def _refuse_parts(self) -> NoReturn:
        raise ArgumentError(
            "drift(): these weights are divided among ranks, and one rank has only its part; "
            "measure a model that is gathered on one rank"
        )

    def _measure_drift(self, model: Any, index: int) -> Drift:
        with self._current(model) as program:
            binding = self._binding
            if self._is_synced():
                self._sync_by(program)
            names = [name for name, e in self._store.sets[index].items() if e.averaged]
            return measure([binding.pair(name, index) for name in names])

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
