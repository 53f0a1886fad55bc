"""ModelEMA of Ultralytics: its numbers, its checkpoints, and where ours differs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from fastema.compat.ultralytics import ModelEMA, export, load
from fastema.errors import CheckpointError

from ..support.peers import tensors
from .network import Network, bits, numbers, refused, through_a_file, torch, trained

nn = torch.nn

pytestmark = pytest.mark.torch


def decay_of(n: int, decay: float = 0.9999, tau: float = 2000) -> float:
    """The schedule as Ultralytics writes it."""
    return decay * (1 - math.exp(-n / tau))


def test_disabled_does_nothing() -> None:
    model = Network()
    ema = ModelEMA(model)
    before = bits(ema.ema)
    trained(model, numbers(1))
    ema.enabled = False
    ema.update(model)
    ema.update_attr(model)
    assert bits(ema.ema) == before
    assert ema.updates == 0


def test_attributes_are_copied() -> None:
    model: Any = Network()
    ema = ModelEMA(model)
    model.names, model.stride, model.args, model._private = {0: "cat"}, 32, "kept", 1
    ema.update_attr(model, include=["names", "stride"])
    assert (ema.ema.names, ema.ema.stride) == ({0: "cat"}, 32)
    assert not hasattr(ema.ema, "args")
    ema.update_attr(nn.DataParallel(model), exclude=("args",))
    assert not hasattr(ema.ema, "args")
    model.process_group = model.reducer = object()  # of data parallel wrappers
    ema.update_attr(model)
    assert ema.ema.args == "kept"
    for name in ("_private", "process_group", "reducer"):
        assert not hasattr(ema.ema, name)
    assert ema.ema.embed is not model.embed


def test_teacher_has_no_average() -> None:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student_model = nn.Linear(3, 2)
            self.teacher_model = nn.Linear(30, 20)

    model = Distilled()
    ema = ModelEMA(model, 0.5, 0.01)
    assert ema.ema.teacher_model is None
    old = ema.ema.student_model.weight.clone()
    with torch.no_grad():
        model.student_model.weight.add_(1)
    ema.update(model)
    torch.testing.assert_close(ema.ema.student_model.weight, old + 0.5)
    assert list(ema.ema.state_dict()) == ["student_model.weight", "student_model.bias"]
    assert model.teacher_model is not None


def test_checkpoint_goes_round() -> None:
    model, generator = Network(1, torch.float32), numbers(5)
    ema = ModelEMA(model, 0.9, 50)
    for _ in range(7):
        trained(model, generator)
        ema.update(model)
    checkpoint = through_a_file(export(ema), weights_only=False)
    assert checkpoint["updates"] == 7
    assert isinstance(checkpoint["ema"], Network)
    assert {one.dtype for one in checkpoint["ema"].parameters()} == {torch.float16}
    assert ema.ema.wide.dtype == torch.float32  # the average itself is as it was
    other = ModelEMA(Network(9, torch.float32), 0.9, 50)
    load(other, checkpoint)
    assert other.updates == 7
    for name, one in tensors(other.ema).items():
        want = tensors(ema.ema)[name]
        assert one.dtype == want.dtype
        if name != "cache":
            assert torch.equal(one, want.half().float() if want.is_floating_point() else want)
    # What the peer does to resume: the same module, in float32.
    peers = copy.deepcopy(checkpoint["ema"]).float().state_dict()
    assert all(torch.equal(one, peers[name]) for name, one in other.ema.state_dict().items())


def damaged(**others: Any) -> dict[str, Any]:
    return {"ema": {**Network(3).state_dict(), **others}, "updates": 4}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (None, "NoneType, expected a mapping"),
        ([1], "list, expected a mapping"),
        ({"ema": 5, "updates": 4}, "'ema' is of type int"),
        ({"ema": {4: 5}, "updates": 4}, "the key 4"),
        ({**damaged(), "updates": "x"}, "updates='x'"),
        ({**damaged(), "updates": -1}, "updates=-1"),
        (damaged(wide=None), "'wide' is of type NoneType, expected a tensor"),
        (damaged(wide=[1.0]), "'wide' is of type list, expected a tensor"),
        (damaged(wide=torch.empty(257, device="meta")), "'wide' has no contents"),
        (damaged(wide=torch.ones(257).to_sparse()), "expected a dense tensor"),
        (damaged(**{"more.weight": torch.ones(2)}), r"'more\.weight' is unexpected"),
        ({"ema": None, "updates": None, "model": Network(3)}, "no average"),
        ({"ema": Network(3, integers=False), "updates": 4}, "'places' is missing"),
    ],
)
def test_checkpoints_that_are_none_are_refused(checkpoint: Any, message: str) -> None:
    ema = ModelEMA(Network())
    with refused(CheckpointError, message, ema.ema):
        load(ema, checkpoint)
    assert ema.updates == 0
