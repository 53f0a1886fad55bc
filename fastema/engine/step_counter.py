"""A step counter in device memory, which captured graphs read and advance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastema.engine import cuda
from fastema.engine.cubins import Key
from fastema.engine.streams import StreamTracker
from fastema.engine.weight_table import weight_table
from fastema.errors import ArgumentError
from fastema.kernels import table as abi
from fastema.kernels.variants import CLOCK
from fastema.layout.device_context import DeviceContext, LaunchArgs

__all__ = ["StepCounter", "contexts_of", "tables_of"]


class _DeviceCounter:
    """The counter of one device, as one clock (see kernels.table) per eight averages."""

    def __init__(self, context: DeviceContext, clocks: int) -> None:
        self.context, self._clocks = context, clocks
        self.owner, self.address = context.upload(np.zeros((clocks, abi.CLOCK_CELLS), np.int64))
        self._gpu = gpu = cuda.device(context.index)
        self._function = gpu.function(Key(CLOCK, (), "", gpu.capability))
        self._values = np.array([self.address], np.int64)
        self._places = np.array([self._values.ctypes.data], np.int64)
        self._tables: list[Any] = []
        self._streams = StreamTracker(context)

    def _stream(self) -> int:
        def owners() -> list[Any]:
            return [self.owner, *(owner for owner, _ in self._tables)]

        # A graph also reads tables that are set later: keep this object, which owns them.
        return self._streams.stream(owners, lambda: [self])

    def advance(self) -> None:
        places = int(self._places.ctypes.data)
        stream = self._stream()
        self._gpu.launch(self._function, self._clocks, abi.GPU_THREADS, stream, places)

    def set(self, cells: NDArray[np.int64], tables: Sequence[NDArray[np.float64]]) -> None:
        whole = np.repeat(cells[None], self._clocks, axis=0)
        uploaded = [self.context.upload(table) for table in tables]
        for index, ((_, address), table) in enumerate(zip(uploaded, tables, strict=True)):
            clock, place = divmod(index, abi.MAX_AVERAGES)
            first = abi.TABLES + 2 * place
            whole[clock, first : first + 2] = address, len(table)
        self.context.write(self.owner, whole)
        self._tables = uploaded  # the old tables are no longer read
        self._streams.forget_streams()
        self._stream()


class StepCounter:
    """Counts updates, the same on every device that holds a part of the averages.

    Raises a DeviceError if the kernel that advances the counter is not available.
    """

    def __init__(self, contexts: Sequence[DeviceContext], num_averages: int = 1) -> None:
        clocks = -(-num_averages // abi.MAX_AVERAGES)
        self._counters = [_DeviceCounter(context, clocks) for context in contexts]
        self.args = LaunchArgs(clocks={one.context.device: one.address for one in self._counters})

    def set(
        self,
        tables: Sequence[NDArray[np.float64]],
        *,
        done: int,
        seed: int,
        start: int,
        every: int,
        window: int = 0,
        skipped: int = 0,
    ) -> None:
        """Continue after ``done`` updates with another schedule; wait for the devices.

        ``tables`` come from :func:`tables_of`; pass none for a mean of ``window`` values.
        """
        cells = np.zeros(abi.CLOCK_CELLS, np.int64)
        cells[[abi.IDLE, abi.DONE, abi.STEP, abi.SEED]] = 1, done, done, seed
        cells[[abi.START, abi.EVERY, abi.WINDOW, abi.SKIPPED]] = start, every, window, skipped
        for one in self._counters:
            one.set(cells, tables)

    def advance(self) -> None:
        """Enqueue the step to the next update on the current stream of every device."""
        for one in self._counters:
            one.advance()

    def done(self) -> int:
        """Return the number of updates so far; wait for the device."""
        return self._cell(abi.DONE)

    def skipped(self) -> int:
        """Return the number of updates skipped for a non-finite weight; wait for the device."""
        return self._cell(abi.SKIPPED)

    def _cell(self, place: int) -> int:
        one = self._counters[0]
        return int(one.context.download(one.owner).reshape(-1)[place])


def tables_of(weights: Sequence[Callable[[int], float]]) -> list[NDArray[np.float64]]:
    """Return a table per average, whose ``weight(u)`` is that of the ``u``-th effective update."""
    return [weight_table(weight) for weight in weights]


def contexts_of(devices: Mapping[str, DeviceContext | None]) -> list[DeviceContext]:
    """Return the device contexts of a counter; raise an ArgumentError for an unsuitable device."""
    for device, context in devices.items():
        if context is None:
            raise ArgumentError(
                f"capturable=True is for weights on a GPU, but some are on {device}, where "
                "nothing can be captured: leave it out"
            )
        if context.fallback_reason is not None:
            raise ArgumentError(f"capturable=True needs an NVIDIA GPU: {context.fallback_reason}")
    return [context for context in devices.values() if context is not None]
