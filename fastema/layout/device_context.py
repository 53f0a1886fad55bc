"""Launch arguments, and the interface to a device as a framework drives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastema.errors import ArgumentError

__all__ = ["DeviceContext", "LaunchArgs", "Substitute", "check_seed"]


class LaunchArgs(NamedTuple):
    """Arguments that change at every launch; random bits depend on ``seed`` and ``step``."""

    numbers: Sequence[float] = (0.0,)  # by average_index: weights, or values in a window
    seed: int = 0
    step: int = 0
    window: int = 0  # slots of the ring
    slot: int = 0  # slot to overwrite
    turn: int = 0  # values added so far, this one included
    clocks: Mapping[str, int] = {}  # by device: address of a counter that replaces all above


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return the seed; raise an ArgumentError unless it is an integer from 0 to 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ArgumentError(f"{name}={seed!r}: expected a whole number from 0 to 2**63 - 1")
    return int(seed)


Substitute = Callable[[LaunchArgs], NDArray[np.float64] | None]
"""An operation implemented with a framework's own functions."""


class DeviceContext(Protocol):
    """A device other than the host, as one framework drives it."""

    device: str
    """Name, such as ``"cuda:0"``."""

    index: int
    """Index of the device among those visible to the process."""

    fallback_reason: str | None
    """Why the framework's functions replace the kernels on this device; None if kernels run."""

    def stream(self) -> int:
        """Return the handle of the framework's current stream."""

    def capturing(self) -> bool:
        """Return whether the current stream is being captured into a graph."""

    def upload(self, array: NDArray[Any]) -> tuple[Any, int]:
        """Copy an array to the device and wait; return the copy and its address."""

    def download(self, owner: Any) -> NDArray[Any]:
        """Return a host copy of an uploaded array, after waiting for all work so far."""

    def write(self, owner: Any, array: NDArray[Any]) -> None:
        """Overwrite an uploaded array, after waiting for all work so far."""

    def defer_reuse(self, owners: Iterable[Any]) -> bool:
        """Keep freed memory from reuse until the work on the current stream is done with it.

        Return False if that is impossible for some of it: the caller must then :meth:`wait` before
        freeing it.
        """

    def wait(self) -> None:
        """Wait for all work on the device."""

    # Any, not Pair: layout.group imports layout.spec, which imports this module.
    def substitute(self, operation: str, pairs: Sequence[Any]) -> Substitute:
        """Return a function that runs an operation with the framework's own functions.

        Raises a DTypeError if it has none for the operation.
        """
