"""The operations on pairs of tensors, and what the host has to know of each.

A name stands for the function in :mod:`fastema.kernels.steps` that makes its step and, with an
underscore before it, for the stand-in in :mod:`fastema.bridges.torch_foreach`.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

__all__ = ["OPERATIONS", "Operation"]


class Operation(NamedTuple):
    """One row of the table.

    Attributes
    ----------
    name : str
    moves_bits : "never", "if equal" or "always"
        Whether bits are moved, whatever they stand for: between equal dtypes, or between any.
    measures : bool
        It writes measures of every row.
    needs_ring : bool
        Its pairs have a ring and a companion.
    in_torch : bool
        There is a stand-in in PyTorch's own functions.
    """

    name: str
    moves_bits: Literal["never", "if equal", "always"] = "never"
    measures: bool = False
    needs_ring: bool = False
    in_torch: bool = True


OPERATIONS: Final = {
    one.name: one
    for one in (
        Operation("lerp"),
        Operation("lerp_measured", measures=True),
        Operation("add"),
        Operation("window", needs_ring=True),
        Operation("finite", measures=True),
        Operation("copy", moves_bits="if equal"),
        Operation("cast_back", moves_bits="if equal"),
        Operation("swap", moves_bits="if equal"),
        Operation("park", moves_bits="always"),
        Operation("unpark", moves_bits="always"),
        Operation("read_read_write", moves_bits="always", in_torch=False),
    )
}
