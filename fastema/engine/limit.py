"""Memory bandwidth, the limit of an update, measured by kernels that only move bytes.

The fair limit of an in-place update is the better of the two yardsticks. ``torch.Tensor.copy_``
is not one: it reads the destination's cache lines before it writes them, without counting that.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from fastema.engine.program import Program
from fastema.engine.threads import get_num_threads
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

__all__ = ["ReadReadWrite", "StreamCopy"]


def _spec(words: NDArray[np.int64]) -> TensorSpec:
    return TensorSpec(words.ctypes.data, words.shape, (1,), "i64", "cpu", owner=words)


class ReadReadWrite:
    """Reads two arrays and writes one (``a ^= b``): ``nbytes`` in all per call, on all threads."""

    def __init__(self, nbytes: int) -> None:
        generator = np.random.default_rng(0)
        words = max(nbytes // 24, 1)
        self._arrays = [generator.integers(1, 2**62, words) for _ in range(2)]
        dst, src = (_spec(array) for array in self._arrays)
        self._program = Program({"all": [Pair("limit", dst, src)]})
        self._program.prepare({"all": "read_read_write"})

    def __call__(self) -> None:
        """Move the bytes once."""
        self._program.run({"all": "read_read_write"})


class StreamCopy:
    """Copies an array with ``numpy.copyto``: ``nbytes`` read plus written, on all threads.

    For large arrays the C library bypasses the cache, which saves reading the destination.
    """

    def __init__(self, nbytes: int) -> None:
        words = max(nbytes // 16, 1)
        source = np.random.default_rng(0).integers(1, 2**62, words)
        target = np.ones_like(source)
        self._threads = get_num_threads()
        pieces = 4 * self._threads
        parts = zip(np.array_split(target, pieces), np.array_split(source, pieces), strict=True)
        self._parts = list(parts)

    def __call__(self) -> None:
        """Move the bytes once."""
        left = iter(self._parts)  # shared by the threads, like a kernel's row cursor

        def copy_parts(*_: int) -> None:
            for target, source in left:
                np.copyto(target, source)

        helpers = [threading.Thread(target=copy_parts) for _ in range(self._threads - 1)]
        for helper in helpers:
            helper.start()
        copy_parts()
        for helper in helpers:
            helper.join()
