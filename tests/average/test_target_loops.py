"""The loops that repositories have for targets and teachers, and what docs/teachers.md says."""

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
