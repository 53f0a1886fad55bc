"""Arguments of a launch, and the interface of a framework that owns a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastema.errors import ArgumentError

__all__ = ["DeviceContext", "LaunchArgs", "Substitute", "checked_seed"]


class LaunchArgs(NamedTuple):
    """Arguments that change from run to run; random bits depend on ``seed`` and ``step``."""

    numbers: Sequence[float] = (0.0,)  # weights by the pairs' `which`; values in a windowed mean
    seed: int = 0
    step: int = 0
    window: int = 0  # slots of the ring
    slot: int = 0  # the one to overwrite
    turn: int = 0  # values put in so far, this one included
    clocks: Mapping[str, int] = {}  # by device, the address of a counter that replaces the rest


def checked_seed(seed: Any) -> int:
    """A seed that fits the control block: a whole number from 0 to 2**63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed={seed!r}: expected a whole number from 0 to 2**63 - 1")
    return seed


Substitute = Callable[[LaunchArgs], NDArray[np.float64] | None]
"""An operation in a framework's own functions."""


class DeviceContext(Protocol):
    """A device that is not the host, as one framework sees it."""

    device: str
    """Such as ``"cuda:0"``."""

    index: int
    """Number of the device among those that the process sees."""

    without_kernels: str | None
    """A sentence where no kernels of ours run there, and the framework's functions do the work."""

    def stream(self) -> int:
        """Handle of the stream that the framework would work on now."""

    def capturing(self) -> bool:
        """Return whether that stream is being captured into a graph."""

    def upload(self, array: NDArray[Any]) -> tuple[Any, int]:
        """A copy of an array on the device: its owner, and its address. Waits for the copy."""

    def download(self, owner: Any) -> NDArray[Any]:
        """A copy of what :meth:`upload` made, after all work so far; waits for that."""

    def write(self, owner: Any, array: NDArray[Any]) -> None:
        """Overwrite what :meth:`upload` made, after all work so far."""

    def hold(self, owners: Iterable[Any]) -> bool:
        """Do not give memory to others before the work on the current stream is done with it.

        False if some of it cannot be held: the caller must then :meth:`wait` before freeing it.
        """

    def wait(self) -> None:
        """Wait for all work on the device."""

    # Pairs of layout.group, which knows tensors, which know this: Any, so that it is no circle.
    def substitute(self, operation: str, pairs: Sequence[Any]) -> Substitute:
        """An operation without our kernels; a DTypeError if the framework has no functions."""
