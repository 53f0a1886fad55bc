"""ModelEMA of Ultralytics: its numbers, its checkpoints, and where ours differs."""

import copy

import pytest

from fastema.compat.ultralytics import ModelEMA, export, load

from ..support.peers import tensors
from .network import Network, bits, numbers, through_a_file, torch, trained

nn = torch.nn

pytestmark = pytest.mark.torch


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
