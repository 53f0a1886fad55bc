"""Read-only views of an average: its tensors by name, and its distance to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Drift", "Shadow"]


class Drift(NamedTuple):
    """Distance between an average and the weights after an update.

    Attributes
    ----------
    distance : float
        Euclidean norm of ``weights - average``, over all averaged tensors.
    relative : float
        ``distance`` divided by the norm of the average; infinite if only that norm is 0.
    still : float
        Share of the elements that the update did not change, in [0, 1].
    """

    distance: float
    relative: float
    still: float


class Shadow(Mapping[str, Any]):
    """Read-only mapping of names to averaged tensors.

    A tensor is a view of the average's memory: read it, do not write it. While the average is
    applied to the model, it is a copy.
    """

    def __init__(self, names: Sequence[str], tensor: Callable[[str], Any]) -> None:
        self._names, self._tensor = names, tensor

    def __getitem__(self, name: str) -> Any:
        return self._tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Shadow({', '.join(self)})"
