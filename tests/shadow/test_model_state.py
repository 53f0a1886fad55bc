"""The average as a model's own state: what `load_state_dict`, files and `functional_call` take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import LayoutError, StateError

from .kinds import KINDS, trained_kind, unchanged, which
from .weights import Net, assert_bits, bits, net, refresh_, snapshot

pytestmark = pytest.mark.torch


def trained(model: Any, kind: str = "EMA", **options: Any) -> Any:
    average = trained_kind(kind, model, **options)
    refresh_(model, 9)
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_model_saves_with_the_average_in_it(kind: str, dtype: torch.dtype) -> None:
    """Rounded to nearest even where the dtypes differ, which the swap cannot always do."""
    model = net(0, dtype)
    average = trained(model, kind)
    with unchanged(model, average):
        state = average.model_state_dict(**which(average))
    other = net(3, dtype)
    average.copy_to(other, **which(average))
    expected = other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(bits(state[name]), bits(expected[name])) for name in expected)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert not any(tensor.requires_grad for tensor in state.values())
    fresh = net(4, dtype)
    fresh.load_state_dict(state)
    assert_bits(fresh, snapshot(other))


class Tied(nn.Module):
    """Tied weights, a frozen layer, a buffer that is not saved, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 3}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.frozen(self.embed(tokens)))
        return logits


def test_tied_frozen_and_further_state_is_all_there() -> None:
    model = Tied()
    ema = fastema.EMA(model, 0.5)
    refresh_(model, 1)
    ema.update()
    state = ema.model_state_dict()
    assert list(state) == list(model.state_dict())
    assert state["embed.weight"] is state["head.weight"]
    assert torch.equal(state["embed.weight"], ema.shadow["embed.weight"])
    assert torch.equal(state["frozen.weight"], model.frozen.weight)
    other = Tied()
    other.load_state_dict(state)
    assert torch.equal(other.head.weight, ema.shadow["head.weight"])


def test_functional_call_takes_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    ema = trained(model)
    x = torch.randn(5, 3)
    found = torch.func.functional_call(model, ema.model_state_dict(), (x,))
    with ema.swapped():
        assert torch.equal(found, model(x))


def test_it_is_refused_while_the_average_is_applied_and_for_a_model_of_other_shapes() -> None:
    ema = trained(net())
    with ema.swapped(), pytest.raises(StateError, match="model_state_dict"):
        ema.model_state_dict()
    with pytest.raises(LayoutError, match=r"head\.weight: shapes differ"):
        ema.model_state_dict(Net(width=7))
