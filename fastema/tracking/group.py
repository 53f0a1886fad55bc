"""A group of moving averages, each under the name of its metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastema.errors import ArgumentError, CheckpointError
from fastema.tracking.scalar import MovingAverage

__all__ = ["MetricAverages"]


class MetricAverages(Mapping[str, MovingAverage]):
    """Mapping of metric names to moving averages that are updated together.

    ``averages["loss"]`` is the moving average object of ``loss``.

    Parameters
    ----------
    averages : mapping of str to moving average
        A :class:`~fastema.tracking.SimpleMovingAverage` or
        :class:`~fastema.tracking.ExponentialMovingAverage` for each name, a separate object each.

    Raises
    ------
    ArgumentError
        If the mapping is empty, or contains something else, or one moving average twice.

    Examples
    --------
    >>> from fastema.tracking import ExponentialMovingAverage, SimpleMovingAverage
    >>> averages = MetricAverages(
    ...     {"loss": ExponentialMovingAverage(0.5), "accuracy": SimpleMovingAverage(100)}
    ... )
    >>> averages.update({"loss": 2.0, "accuracy": 0.25})
    {'loss': 2.0, 'accuracy': 0.25}
    >>> averages.update({"loss": 1.0})
    {'loss': 1.5}
    """

    def __init__(self, averages: Mapping[str, MovingAverage]) -> None:
        if not isinstance(averages, Mapping) or not averages:
            raise ArgumentError(
                f"averages={averages!r}: expected a mapping of names to moving averages, such as "
                '{"loss": SimpleMovingAverage(20)}'
            )
        for name, average in averages.items():
            if not isinstance(name, str) or not isinstance(average, MovingAverage):
                raise ArgumentError(
                    f"averages[{name!r}]={average!r}: expected a moving average under a string"
                )
        if len({id(average) for average in averages.values()}) < len(averages):
            raise ArgumentError("averages: two names share one moving average")
        self._averages = dict(averages)

    def __getitem__(self, name: str) -> MovingAverage:
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._averages!r})"

    def update(self, values: Mapping[str, Any], weight: float = 1.0) -> dict[str, float]:
        """Add one value per name and return the new averages of these names.

        Parameters
        ----------
        values : mapping of str to number
            A value for each name to update; see :meth:`MovingAverage.update`.
        weight : float
            Weight of all these values, 1 by default; see :meth:`MovingAverage.update`.

        Raises
        ------
        ArgumentError
            If a name has no average. Nothing changes.
        BridgeError, NonFiniteError
            As in :meth:`MovingAverage.update`. The values of earlier names have been added.
        """
        unknown = [name for name in values if name not in self._averages]
        if unknown:
            raise ArgumentError(
                f"{', '.join(map(repr, unknown))}: no average has this name; there are "
                + ", ".join(map(repr, self._averages))
            )
        return {name: self._averages[name].update(x, weight) for name, x in values.items()}

    @property
    def averages(self) -> dict[str, float]:
        """The current averages by name."""
        return {name: average.average for name, average in self._averages.items()}

    def reset(self) -> None:
        """Reset all averages to their initial state."""
        for average in self._averages.values():
            average.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all averages by name."""
        return {name: average.state_dict() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a group with the same names and settings.

        Raises
        ------
        CheckpointError
            If the names differ, or as in :meth:`MovingAverage.load_state_dict`. Nothing changes.
        """
        if not isinstance(state, Mapping) or set(state) != set(self._averages):
            raise CheckpointError(
                f"not the state of averages of {', '.join(map(repr, self._averages))}: {state!r}"
            )
        for name, average in self._averages.items():
            average.new_like().load_state_dict(state[name])
        for name, average in self._averages.items():  # after all states were validated
            average.load_state_dict(state[name])
