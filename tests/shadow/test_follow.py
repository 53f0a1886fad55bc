"""Averages that follow optimizers through PyTorch's own hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import ArgumentError, StateError
from fastema.rules import Warmup

from .kinds import full_state

pytestmark = pytest.mark.torch


def build(decay: Any = 0.9) -> tuple[nn.Module, torch.optim.Optimizer, fastema.EMA, fastema.EMA]:
    """Return a model, its optimizer, an average to follow it, and one to update by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    return model, optimizer, fastema.EMA(model, decay), fastema.EMA(model, decay)


def backward(model: nn.Module, n: int = 0) -> None:
    generator = torch.Generator().manual_seed(n)
    model(torch.randn(5, 3, generator=generator)).square().mean().backward()


def test_every_optimizer_step_is_one_update_beside_a_scheduler() -> None:
    model, optimizer, ema, other = build(Warmup(0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    ema.follow(optimizer)
    for n in range(7):
        backward(model, n)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        other.update()
    assert full_state(ema) == full_state(other)
    assert ema.num_updates == 7


def test_average_updates_once_all_followed_optimizers_have_stepped() -> None:
    model, _, ema, other = build(Warmup(0.9))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[2].parameters(), lr=0.1)
    ema.follow(first, second)
    for n in range(4):
        backward(model, n)
        first.step()
        assert ema.num_updates == n
        second.step()
        other.update()
        assert full_state(ema) == full_state(other)
    for _ in range(5):  # like a critic, which is trained more often
        first.step()
    assert ema.num_updates == 4
    second.step()
    assert ema.num_updates == 5


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_skipped_by_the_grad_scaler_do_not_count(name: str, unscaled: bool) -> None:
    model, _, ema, other = build(Warmup(0.9))
    optimizer = OPTIMIZERS[name](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ema.follow(optimizer)
    for n in range(6):
        optimizer.zero_grad()
        bad = n in (0, 2, 3)
        loss = model(torch.full((2, 3), float("inf") if bad else float(n))).sum()
        scaler.scale(loss).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not bad:
            other.update()
        assert all(one.isfinite().all() for one in model.parameters())
        assert full_state(ema) == full_state(other)
    assert ema.num_updates == 3


def test_steps_declined_by_update_if_count_in_the_next_update() -> None:
    model, optimizer, ema, other = build(0.8)
    wanted = iter([True, False, False, True, False, True])
    ema.follow(optimizer, update_if=lambda: next(wanted))
    for steps in (1, None, None, 3, None, 2):
        backward(model, steps or 9)
        optimizer.step()
        if steps is not None:
            other.update(steps=steps)
        assert full_state(ema) == full_state(other)
    assert ema.num_updates == 6


def test_unfollow_stops_updates_and_follow_resumes_them() -> None:
    _, optimizer, ema, _ = build()
    ema.unfollow()
    ema.follow(optimizer)
    with pytest.raises(StateError, match="unfollow"):
        ema.follow(optimizer)
    optimizer.step()
    with pytest.raises(StateError, match="leave update\\(\\) out"):
        ema.update()  # this step would count twice
    ema.unfollow()
    optimizer.step()
    assert ema.num_updates == 1
    ema.follow(optimizer)
    optimizer.step()
    assert ema.num_updates == 2


def test_follow_refuses_anything_but_distinct_optimizers() -> None:
    model, optimizer, ema, _ = build()
    for given, said in (
        ((), "was given 0 optimizers"),
        ((optimizer, optimizer), "each once"),
        ((model,), "was given a Sequential"),
        ((3,), "was given a int: expected optimizers of torch.optim"),
    ):
        with pytest.raises(ArgumentError, match=said):
            ema.follow(*given)
    ema.follow(optimizer)
    optimizer.step()
    assert ema.num_updates == 1
