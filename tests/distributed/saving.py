"""Checkpoints of sharded averages, as saved and loaded on every rank."""

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

from .cases import MAKE, assert_equal, expect_error, gather_averages, train_average
from .layouts import RANKS, build, build_net, gather, is_member, meshes, set_weights, weights


def group_of(layout: str) -> dict[str, Any]:
    """Return the dcp options that select a layout's ranks."""
    count = RANKS.get(layout, dist.get_world_size())
    if count == 1:
        return {"no_dist": True}
    return {"process_group": meshes()[str(count)].get_group() if count < 4 else dist.group.WORLD}


def save(layout: str, kind: str, folder: str, how: str) -> None:
    """Save an average, and keep updating it during asynchronous saves."""
    if not is_member(layout):
        return
    model = build(layout)
    ema = train_average(kind, model)
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
        set_weights(model, weights(step))
        ema.update()
    getattr(pending, "upload_completion", pending).result()


def load(layout: str, kind: str, folder: str) -> None:
    """Check that an average loaded in a layout continues like an uninterrupted process."""
    if not is_member(layout):
        return
    model, one = build(layout), build_net()
    ema, reference = MAKE[kind](model), train_average(kind, one)
    set_weights(model, weights(3))
    dcp.load({"ema": ema}, checkpoint_id=folder, **group_of(layout))
    assert ema.num_updates == reference.num_updates == 4
    assert_equal(gather_averages(ema), gather_averages(reference))
    for step in (5, 6):
        for m, e in ((model, ema), (one, reference)):
            set_weights(m, weights(step))
            e.update()
    assert_equal(gather_averages(ema), gather_averages(reference))


def check_state_exchange(layout: str, kind: str) -> None:
    """Check that states load from a single process into a sharded average and back."""
    if not is_member(layout):
        return
    one = train_average(kind, build_net())
    ema = MAKE[kind](build(layout))
    ema.load_state_dict(one.state_dict())
    assert_equal(gather_averages(ema), gather_averages(one))
    other = MAKE[kind](build_net())
    other.load_state_dict(ema.state_dict())
    assert_equal(gather_averages(other), gather_averages(one))
    if layout != "fsdp 4":
        return
    again = MAKE[kind](build("tp 4"))
    again.load_state_dict(ema.state_dict())
    assert_equal(gather_averages(again), gather_averages(one))
    wrong = ema.state_dict()
    wrong["shadow.0.down.weight"] = torch.zeros(2, 20)
    assert "'down.weight' is [2, 20], expected [7, 20]" in expect_error(
        CheckpointError, other.load_state_dict, wrong
    )


class Trainer:
    """A stateful trainer object, as in torchtitan."""

    def __init__(self, ema: Any) -> None:
        self.ema, self.step = ema, 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.ema.load_state_dict(state["ema"])


def check_missing_average(folder: str) -> None:
    """Check that a missing average is an error, and that one can start from loaded weights."""
    model = build("fsdp 4")
    set_weights(model, weights(8))
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    fresh = build("fsdp 4")
    ema = fastema.EMA(fresh)
    with pytest.raises(CheckpointException, match="ema"):
        dcp.load({"ema": ema}, checkpoint_id=folder)
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=False))
    ema = fastema.EMA(fresh)
    for name, value in weights(8).items():
        assert torch.equal(gather(ema.shadow[name]), value), name
