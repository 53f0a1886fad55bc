"""Several moving averages under the names of what they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastema.errors import ArgumentError, CheckpointError
from fastema.tracking.scalar import MovingAverage

__all__ = ["MetricAverages"]


class MetricAverages(Mapping[str, MovingAverage]):
    """Moving averages by name, updated together: ``averages["loss"]`` is the average itself.

    Parameters
    ----------
    averages : mapping of str to moving average
        Each a :class:`~fastema.tracking.SimpleMovingAverage` or an
        :class:`~fastema.tracking.ExponentialMovingAverage` of its own.

    Raises
    ------
    ArgumentError
        If there is none, or anything but moving averages, or one of them twice.

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
            raise ArgumentError("averages: one moving average stands under two names")
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
        """Take in a value for each of the names given; the averages of these names now.

        ``values`` and ``weight``, one for all of them, are those of :meth:`MovingAverage.update`.

        Raises
        ------
        ArgumentError
            For a name without an average, before any value is taken in.
        BridgeError, NonFiniteError
            As in :meth:`MovingAverage.update`; the names before it have taken in theirs.
        """
        unknown = [name for name in values if name not in self._averages]
        if unknown:
            raise ArgumentError(
                f"{', '.join(map(repr, unknown))}: there is no average of that name; there are "
                + ", ".join(map(repr, self._averages))
            )
        return {name: self._averages[name].update(x, weight) for name, x in values.items()}

    @property
    def averages(self) -> dict[str, float]:
        """All averages now."""
        return {name: average.average for name, average in self._averages.items()}

    def reset(self) -> None:
        """Forget all values."""
        for average in self._averages.values():
            average.reset()

    def state_dict(self) -> dict[str, Any]:
        """The states of all averages by name."""
        return {name: average.state_dict() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another group of the same names and settings was.

        Raises
        ------
        CheckpointError
            For other names, or as in :meth:`MovingAverage.load_state_dict`. Nothing has changed.
        """
        if not isinstance(state, Mapping) or set(state) != set(self._averages):
            raise CheckpointError(
                f"not the state of averages of {', '.join(map(repr, self._averages))}: {state!r}"
            )
        for name, average in self._averages.items():
            average.new_like().load_state_dict(state[name])
        for name, average in self._averages.items():  # now that all of them fit
            average.load_state_dict(state[name])
