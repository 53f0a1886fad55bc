"""Averages that are given other arrays than those they were built from, and partial failures."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fastema
from fastema.binding.swap import Calls, Swap, WriteWatch
from fastema.compat.averager import ModelAverager
from fastema.engine.program import Program
from fastema.errors import LayoutError


def fixed(kind: str, values: list[float]) -> object:
    """Return an array that never changes."""
    if kind == "jax":
        return jnp.array(values, jnp.float32)
    array = np.array(values, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("kind", ["jax", "read-only"])
def test_a_block_names_the_arrays_that_hold_the_average(kind: str) -> None:
    ema = fastema.EMA({"w": fixed(kind, [1.0, 2.0])}, decay=0.5)
    latest = {"w": np.array([3.0, 4.0], np.float32)}
    ema.update(latest)
    with ema.swapped() as weights:
        assert weights is latest
        np.testing.assert_array_equal(weights["w"], [2.0, 3.0])
    np.testing.assert_array_equal(latest["w"], [3.0, 4.0])


def test_a_swap_with_arrays_that_never_change_says_so() -> None:
    plan = fastema.Plan([np.full(2, 3.0, np.float32)], [jnp.array([1.0, 2.0])])
    plan.lerp_(0.5)
    with pytest.raises(LayoutError, match="read-only"):
        plan.swap_()


@pytest.mark.torch
@pytest.mark.parametrize("number", [1, 5, 20])
def test_a_sampled_average_notices_at_once_what_moves_all_tensors(number: int) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2, bias=False) for _ in range(number)])
    ema = fastema.EMA(model, decay=0.5, watch="sample")
    for _ in range(5):
        ema.update()
    before = ema.shadow["0.weight"].clone()
    moved = {name: one + 1 for name, one in model.state_dict().items()}
    model.load_state_dict(moved, assign=True)
    ema.update()
    torch.testing.assert_close(ema.shadow["0.weight"], before + 0.5)


@pytest.mark.torch
@pytest.mark.parametrize("fails", ["run", "begin"])
def test_a_swap_that_fails_half_way_takes_back_what_it_did(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(3, 2)
    ema = fastema.EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight += 1
    ema.update()
    raw, average = model.weight.detach().clone(), ema.shadow["weight"].clone()
    holder = Program if fails == "run" else WriteWatch
    with monkeypatch.context() as patch:

        def broken(*_: object) -> None:
            raise MemoryError(fails)

        patch.setattr(holder, fails, broken)
        with pytest.raises(MemoryError):
            ema.apply_shadow()
    assert not ema.applied
    assert torch.equal(model.weight, raw)
    assert torch.equal(ema.shadow["weight"], average)
    with ema.swapped():
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, raw)


def test_a_way_that_fails_keeps_no_other_from_being_undone() -> None:
    undone: list[str] = []
    broken = [True]

    def restore() -> None:
        if broken:
            raise MemoryError("no room")
        undone.append("second")

    swap = Swap(
        Calls(lambda: None, lambda: undone.append("first")),
        Calls(lambda: None, restore),
        Calls(lambda: None, lambda: undone.append("third")),
    )
    swap.apply()
    with pytest.raises(MemoryError):
        swap.restore()
    assert undone == ["third", "first"]
    assert swap.applied
    broken.clear()
    swap.restore()
    assert undone == ["third", "first", "second"]
    assert not swap.applied


@pytest.mark.torch
def test_weights_come_back_though_averages_cannot_be_written_back() -> None:
    model = torch.nn.Linear(3, 2)
    averaged = torch.nn.Linear(3, 2)
    raw = model.weight.detach().double()
    averager = ModelAverager(averaged)

    def move() -> None:
        with averager.swapped(model):
            model.double()
            del averaged.bias

    with pytest.raises(LayoutError, match="'bias' is gone"):
        move()
    assert torch.equal(model.weight.detach(), raw)
