"""What is seen of an average: its tensors by name, and how it stands to the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fastema.shadow.average import Average

__all__ = ["Drift", "Shadow"]


class Drift(NamedTuple):
    """How an average stood to the weights after an update.

    Attributes
    ----------
    distance : float
        Euclidean norm of the weights minus the average.
    relative : float
        The same, divided by the norm of the average.
    still : float
        The share of elements that the update did not change, in [0, 1].
    """

    distance: float
    relative: float
    still: float


class Shadow(Mapping[str, Any]):
    """The averaged tensors by name; the mapping cannot be changed.

    While training, each is a view of the average's memory: read it, do not write it. While the
    average is applied to the model, each is a copy.
    """

    def __init__(self, average: Average, which: int) -> None:
        self._average, self._which = average, which

    def __getitem__(self, name: str) -> Any:
        return self._average._tensor(name, self._which)

    def __iter__(self) -> Iterator[str]:
        return iter(self._average._store.sets[self._which])

    def __len__(self) -> int:
        return len(self._average._store.sets[self._which])

    def __repr__(self) -> str:
        return f"Shadow({', '.join(self)})"
