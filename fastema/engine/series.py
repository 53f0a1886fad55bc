"""Moving averages of whole series, by compiled functions."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastema.engine.cpu import Launch, run_kernel
from fastema.engine.registry import function
from fastema.engine.threads import get_num_threads
from fastema.kernels import series_table as k

__all__ = ["ewm_mean", "rolling_mean"]

_ROW: Final = 1 << 15
"""Minimum values in a row of the table, in a series that has this many. A row is read twice and
stays in the second-level cache."""

_WINDOWS: Final = 4
"""Minimum windows in a row, which begins by summing the window before each of its four lanes."""


def rolling_mean(
    x: NDArray[np.float64], history: NDArray[np.float64], size: int, *, divide: bool = True
) -> tuple[NDArray[np.float64], bool]:
    """Return the means of the last ``size`` values, and whether all of them are finite.

    There is one mean for each value of ``x``, which is float64, one-dimensional and contiguous.
    ``history`` holds the values before ``x``, at most ``size``, the latest last. With
    ``divide=False`` the sums are returned.
    """
    size = min(size, len(history) + len(x)) or 1  # a longer window is never full
    before = np.concatenate([np.zeros(size - len(history)), history])
    result = np.empty(len(x))
    # Only the first row reads the history; the others continue the values before them.
    starts = np.array([0, *range(size, len(x), max(_ROW, _WINDOWS * size))])[: len(x)]
    table = np.zeros((len(starts), k.COLUMNS), np.int64)
    table[:, k.SRC] = x.ctypes.data + 8 * starts
    table[:, k.PREV] = x.ctypes.data + 8 * (starts - size)
    table[:1, k.PREV] = before[:size].ctypes.data
    table[:, k.DST] = result.ctypes.data + 8 * starts
    table[:, k.COUNT] = np.diff(starts, append=len(x))
    table[:, k.SEEN] = np.minimum(starts + len(history), size)
    # Threads take rows in turn. Keep consecutive rows far apart: two threads that write to the same
    # new page of the results would both clear it.
    threads = get_num_threads()
    apart = -(-len(starts) // threads)
    table = table[np.argsort(np.arange(len(starts)) % max(apart, 1), kind="stable")]
    control = np.zeros(k.CONTROLS, np.int64)
    control[k.SIZE], control[k.DIVIDE] = size, divide
    scratch = np.empty((threads, k.scratch_numbers(size)))
    control[k.PLACES], control[k.ROOM] = scratch.shape[0], scratch.strides[0]
    nbytes = x.nbytes + result.nbytes
    run_kernel(Launch(function("rolling_mean"), table, control, nbytes), scratch.ctypes.data)
    return result, not table[:, k.ODD].any()


def ewm_mean(
    x: NDArray[np.float64], decay: float, start: tuple[float, float]
) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Return ``avg = decay avg + (1 - decay) x`` at every value, and the start of a next call.

    ``x`` is float64, one-dimensional and contiguous. ``start`` is the average before ``x`` and the
    residual of its rounding.
    """
    result = np.empty(len(x))
    numbers = np.array([decay, *start])
    scratch = np.empty(2 * k.STRETCH)
    function("ewm_mean")(
        x.ctypes.data, len(x), result.ctypes.data, numbers.ctypes.data, scratch.ctypes.data
    )
    return result, (float(numbers[1]), float(numbers[2]))
