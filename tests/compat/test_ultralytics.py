"""ModelEMA of Ultralytics: checkpoints in float16, exported and loaded."""

import copy

import pytest

from fastema.compat.ultralytics import ModelEMA, export, load

from ..support.peers import named_tensors
from .network import Network, make_generator, randomize, save_and_load, torch

pytestmark = pytest.mark.torch


def test_checkpoint_round_trips_in_float16() -> None:
    model, generator = Network(1, torch.float32), make_generator(5)
    ema = ModelEMA(model, 0.9, 50)
    for _ in range(7):
        randomize(model, generator)
        ema.update(model)
    checkpoint = save_and_load(export(ema), weights_only=False)
    assert checkpoint["updates"] == 7
    assert isinstance(checkpoint["ema"], Network)
    assert {one.dtype for one in checkpoint["ema"].parameters()} == {torch.float16}
    assert ema.ema.wide.dtype == torch.float32  # the average keeps its dtype
    other = ModelEMA(Network(9, torch.float32), 0.9, 50)
    load(other, checkpoint)
    assert other.updates == 7
    for name, one in named_tensors(other.ema).items():
        want = named_tensors(ema.ema)[name]
        assert one.dtype == want.dtype
        if name != "cache":
            assert torch.equal(one, want.half().float() if want.is_floating_point() else want)
    # The peer resumes from the same module, cast to float32.
    peers = copy.deepcopy(checkpoint["ema"]).float().state_dict()
    assert all(torch.equal(one, peers[name]) for name, one in other.ema.state_dict().items())
