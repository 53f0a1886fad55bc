"""Agreement between the ranks that hold parts of the same tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from fastema.errors import LayoutError, format_problems

__all__ = ["MeshRanks"]

_SHOWN = 8
"""Maximum number of differences that an error lists."""


class MeshRanks:
    """The ranks of all meshes that this rank's tensors are sharded over.

    A mesh whose ranks all belong to the largest mesh is left out: the mesh of all data-parallel
    ranks includes those of the experts. Collectives run over the default group if the meshes cover
    all ranks, otherwise along each dimension of each mesh in turn.
    """

    def __init__(self, meshes: Iterable[Any]) -> None:
        found = list({id(one): one for one in meshes}.values())
        self._device = torch.device(found[0].device_type)
        members = {rank for mesh in found for rank in mesh.mesh.flatten().tolist()}
        self._groups: list[Any] = [dist.group.WORLD]
        if len(members) < dist.get_world_size():
            largest = max(found, key=lambda mesh: mesh.size())
            meshes_asked = [largest, *(m for m in found if not _holds(largest, m))]
            self._groups = [
                mesh.get_group(dim) for mesh in meshes_asked for dim in range(mesh.ndim)
            ]

    @classmethod
    def of_world(cls) -> MeshRanks | None:
        """Return all ranks of the default group; None without a group or with one rank only."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        made = cls.__new__(cls)
        made._device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
        made._groups = [dist.group.WORLD]
        return made

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank, by an all-reduce of one number."""
        value = torch.tensor([flag], dtype=torch.int32, device=self._device)
        for group in self._groups:
            dist.all_reduce(value, dist.ReduceOp.MAX, group)
        return bool(value.item())

    def compare(self, facts: Mapping[str, str]) -> None:
        """Raise a LayoutError on every rank unless all ranks pass equal facts.

        ``facts`` maps names to values; one all-gather compares a digest of them. The error lists
        the ranks that differ, the facts, and the expected values.
        """
        text = json.dumps(facts, sort_keys=True).encode()
        digest = torch.tensor(
            list(hashlib.sha256(text).digest()), dtype=torch.uint8, device=self._device
        )
        problems: list[str] = []
        differs = False
        for group in self._groups:
            found = [torch.empty_like(digest) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, digest, group)
            if not all(torch.equal(one, found[0]) for one in found):
                differs = True
                problems += _differences(facts, group)
        if len(self._groups) > 1:  # other ranks may have found a difference
            differs = self.any(differs)
        if differs:
            problems = problems or ["ranks in another part of the mesh differ; see their errors"]
            raise LayoutError(
                "the ranks do not have the same average:\n"
                + format_problems(problems, _SHOWN)
                + "\nBuild it on all ranks from the same model, with the same options, and call "
                "update() on all of them."
            )


def _holds(mesh: Any, other: Any) -> bool:
    return set(other.mesh.flatten().tolist()) <= set(mesh.mesh.flatten().tolist())


def _differences(facts: Mapping[str, str], group: Any) -> list[str]:
    """Return a line for every fact that differs from the group's first rank."""
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, dict(facts), group)
    ranks = dist.get_process_group_ranks(group)
    first = every[0]
    return [
        f"rank {rank}: {key} is {one.get(key, 'missing')}, expected {first.get(key, 'none')} as on "
        f"rank {ranks[0]}"
        for rank, one in zip(ranks, every, strict=True)
        for key in sorted({*first, *one})
        if one.get(key) != first.get(key)
    ]
