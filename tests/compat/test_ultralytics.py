"""ModelEMA of Ultralytics: its numbers, its checkpoints, and where ours differs."""

import copy

import pytest

from fastema.compat.ultralytics import ModelEMA, export, load

from ..support.peers import named_tensors
from .network import Network, numbers, through_a_file, torch, trained

pytestmark = pytest.mark.torch


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
    for name, one in named_tensors(other.ema).items():
        want = named_tensors(ema.ema)[name]
        assert one.dtype == want.dtype
        if name != "cache":
            assert torch.equal(one, want.half().float() if want.is_floating_point() else want)
    # What the peer does to resume: the same module, in float32.
    peers = copy.deepcopy(checkpoint["ema"]).float().state_dict()
    assert all(torch.equal(one, peers[name]) for name, one in other.ema.state_dict().items())
