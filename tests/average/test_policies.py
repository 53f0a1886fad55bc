"""Averaged, copied and skipped tensors; non-persistent buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import DTypeError, LayoutError

from .kinds import KINDS, VARIED, assert_unchanged, full_state, which
from .weights import BUFFERS, Net, assert_bits, bits, net, refresh_, snapshot

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffers", ["copy", "average", "skip"])
def test_buffers_are_copied_averaged_or_skipped(buffers: str, kind: str) -> None:
    """Only updates that average also copy; averaged buffers behave like weights."""
    model = net()
    average = KINDS[kind](model, buffers=buffers, update_every=2)
    as_weights = KINDS[kind]({"norm.running_mean": model.norm.running_mean}, update_every=2)
    latest = model.norm.running_mean.clone()
    for n in range(1, 12):
        refresh_(model, n)
        average.update()
        as_weights.update()
        if n % 2 == 0:
            latest = model.norm.running_mean.clone()
        for i, shadow in enumerate(average.shadows):
            if buffers == "skip":
                assert BUFFERS.isdisjoint(shadow)
                continue
            held = shadow["norm.running_mean"]
            want = latest if buffers == "copy" else as_weights.shadows[i]["norm.running_mean"]
            assert torch.equal(bits(held), bits(want))


def test_8_bit_weights_are_refused_by_name() -> None:
    small = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(DTypeError, match="small: f8e4m3fn is not averaged"):
        fastema.EMA({"w": torch.randn(3), "small": small})
    model = net()
    model.base = nn.Parameter(small, requires_grad=False)
    with pytest.raises(DTypeError, match=r"base: f8e4m3fn is not averaged"):
        fastema.EMA(model, frozen="average")
    assert "base" in fastema.EMA(model, frozen="copy").shadow
    with pytest.raises(DTypeError, match="'0' is f8e4m3fn"):
        fastema.lerp_([small], [small.clone()], 0.5)


Change = Callable[[Any], object]


def net_with_tables(seed: int = 0) -> Net:
    """Return a `Net` with non-persistent buffers, one in a dtype that no kernel supports."""
    model = net(seed)
    model.register_buffer("table", torch.randn(4), persistent=False)
    model.hidden.register_buffer("mask", None, persistent=False)
    small = torch.ones(3).to(torch.float8_e5m2)
    model.head.register_buffer("small", small, persistent=False)
    return model


def register_late(module: nn.Module) -> nn.Module:
    module.register_buffer("places", torch.randn(3), persistent=False)
    return module


# Changes of non-persistent buffers.
CHANGES: dict[str, Change] = {
    "grown": lambda model: setattr(model, "table", torch.randn(9)),
    "of another dtype": lambda model: setattr(model, "table", torch.arange(4)),
    "grown in place": lambda model: model.table.resize_(2000),
    "gone": lambda model: setattr(model, "table", None),
    "deleted": lambda model: delattr(model, "table"),
    "made at last": lambda model: setattr(model.hidden, "mask", torch.randn(7)),
    "registered late": lambda model: register_late(model.conv),
    "in a new module": lambda model: setattr(model, "rotary", register_late(nn.Module())),
}


@pytest.mark.parametrize("kind", ["EMA", *VARIED])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unsaved_buffers_may_change_in_a_block_or_before_loading(change: Change, kind: str) -> None:
    model = net_with_tables()
    average = KINDS[kind](model)
    for n in (1, 2):
        refresh_(dict(model.state_dict()), n)
        average.update()
    held = full_state(average)
    with assert_unchanged(dict(model.state_dict()), average), average.swapped(**which(average)):
        change(model)
        assert full_state(average) == held
    resumed = net_with_tables()
    change(resumed)
    other = KINDS[kind](resumed)
    other.load_state_dict(average.state_dict())
    assert full_state(other) == held
    fresh = net_with_tables(5)
    other.copy_to(fresh, **which(average))
    with average.swapped(**which(average)):
        assert_bits(dict(fresh.state_dict()), snapshot(dict(model.state_dict())))


@pytest.mark.parametrize("value", [torch.ones(9), None], ids=["grown", "none"])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_changed_persistent_buffer_is_refused_with_advice(buffers: str, value: Any) -> None:
    model = net()
    model.register_buffer("kept", torch.ones(3), persistent=True)
    model.register_buffer("table", torch.ones(3), persistent=False)
    ema = fastema.EMA(model, 0.75, buffers=buffers)
    model.kept = model.table = value
    with pytest.raises(LayoutError, match="'kept'") as caught:
        ema.update()
    assert "'table'" not in str(caught.value)
    for advice in ("persistent=False", "buffers='skip'"):
        assert advice in str(caught.value)
    model.head = nn.Linear(12, 6, bias=False)
    model.kept = model.table = torch.ones(3)
    with pytest.raises(LayoutError, match=r"'head\.weight'") as caught:
        ema.update()
    assert "persistent" not in str(caught.value)
