"""The step of a run in device memory, where a captured graph finds and advances it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastema.engine import cuda
from fastema.engine.cubins import CLOCK, Key
from fastema.engine.held import Held
from fastema.engine.moment import Moment
from fastema.engine.pieces import pieces
from fastema.errors import ArgumentError
from fastema.kernels.table import (
    CLOCK_CELLS,
    DONE,
    EVERY,
    GPU_THREADS,
    IDLE,
    MOST_TOGETHER,
    PIECES,
    SEED,
    START,
    STEP,
    WINDOW,
)
from fastema.layout.home import Home

__all__ = ["Clock", "homes_of", "tables_of"]


class _Hand:
    """The clock of one device."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.owner, self.address = home.upload(np.zeros(CLOCK_CELLS, np.int64))
        gpu = cuda.device(home.index)
        function = gpu.function(Key(CLOCK, (), "", gpu.capability))
        self._values = np.array([self.address], np.int64)
        self._places = np.array([self._values.ctypes.data], np.int64)
        self._gpu, self._function = gpu, function
        self._tables: list[Any] = []
        self._held = Held(home)

    def _stream(self) -> int:
        def owners() -> list[Any]:
            return [self.owner, *(owner for owner, _ in self._tables)]

        # A graph needs whatever tables there will be.
        return self._held.stream(owners, lambda: [self])

    def advance(self) -> None:
        stream = self._stream()
        self._gpu.launch(self._function, 1, GPU_THREADS, stream, int(self._places.ctypes.data))

    def set(self, cells: NDArray[np.int64], tables: Sequence[NDArray[np.float64]]) -> None:
        uploaded = [self.home.upload(table) for table in tables]
        for which, ((_, address), table) in enumerate(zip(uploaded, tables, strict=True)):
            cells[PIECES + 2 * which], cells[PIECES + 2 * which + 1] = address, len(table)
        self.home.write(self.owner, cells)
        self._tables = uploaded  # only now nobody reads the ones before
        self._held.renew()
        self._stream()


class Clock:
    """Counts updates on every device that has a part of the averages.

    Parameters
    ----------
    homes : sequence of Home
        The devices; all count alike.

    Raises
    ------
    DeviceError
        If the kernel cannot be had.
    """

    def __init__(self, homes: Sequence[Home]) -> None:
        self._hands = [_Hand(home) for home in homes]
        self.moment = Moment(clocks={hand.home.device: hand.address for hand in self._hands})

    def set(
        self,
        tables: Sequence[NDArray[np.float64]],
        *,
        done: int,
        seed: int,
        start: int,
        every: int,
        window: int = 0,
    ) -> None:
        """Give the clock another time, and another schedule; waits for the devices.

        Parameters
        ----------
        tables : sequence of numpy.ndarray
            Of :func:`tables_of`; none for a windowed mean.
        done : int
            Updates so far.
        seed, start, every : int
            As of the average's schedule.
        window : int
            Slots of the ring, for a windowed mean.
        """
        cells = np.zeros(CLOCK_CELLS, np.int64)
        settings = {IDLE: 1, DONE: done, STEP: done, SEED: seed, START: start, EVERY: every}
        for place, value in {**settings, WINDOW: window}.items():
            cells[place] = value
        for hand in self._hands:
            hand.set(cells.copy(), tables)

    def advance(self) -> None:
        """Put the step to the next update on the current stream of every device."""
        for hand in self._hands:
            hand.advance()

    def done(self) -> int:
        """Updates so far; waits for the device."""
        hand = self._hands[0]
        return int(hand.home.download(hand.owner)[DONE])


def tables_of(weights: Sequence[Callable[[int], float]]) -> list[NDArray[np.float64]]:
    """The tables of a clock for several averages.

    Parameters
    ----------
    weights : sequence of callable
        For each average the weight of the new value at the ``u``-th update that works.

    Raises
    ------
    ArgumentError
        For more averages than a clock has room for, or weights that jump about.
    """
    if len(weights) > MOST_TOGETHER:
        raise ArgumentError(
            f"capturable=True holds up to {MOST_TOGETHER} averages, not {len(weights)}; build "
            "two objects"
        )
    return [pieces(weight) for weight in weights]


def homes_of(devices: Mapping[str, Home | None]) -> list[Home]:
    """The devices of a clock.

    Raises
    ------
    ArgumentError
        Naming a device that has none.
    """
    for device, home in devices.items():
        if home is None:
            raise ArgumentError(
                f"capturable=True is for weights on a GPU, and some are on {device}; on a CPU "
                "there is nothing to capture: leave it out"
            )
    return [home for home in devices.values() if home is not None]
