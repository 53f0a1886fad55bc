"""Loops and classes that repositories copy, and what the docs write in their place."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastema

from .weights import Net, net, refresh_, values

pytestmark = pytest.mark.torch

STEPS = 7
TAU = 0.25

Step = Callable[[int], object]
"""Runs the update of a step, counted from 1."""


def pairs(online: Net, target: Net) -> list[tuple[Any, Any]]:
    return [*zip(online.parameters(), target.parameters(), strict=True)]


def polyak(online: Net, target: Net) -> Step:
    def step(_: int) -> None:
        for p, t in pairs(online, target):
            t.data.copy_(TAU * p.data + (1 - TAU) * t.data)

    return step


def polyak_ours(online: Net, target: Net) -> Step:
    ema = fastema.EMA(online, 1 - TAU, into=target, frozen="average", buffers="skip")
    return lambda _: ema.update()


def hard(online: Net, target: Net) -> Step:
    return lambda n: n % 3 or target.load_state_dict(online.state_dict())


def hard_ours(online: Net, target: Net) -> Step:
    ema = fastema.EMA(
        online, 0.0, into=target, update_every=3, overwrite=True, frozen="average", buffers="copy"
    )
    return lambda _: ema.update()


def moco(online: Net, target: Net) -> Step:
    def step(_: int) -> None:
        for q, k in pairs(online, target):
            k.data = k.data * 0.9 + q.data * (1.0 - 0.9)

    return step


def moco_ours(online: Net, target: Net) -> Step:
    ema = fastema.EMA(online, 0.9, into=target, buffers="skip")
    return lambda _: ema.update()


def momentum(n: int) -> float:
    return 1 - 0.5 / n


def dino(online: Net, target: Net) -> Step:
    def step(n: int) -> None:
        for q, k in pairs(online, target):
            k.data.mul_(momentum(n)).add_((1 - momentum(n)) * q.detach().data)

    return step


def dino_ours(online: Net, target: Net) -> Step:
    plan = fastema.Plan(target, online, buffers="skip")
    return lambda n: plan.lerp_(1 - momentum(n))


def diffusion(online: Net, target: Net) -> Step:
    def step(_: int) -> None:
        for source, one in pairs(online, target):
            one.detach().mul_(0.99).add_(source.detach(), alpha=1 - 0.99)

    return step


def diffusion_ours(online: Net, target: Net) -> Step:
    source, averages = list(online.parameters()), list(target.parameters())
    return lambda _: fastema.lerp_(averages, source, 1 - 0.99)


@torch.no_grad()
def _stylegan(online: Net, target: Net, beta: float) -> None:
    for p, p_ema in pairs(online, target):
        p_ema.copy_(p.lerp(p_ema, beta))
    for b, b_ema in zip(online.buffers(), target.buffers(), strict=True):
        b_ema.copy_(b)


def stylegan(online: Net, target: Net) -> Step:
    return lambda n: _stylegan(online, target, momentum(n))


def stylegan_ours(online: Net, target: Net) -> Step:
    plan = fastema.Plan(target, online)
    return lambda n: plan.lerp_(1 - momentum(n))


LOOPS = {
    "polyak": (polyak, polyak_ours),
    "hard": (hard, hard_ours),
    "moco": (moco, moco_ours),
    "dino": (dino, dino_ours),
    "diffusion": (diffusion, diffusion_ours),
    "stylegan": (stylegan, stylegan_ours),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_one_line_does_what_the_loop_does(loop: str, frozen: bool) -> None:
    online, target = net(0), net(1)
    target.requires_grad_(False)
    if frozen and loop != "moco":  # its line averages what is trained
        nn.Module.requires_grad_(online.conv, False)
    own = copy.deepcopy(target)
    theirs, ours = (make(online, t) for make, t in zip(LOOPS[loop], (target, own), strict=True))
    for n in range(1, STEPS + 1):
        refresh_(online, 10 + n)
        theirs(n)
        ours(n)
        for name, one in values(own).items():
            torch.testing.assert_close(one, values(target)[name], msg=f"step {n}: {name}")


class Copied:
    """A class in the form that many repositories have."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.shadow: dict[str, Any] = {}
        self.backup: dict[str, Any] = {}

    def register(self) -> None:
        for name, one in self.model.named_parameters():
            if one.requires_grad:
                self.shadow[name] = one.data.clone()

    def update(self) -> None:
        for name, old in self.shadow.items():
            new = dict(self.model.named_parameters())[name].data
            self.shadow[name] = (1.0 - self.decay) * new + self.decay * old

    def apply_shadow(self) -> None:
        for name, one in self.model.named_parameters():
            if name in self.shadow:
                self.backup[name] = one.data
                one.data = self.shadow[name]

    def restore(self) -> None:
        for name, one in self.model.named_parameters():
            if name in self.backup:
                one.data = self.backup[name]


def test_an_average_takes_the_calls_of_a_copied_class() -> None:
    model = net(0)
    model.conv.requires_grad_(False)
    theirs, ours = Copied(model, 0.9), fastema.EMA(model, 0.9, buffers="skip")
    theirs.register()
    for seed in range(5):
        refresh_(model, seed)
        theirs.update()
        ours.update()
    found = []
    for one in (theirs, ours):
        raw = values(model)
        one.apply_shadow()
        found.append(values(model))
        one.restore()
        assert all(torch.equal(raw[name], tensor) for name, tensor in values(model).items())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)


@pytest.mark.parametrize("copies_buffers", [False, True])
def test_an_average_takes_the_place_of_a_copied_model(copies_buffers: bool) -> None:
    model, copied = net(0), net(0).requires_grad_(False)
    own = copy.deepcopy(copied)
    buffers: Any = "copy" if copies_buffers else "average"
    ema = fastema.EMA(model, 0.9, into=own, frozen="average", buffers=buffers)
    names = {name for name, _ in model.named_buffers()} if copies_buffers else set()
    for seed in range(5):
        refresh_(model, seed)
        ema.update()
        state = model.state_dict()
        for name, one in copied.state_dict().items():
            if one.is_floating_point() and name not in names:
                one.mul_(0.9).add_(state[name], alpha=1 - 0.9)
            else:
                one.copy_(state[name])
    for name, one in own.state_dict().items():
        torch.testing.assert_close(one, copied.state_dict()[name])
