"""Copying an average into a model for good: what fits, what is left alone, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import DTypeError, LayoutError

from .kinds import KINDS, all_of, trained_kind
from .weights import assert_bits, net, refresh_, snapshot, values

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("kind", KINDS)
def test_copy_to_of_every_kind(kind: str) -> None:
    """Of an average in two halves the float32 that they are, rounded once."""
    model = net()
    average = trained_kind(kind, model)
    raw, held = snapshot(model), all_of(average)
    for i, shadow in enumerate(average.shadows):
        wide = net(5, torch.float64)
        average.copy_to(wide, which=i)
        exact = values(wide)
        for name, half in shadow.items():
            if "split" in kind and name in exact and exact[name].is_floating_point():
                assert torch.equal(exact[name], exact[name].float().double())
                torch.testing.assert_close(half.double(), exact[name], rtol=2.0**-8, atol=0)
            else:
                assert torch.equal(exact[name], half.to(exact[name].dtype))
        for dtype in (torch.float32, torch.bfloat16):
            other = net(5, dtype)
            average.copy_to(other, which=i)
            for name, tensor in values(other).items():
                assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
    assert_bits(model, raw)
    assert all_of(average) == held


def lacking(model: nn.Module) -> None:
    del model.scale
    model.conv.bias = None


def reshaped(model: nn.Module) -> None:
    model.hidden.bias.data = torch.randn(13)


def training_more(model: nn.Module) -> None:
    model.extra = nn.Parameter(torch.randn(3))  # it would stay raw among averaged ones


UNFIT = {lacking: ["'scale'", "'conv.bias'"], reshaped: ["hidden.bias"], training_more: ["extra"]}


@pytest.mark.parametrize("change", UNFIT)
def test_copy_to_a_model_that_does_not_fit(change: Callable[[nn.Module], None]) -> None:
    ema = fastema.EMA(net(), 0.5)
    target = net(1)
    change(target)
    before = snapshot(target)
    with pytest.raises(LayoutError) as caught:
        ema.copy_to(target)
    assert all(name in str(caught.value) for name in UNFIT[change])
    assert_bits(target, before)


def test_copy_to_weights_that_cannot_be_written() -> None:
    ema = fastema.EMA({"a": torch.randn(4, 3), "b": torch.randn(2)}, 0.5)
    before = torch.randn(2)
    for odd in (torch.randn(3).expand(4, 3), torch.randn(4, 3, dtype=torch.complex64)):
        target = {"b": before.clone(), "a": odd}
        with pytest.raises((LayoutError, DTypeError), match="a"):
            ema.copy_to(target)
        assert torch.equal(target["b"], before)


def test_copy_to_tells_autograd() -> None:
    """A graph built on the weights that were there is refused, as after torch's own writes."""
    model = net()
    ema = fastema.EMA(model, 0.5)
    refresh_(model, 1)
    for write in (lambda: ema.copy_to(model), ema.apply_shadow, ema.restore):
        loss = model.head(torch.randn(2, 12, requires_grad=True)).square().sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
