"""What a kernel's launch needs of the framework that owns a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastema.layout.group import Pair

__all__ = ["Home", "Substitute"]

Substitute = Callable[..., NDArray[np.float64] | None]
"""``run(numbers, seed, step, window, slot, turn)``: an operation in a framework's own functions."""


class Home(Protocol):
    """A device that is not the host, as one framework sees it.

    Attributes
    ----------
    device : str
        Such as ``"cuda:0"``.
    index : int
        Of the device among those that the process sees.
    """

    device: str
    index: int

    def stream(self) -> int:
        """Handle of the stream that the framework would work on now."""

    def capturing(self) -> bool:
        """Whether that stream is being captured into a graph."""

    def upload(self, array: NDArray[Any]) -> tuple[Any, int]:
        """A copy of an array on the device: its owner, and its address. Waits for the copy."""

    def download(self, owner: Any) -> NDArray[Any]:
        """A copy of what :meth:`upload` made, after all work so far; waits for that."""

    def write(self, owner: Any, array: NDArray[Any]) -> None:
        """Overwrite what :meth:`upload` made, after all work so far."""

    def hold(self, owners: Iterable[Any]) -> bool:
        """Do not give memory to others before the work on the current stream is done with it.

        Whether that is so of all of it; if not, whoever lets go of it has to :meth:`wait`.
        """

    def wait(self) -> None:
        """Wait for all work on the device."""

    def substitute(self, operation: str, pairs: Sequence[Pair]) -> Substitute:
        """An operation without our kernels.

        Raises
        ------
        DTypeError
            If the framework has no functions for it.
        """
