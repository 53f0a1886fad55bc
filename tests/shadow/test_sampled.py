"""`watch="sample"`: each update checks a sixteenth of the tensors."""

import pytest
import torch

import fastema
from fastema.engine.watch import SHARES
from fastema.errors import ArgumentError


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(32)))


def test_one_moved_tensor_is_noticed_within_a_round() -> None:
    net = model()
    ema = fastema.EMA(net, 0.5, watch="sample")
    ema.update()
    weight = net[20].weight
    old = weight.data
    start = ema.shadow["20.weight"].clone()
    weight.data = old + 1.0
    for _ in range(SHARES):
        ema.update()
    # However late the move was noticed, the average has followed the new memory.
    assert (ema.shadow["20.weight"] - start).abs().max() > 0.4
    for _ in range(60):
        ema.update()
    torch.testing.assert_close(ema.shadow["20.weight"], weight.detach())


def test_moving_all_tensors_is_noticed_at_once() -> None:
    net = model()
    ema = fastema.EMA(net, 0.5, watch="sample")
    for _ in range(3):
        ema.update()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.data = parameter.data + 2.0
    before = ema.shadow["7.bias"].clone()
    ema.update()
    torch.testing.assert_close(ema.shadow["7.bias"], before.lerp(net[7].bias.detach(), 0.5))


def test_unknown_watch_is_refused() -> None:
    with pytest.raises(ArgumentError, match="watch='none'"):
        fastema.EMA(model(), watch="none")


def test_tensor_moved_before_the_first_update_is_noticed() -> None:
    """The first update checks every tensor, so that freed memory is never read."""
    net = model()
    ema = fastema.EMA(net, 0.5, watch="sample")
    before = ema.shadow["31.bias"].clone()
    net[31].bias.data = torch.full((4,), 7.0)
    ema.update()
    torch.testing.assert_close(ema.shadow["31.bias"], before.lerp(torch.full((4,), 7.0), 0.5))
