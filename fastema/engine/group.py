"""Pairs that one launch works on, and which kernel an operation on them needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastema.errors import DTypeError
from fastema.kernels.operations import OPERATIONS
from fastema.kernels.table import MEASURES
from fastema.layout.dtypes import raw
from fastema.layout.group import Pair
from fastema.layout.home import LaunchArgs

__all__ = ["Group", "formats_of"]


class Group:
    """Pairs of one tag, device and dtype pair; see the classes of the devices.

    Attributes
    ----------
    tag : str
    which : int64[rows]
        The average of every row that :meth:`results` has.
    """

    which: NDArray[np.int64]

    def __init__(self, tag: str, members: Sequence[Pair]) -> None:
        self.tag, self._members = tag, members

    def prepare(self, operation: str) -> Callable[[], None]:
        """Compile and set up what an operation needs: the launch."""
        raise NotImplementedError

    def begin(self, args: LaunchArgs) -> None:
        """Take over what the next launches are to work with."""
        raise NotImplementedError

    def relocate(self, dst: Mapping[str, int] | None, src: Mapping[str, int] | None) -> None:
        """Go on with the same tensors at other addresses, by the pairs' names."""

    def results(self) -> NDArray[np.float64]:
        """``[rows, MEASURES]`` of the latest measuring operation; no rows before any."""
        return np.empty((0, MEASURES))


def formats_of(operation: str, pair: Pair) -> tuple[str, ...]:
    """Formats of the sides of a pair in an operation's kernel."""
    dst, src = pair.dst.kind, pair.src.kind
    moves_bits = OPERATIONS[operation].moves_bits
    if moves_bits == "always" or (moves_bits == "if equal" and dst == src and pair.low is None):
        return raw(dst), raw(src)
    if dst.real is None or src.real is None:
        raise DTypeError(
            f"{operation}: {dst.code} is not averaged, only copied and swapped ({pair.name})"
        )
    form = pair.form or dst.real
    if operation == "swap" and "+" in form and src.code == "f32":
        return form, raw(src)
    if moves_bits == "if equal":
        form = form.removesuffix("~")  # a copy is best rounded to nearest
    if not OPERATIONS[operation].needs_ring:
        return form, src.real
    assert pair.ring is not None
    assert pair.low is not None
    return form, src.real, str(pair.ring[0].kind.real), str(pair.low.kind.real)
