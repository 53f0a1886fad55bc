"""Moving averages of whole series, compiled."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastema.engine import cpu
from fastema.engine.registry import function
from fastema.kernels import series_table as k

__all__ = ["ewm_mean", "rolling_mean"]

_ROW: Final = 1 << 15
"""Values in a row of the table, at least where there are so many: it is gone through twice, and
stays in the second-level cache."""

_WINDOWS: Final = 4
"""Windows in a row, at least: it begins by adding up those before each of its four lanes."""


def rolling_mean(
    x: NDArray[np.float64], history: NDArray[np.float64], size: int, *, divide: bool = True
) -> tuple[NDArray[np.float64], bool]:
    """Average the last ``size`` values, at every value of a series; tell whether all are finite.

    ``x`` is float64, one-dimensional and without gaps; ``history`` are the values before it, the
    latest last, at most ``size``. With ``divide=False`` the sums are returned.
    """
    size = min(size, len(history) + len(x)) or 1  # a longer window is never full
    before = np.concatenate([np.zeros(size - len(history)), history])
    result = np.empty(len(x))
    # The first row alone meets the history; the others continue the values before them.
    starts = np.array([0, *range(size, len(x), max(_ROW, _WINDOWS * size))])[: len(x)]
    table = np.zeros((len(starts), k.COLUMNS), np.int64)
    table[:, k.SRC] = x.ctypes.data + 8 * starts
    table[:, k.PREV] = x.ctypes.data + 8 * (starts - size)
    table[:1, k.PREV] = before[:size].ctypes.data
    table[:, k.DST] = result.ctypes.data + 8 * starts
    table[:, k.COUNT] = np.diff(starts, append=len(x))
    table[:, k.SEEN] = np.minimum(starts + len(history), size)
    # Threads take rows in turn: far apart, lest two of them meet in one new page of the results,
    # which both would then clear.
    threads = cpu.get_num_threads()
    apart = -(-len(starts) // threads)
    table = table[np.argsort(np.arange(len(starts)) % max(apart, 1), kind="stable")]
    control = np.zeros(k.CONTROLS, np.int64)
    control[k.SIZE], control[k.DIVIDE] = size, divide
    scratch = np.empty((threads, k.scratch_numbers(size)))
    control[k.PLACES], control[k.ROOM] = scratch.shape[0], scratch.strides[0]
    nbytes = x.nbytes + result.nbytes
    addresses = table.ctypes.data, len(table), scratch.ctypes.data, control.ctypes.data
    cpu.launch(function("rolling_mean"), *addresses, nbytes)
    return result, not table[:, k.ODD].any()


def ewm_mean(
    x: NDArray[np.float64], decay: float, start: tuple[float, float]
) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """``avg = decay avg + (1 - decay) x`` at every value of a series, and where the next begins.

    ``x`` is float64, one-dimensional and without gaps; ``start`` is the average before, and what it
    rounded off.
    """
    result = np.empty(len(x))
    numbers = np.array([decay, *start])
    scratch = np.empty(2 * k.STRETCH)
    function("ewm_mean")(
        x.ctypes.data, len(x), result.ctypes.data, numbers.ctypes.data, scratch.ctypes.data
    )
    return result, (float(numbers[1]), float(numbers[2]))
