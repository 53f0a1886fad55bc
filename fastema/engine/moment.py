"""What changes from run to run of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastema.errors import ArgumentError

__all__ = ["Moment", "checked_seed"]


class Moment(NamedTuple):
    """What changes from run to run.

    Attributes
    ----------
    numbers : sequence of float
        Weights of the new value, by the pairs' ``which``; for a windowed mean, how many values it
        is of.
    seed, step : int
        What random bits depend on besides the place of an element.
    window, slot, turn : int
        Slots of the ring, the one to overwrite, and values put in so far, this one included.
    clocks : mapping of str to int
        By device, the address of a clock that has all of this; where there is one, the rest is not
        looked at.
    """

    numbers: Sequence[float] = (0.0,)
    seed: int = 0
    step: int = 0
    window: int = 0
    slot: int = 0
    turn: int = 0
    clocks: Mapping[str, int] = {}


def checked_seed(seed: Any) -> int:
    """A seed that fits the control block.

    Raises
    ------
    ArgumentError
        For anything but a whole number from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed={seed!r}: expected a whole number from 0 to 2**63 - 1")
    return seed
