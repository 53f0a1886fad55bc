"""Groups of pairs that one launch works on, and the kernel formats that operations need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastema.kernels.operations import OPERATIONS
from fastema.layout.dtypes import raw
from fastema.layout.group import Pair, kernel_format

__all__ = ["Group", "formats_of"]


class Group:
    """Pairs of one tag, device and dtype pair; each kind of device has a subclass.

    Attributes
    ----------
    tag : str
    """

    def __init__(self, tag: str, members: Sequence[Pair]) -> None:
        self.tag, self._members = tag, members

    def results(self) -> NDArray[np.float64]:
        """Return what the latest counting operation found in each row; empty before the first."""
        return np.empty(0)


def formats_of(operation: str, pair: Pair) -> tuple[str, ...]:
    """Return the formats of a pair's tensors in the kernel of an operation.

    Raises a DTypeError for integers that would be averaged.
    """
    dst, src = pair.dst.kind, pair.src.kind
    form = kernel_format(operation, OPERATIONS[operation].moves_bits, pair)
    if form is None:
        return raw(dst), raw(src)
    if operation == "swap" and "+" in form and src.code == "f32":
        return form, raw(src)
    assert src.real is not None
    if not OPERATIONS[operation].needs_ring:
        return form, src.real
    assert pair.ring is not None
    assert pair.residual is not None
    return form, src.real, str(pair.ring[0].kind.real), str(pair.residual.kind.real)
