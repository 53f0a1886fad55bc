"""The ranks of torch.distributed, or this process alone if it is not initialized."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from fastema.errors import CheckpointError

__all__ = ["RankGroup"]

Value = TypeVar("Value")


class RankGroup:
    """All ranks of the default process group."""

    def __init__(self) -> None:
        dist: Any = sys.modules.get("torch.distributed")
        ready = dist is not None and dist.is_available() and dist.is_initialized()
        self._dist = dist if ready else None
        self.rank: int = dist.get_rank() if ready else 0
        self.size: int = dist.get_world_size() if ready else 1

    def gather(self, value: Value) -> list[Value]:
        """Gather one value from every rank; all ranks must call this."""
        if self._dist is None:
            return [value]
        found: list[Any] = [None] * self.size
        self._dist.all_gather_object(found, value)
        return found

    def run_on_all_ranks(self, function: Callable[[], Value], *, on_first: bool = False) -> Value:
        """Call a function on every rank, or only on the first and return its result on all ranks.

        If it raises on one rank, every other rank raises a CheckpointError that names that rank.
        """
        result: Any = None
        error: Exception | None = None
        if not on_first or not self.rank:
            try:
                result = function()
            except Exception as raised:
                error = raised
        if self._dist is None:
            if error is not None:
                raise error
            return cast("Value", result)
        told = self.gather((None if error is None else str(error), result if on_first else None))
        problems = [f"rank {rank}: {one}" for rank, (one, _) in enumerate(told) if one is not None]
        if error is not None:
            raise error
        if problems:
            raise CheckpointError("another rank failed: " + "; ".join(problems[:3]))
        return cast("Value", told[0][1] if on_first else result)
