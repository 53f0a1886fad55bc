"""Averages that follow optimizers through PyTorch's own hooks."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import ArgumentError, NonFiniteError, StateError
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


@pytest.mark.parametrize("reaction", ["skip", "raise"])
def test_declined_steps_outlive_an_update_that_a_nan_prevents(reaction: Any) -> None:
    model, _, _, other = build(0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # without momentum, which keeps the NaN
    ema = fastema.EMA(model, 0.8, on_nonfinite=reaction)
    wanted = iter([True, False, False, True, True])
    ema.follow(optimizer, update_if=lambda: next(wanted))
    for n in range(5):
        backward(model, n)
        raw = copy.deepcopy(model.state_dict())
        if n == 3:
            model[0].weight.grad[0, 0] = torch.nan
        with pytest.raises(NonFiniteError) if (reaction, n) == ("raise", 3) else nullcontext():
            optimizer.step()
        optimizer.zero_grad()
        if n == 3:
            model.load_state_dict(raw)  # as a guard against bad steps does
        if n in (0, 4):
            other.update(steps=1 if n == 0 else 3)
    skipped = int(reaction == "skip")
    assert full_state(ema) == {**full_state(other), "num_skipped": skipped}


class Lookahead(torch.optim.Optimizer):
    """Writes the weights after the optimizer inside has stepped; runs hooks of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for one in group["params"]:
                    one.mul_(0.75)
        return loss


class Unhooked(Lookahead):
    """Keeps out of torch's own constructor, as PostLocalSGDOptimizer does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


class Clamped(torch.optim.SGD):
    """Writes the weights after the step of its base class, which runs the hooks too."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if closure is not None and loss is None:
            raise ValueError("no loss")
        with torch.no_grad():
            for one in self.param_groups[0]["params"]:
                one.clamp_(-0.1, 0.1)
        return loss


WRITERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "wrapper": lambda p: Lookahead(torch.optim.SGD(p, lr=0.1)),
    "wrapper of a wrapper": lambda p: Lookahead(Lookahead(torch.optim.SGD(p, lr=0.1))),
    "subclass": lambda p: Clamped(p, lr=0.1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_an_optimizer_writes_around_another_step_is_averaged_in_the_same_update(
    name: str,
) -> None:
    model, _, ema, other = build(0.8)
    optimizer = WRITERS[name](model.parameters())
    ema.follow(optimizer)
    for n in range(1, 5):
        backward(model, n)
        optimizer.step()
        optimizer.zero_grad()
        other.update()
        assert ema.num_updates == n
        assert full_state(ema) == full_state(other)
    if name == "subclass":
        with pytest.raises(ValueError, match="no loss"):
            optimizer.step(lambda: None)
        optimizer.step()
        assert ema.num_updates == n + 1


def test_wrapper_without_hooks_is_refused_with_advice() -> None:
    model, optimizer, ema, _ = build()
    Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))  # hooks the class, not the object
    with pytest.raises(ArgumentError, match=r"Unhooked, whose step\(\) runs no hooks.*update\(\)"):
        ema.follow(Unhooked(optimizer))
    ema.follow(optimizer)


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_step_that_the_scaler_skips_for_one_optimizer_leaves_the_next_ones_in_phase(
    bad: int, fused: bool
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1, fused=fused) for one in model]
    ema, other = fastema.EMA(model, 0.5), fastema.EMA(model, 0.5)
    ema.follow(*optimizers)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    for n in range(6):
        loss = sum(one(torch.full((1, 3), n + 1.0)).square().sum() for one in model)
        scaler.scale(loss).backward()
        if n in (0, 3, 4):
            model[(bad + n // 4) % 3].weight.grad[0, 0] = torch.inf
        for one in optimizers:
            scaler.step(one)
            one.zero_grad()
        scaler.update()
        # If the last one skipped, the others' steps count together with its next one.
        if n not in (0, 3) and (n != 4 or bad == 2):
            other.update()
        assert full_state(ema) == full_state(other)
    assert ema.num_updates == 3 + (bad == 2)


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
        ((int,), "was given a type: expected optimizers of torch.optim"),
    ):
        with pytest.raises(ArgumentError, match=said):
            ema.follow(*given)
    ema.follow(optimizer)
    optimizer.step()
    assert ema.num_updates == 1
