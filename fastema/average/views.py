"""Read-only views of an average: its tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Shadow"]


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
