"""Checkpoints of averages, on every rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import fastema
from fastema.errors import CheckpointError

from .cases import MAKE, assert_equal, averages, raised, trained
from .layouts import RANKS, divided, full, holds, meshes, net, put, weights


def group_of(layout: str) -> dict[str, Any]:
    """What dcp needs to know of a layout's ranks."""
    count = RANKS.get(layout, dist.get_world_size())
    if count == 1:
        return {"no_dist": True}
    return {"process_group": meshes()[str(count)].get_group() if count < 4 else dist.group.WORLD}


def save(layout: str, kind: str, folder: str, how: str) -> None:
    """Save the average of some steps, and go on with the updates while it is written."""
    if not holds(layout):
        return
    model = divided(layout)
    ema = trained(kind, model)
    if how == "plain":
        dcp.save({"ema": ema}, checkpoint_id=folder, **group_of(layout))
        return
    kinds = AsyncCheckpointerType
    options: dict[str, Any] = {
        "thread": {"async_checkpointer_type": kinds.THREAD},
        "process": {"async_checkpointer_type": kinds.PROCESS},
        "staged": {
            "async_stager": DefaultStager(
                StagingOptions(
                    use_pinned_memory=False,
                    use_shared_memory=False,
                    use_async_staging=True,
                    use_non_blocking_copy=False,
                )
            )
        },
    }[how]
    pending = dcp.async_save({"ema": ema}, checkpoint_id=folder, **options)
    for step in range(20, 40):
        put(model, weights(step))
        ema.update()
    getattr(pending, "upload_completion", pending).result()


def load(layout: str, kind: str, folder: str) -> None:
    """Load it in a layout, and go on as one process that was never interrupted."""
    if not holds(layout):
        return
    model, one = divided(layout), net()
    ema, reference = MAKE[kind](model), trained(kind, one)
    put(model, weights(3))
    dcp.load({"ema": ema}, checkpoint_id=folder, **group_of(layout))
    assert ema.num_updates == reference.num_updates == 4
    assert_equal(averages(ema), averages(reference))
    for step in (5, 6):
        for m, e in ((model, ema), (one, reference)):
            put(m, weights(step))
            e.update()
    assert_equal(averages(ema), averages(reference))


def whole_and_divided(layout: str, kind: str) -> None:
    """A state of one process goes into a divided average, and the other way."""
    if not holds(layout):
        return
    one = trained(kind, net())
    ema = MAKE[kind](divided(layout))
    ema.load_state_dict(one.state_dict())
    assert_equal(averages(ema), averages(one))
    other = MAKE[kind](net())
    other.load_state_dict(ema.state_dict())
    assert_equal(averages(other), averages(one))
    if layout != "fsdp 4":
        return
    again = MAKE[kind](divided("tp 4"))
    again.load_state_dict(ema.state_dict())
    assert_equal(averages(again), averages(one))
    wrong = ema.state_dict()
    wrong["shadow"][0]["down.weight"] = torch.zeros(2, 20)
    assert "'down.weight' is [2, 20], expected [7, 20]" in raised(
        CheckpointError, other.load_state_dict, wrong
    )


class Trainer:
    """A trainer's own object with a state, as in torchtitan."""

    def __init__(self, ema: Any) -> None:
        self.ema, self.step = ema, 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.ema.load_state_dict(state["ema"])


def without_an_average(folder: str) -> None:
    """A checkpoint that has none is an error, or begins with the loaded weights on purpose."""
    model = divided("fsdp 4")
    put(model, weights(8))
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    fresh = divided("fsdp 4")
    ema = fastema.EMA(fresh)
    with pytest.raises(CheckpointException, match="ema"):
        dcp.load({"ema": ema}, checkpoint_id=folder)
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=False))
    ema = fastema.EMA(fresh)
    for name, value in weights(8).items():
        assert torch.equal(full(ema.shadow[name]), value), name
