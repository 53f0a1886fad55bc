from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastema.engine.limit import ReadReadWrite, StreamCopy

pytestmark = pytest.mark.usefixtures("eager")

SIZES = [1, 1000, 6 << 20]


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("count", [1, 2])
def test_read_read_write(nbytes: int, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    limit = ReadReadWrite(nbytes)
    target, source = limit._arrays
    assert target.nbytes == source.nbytes == 8 * max(nbytes // 24, 1)
    before = target.copy()
    limit()
    np.testing.assert_array_equal(target, before ^ source)
    limit()
    np.testing.assert_array_equal(target, before)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("count", [1, 2])
def test_stream_copy(nbytes: int, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    limit = StreamCopy(nbytes)
    targets, sources = zip(*limit._parts, strict=True)
    assert sum(part.nbytes for part in targets) == 8 * max(nbytes // 16, 1)
    for _ in range(2):
        for target in targets:
            target[:] = 1
        limit()
        for target, source in zip(targets, sources, strict=True):
            np.testing.assert_array_equal(target, source)
