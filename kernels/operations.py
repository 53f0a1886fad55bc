"""The operations on pairs of tensors, and the facts about each that the host needs.

A name is that of the function in :mod:`fastema.kernels.steps` that builds the operation's step and,
with a leading underscore, that of its substitute in :mod:`fastema.bridges.torch_foreach`.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

__all__ = ["OPERATIONS", "Operation"]


class Operation(NamedTuple):
    """An operation, as one row of :data:`OPERATIONS`.

    Attributes
    ----------
    name : str
    moves_bits : "never", "if equal" or "always"
        Whether the operation moves raw bits: between equal dtypes, or between any dtypes.
    counts : bool
        Whether it writes the number of elements that it finds in every row.
    needs_ring : bool
        Whether its pairs have a ring and a residual.
    in_torch : bool
        Whether it has a substitute in PyTorch's own functions.
    """

    name: str
    moves_bits: Literal["never", "if equal", "always"] = "never"
    counts: bool = False
    needs_ring: bool = False
    in_torch: bool = True


OPERATIONS: Final = {
    one.name: one
    for one in (
        Operation("lerp"),
        Operation("add"),
        Operation("window", needs_ring=True),
        Operation("finite", counts=True),
        Operation("copy", moves_bits="if equal"),
        Operation("cast_back", moves_bits="if equal"),
        Operation("swap", moves_bits="if equal"),
        Operation("park", moves_bits="always"),
        Operation("unpark", moves_bits="always"),
        Operation("read_read_write", moves_bits="always", in_torch=False),
    )
}
