"""A timer for pytest-benchmark that shows durations measured before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Replay:
    """A clock whose pairs of readings lie recorded durations apart.

    pytest-benchmark times one test after the other, so that a machine's drift over seconds would
    favor one contestant. The contestants must alternate in one loop instead. pytest-benchmark reads
    its timer before and after the target: with this timer and a target that does nothing it reports
    the durations of that loop, with its own statistics and files.
    """

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, durations: Sequence[float]) -> None:
        """Set the durations in seconds of the next pairs of readings."""
        self._readings = iter([reading for one in durations for reading in (0.0, one)])

    def read(self) -> float:
        """Return the next reading in seconds."""
        return next(self._readings)
