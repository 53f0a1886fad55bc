from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastema.engine.limit import ReadReadWrite

pytestmark = [
    pytest.mark.usefixtures("eager"),
    pytest.mark.parametrize("nbytes", [1, 1000, 6 << 20]),
    pytest.mark.parametrize("count", [1, 2]),
]


def test_read_read_write_touches_every_byte(
    nbytes: int, count: int, threads: Callable[[int], None]
) -> None:
    threads(count)
    limit = ReadReadWrite(nbytes)
    target, source = limit._arrays
    assert target.nbytes == source.nbytes == 8 * max(nbytes // 24, 1)
    before = target.copy()
    for want in (before ^ source, before):
        limit()
        np.testing.assert_array_equal(target, want)
