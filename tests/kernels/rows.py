"""Run kernels on chunk tables built by hand, with every column under the test's control."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.engine.registry import kernel
from fastema.kernels import table as abi

Array = NDArray[np.generic]


class Row(NamedTuple):
    """A table row: arrays give addresses and counts, other fields are stored unchanged."""

    dst: Array
    src: Array
    dst_step: int = 1
    src_step: int = 1
    average: int = 0
    index: int = 0
    index_step: int = 1
    index_run: int = 1 << 16
    index_jump: int = 0
    key: int = 0
    residual: Array | None = None
    ring: Array | None = None
    ring_stride: int = 0


def table_of(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Build the chunk table of some rows."""
    cells = np.zeros((len(rows), abi.COLUMNS), np.int64)
    for one, row in zip(cells, rows, strict=True):
        one[abi.COUNT] = row.dst.size
        for name, value in row._asdict().items():
            if value is not None:
                at = value if isinstance(value, int) else value.ctypes.data
                one[getattr(abi, name.upper())] = at
    return cells


def run(
    operation: str,
    formats: tuple[str, ...],
    rows: Sequence[Row],
    weights: Sequence[float] = (0.0,),
    *,
    layout: str = "flat",
    claim: int = 1,
    **settings: int,
) -> NDArray[np.float64]:
    """Run a kernel over rows and return what it finds; numbers that it does not write stay -1.

    ``settings`` are columns of the control block.
    """
    cells, numbers = table_of(rows), np.array(weights, np.float64)
    assert all(0 <= row.average < len(numbers) for row in rows)
    control, results = np.zeros(abi.CONTROLS, np.int64), np.full(len(rows), -1.0)
    control[[abi.CLAIM, abi.RESULTS]] = claim, results.ctypes.data
    for name, value in settings.items():
        control[getattr(abi, name.upper())] = value
    made = kernel(operation, formats, layout)
    made(cells.ctypes.data, len(cells), numbers.ctypes.data, control.ctypes.data)
    assert control[abi.NEXT] >= len(rows)  # no row is left for a late thread
    return results
