"""Side by side with the packages people use, on the same weights, where those are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import fastema
from fastema import rules

from .weights import Net, net, refresh_

pytestmark = pytest.mark.torch

STEPS = 40
Average = dict[str, torch.Tensor]


Peer = Callable[[Net], tuple[Callable[[], object], Callable[[], Average]]]
"""``peer(model)`` builds an average of a package: how to update it, and what it holds."""


def compare(
    peer: Peer, kind: Any = fastema.EMA, dtype: Any = torch.float32, **options: Any
) -> None:
    """Average one model by both, and compare at every tenth step."""
    model = net(0, dtype)
    update, average = peer(model)
    ema = kind(model, **options)
    for n in range(1, STEPS + 1):
        refresh_(model, n)
        update()
        ema.update()
        if n % 10 == 0 or n < 3:
            theirs = average()
            assert theirs.keys() <= set(ema.shadow)
            for name, tensor in theirs.items():
                last_place = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
                torch.testing.assert_close(
                    ema.shadow[name], tensor, rtol=8 * last_place, atol=8 * last_place, msg=name
                )


@dataclass(frozen=True)
class Later(rules.Rule):
    """A rule that has one update behind it."""

    inner: rules.Rule

    def decay(self, n: int) -> float:
        return self.inner.decay(n + 1)


WARMED = rules.inverse_gamma(0.9, 2.0, 0.75)
# Where a second update of theirs, our first, has one behind it: 1 - (1 + 1 / inv_gamma) ** -power.
LATER = Later(WARMED)
EITHER = [True, False]


def named(model: nn.Module, tensors: list[torch.Tensor]) -> Average:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, tensors, strict=True))


def floats_of(module: nn.Module, buffers: bool = False) -> Average:
    """The parameters of a module and, of its buffers, those that are no integer counters."""
    found = dict(module.named_parameters())
    if buffers:
        found |= {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    return {name: tensor.detach() for name, tensor in found.items()}


def averaged_model(copied: bool, **options: Any) -> Peer:
    """``copied``: its first call, which only copies, is made at once."""

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        averaged = swa_utils.AveragedModel(model, **options)
        if copied:
            averaged.update_parameters(model)
        buffers = options.get("use_buffers", False)
        update = partial(averaged.update_parameters, model)
        return update, lambda: floats_of(averaged.module, buffers)

    return peer


@pytest.mark.parametrize("use_buffers", EITHER)
@pytest.mark.parametrize("multi", EITHER)
def test_averaged_model(multi: bool, use_buffers: bool) -> None:
    function = (
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}
        if multi
        else {"avg_fn": swa_utils.get_ema_avg_fn(0.9)}
    )
    peer = averaged_model(True, use_buffers=use_buffers, **function)
    compare(peer, decay=0.9, buffers="average" if use_buffers else "copy")


@pytest.mark.parametrize("warmup", EITHER)
def test_torch_ema(warmup: bool) -> None:
    torch_ema = pytest.importorskip("torch_ema")

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        given = list(model.parameters())
        average = torch_ema.ExponentialMovingAverage(given, 0.9, use_num_updates=warmup)
        return partial(average.update, given), lambda: named(model, average.shadow_params)

    compare(peer, decay=rules.warmup(0.9) if warmup else 0.9)


@pytest.mark.parametrize("warmup", EITHER)
@pytest.mark.parametrize("foreach", EITHER)
def test_ema_pytorch(foreach: bool, warmup: bool) -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    every = {"update_every": 1, "update_after_step": 0, "use_foreach": foreach}
    power = {"inv_gamma": 2.0, "power": 0.75, "min_value": 0.0 if warmup else 0.9}

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        copied = copy.deepcopy(model)
        average = ema_pytorch.EMA(model, ema_model=copied, beta=0.9, **power, **every)
        average.update()  # the first call only copies
        return average.update, lambda: floats_of(average.ema_model)

    compare(peer, decay=LATER if warmup else 0.9)


@pytest.mark.parametrize("warmup", EITHER)
@pytest.mark.parametrize("foreach", EITHER)
def test_diffusers(foreach: bool, warmup: bool) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)
    power = {"inv_gamma": 2.0, "power": 0.75, "min_decay": 0.0 if warmup else 0.9}

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        average = training_utils.EMAModel(
            model.parameters(), decay=0.9, use_ema_warmup=warmup, foreach=foreach, **power
        )
        average.step(model.parameters())  # the first call uses decay 0
        return (
            lambda: average.step(model.parameters()),
            lambda: named(model, average.shadow_params),
        )

    compare(peer, decay=LATER if warmup else 0.9)


@pytest.mark.parametrize("warmup", EITHER)
@pytest.mark.parametrize("shadow", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm(dtype: torch.dtype, shadow: torch.dtype, warmup: bool) -> None:
    from bench.race.peers import timm_model_ema

    try:  # the one file of timm that is needed; the package asks for torchvision
        timm = timm_model_ema()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    power = {"use_warmup": warmup, "warmup_gamma": 2.0, "warmup_power": 0.75}
    steps = iter(range(1, STEPS + 1))

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        average = timm.ModelEmaV3(model, decay=0.9, dtype=shadow, **power)
        # Without a step it does not warm up, and does not copy at the first update either.
        return (
            lambda: average.update(model, next(steps) if warmup else None),
            average.module.state_dict,
        )

    options = {"shadow_dtype": shadow, "buffers": "average"}
    compare(peer, dtype=dtype, decay=WARMED if warmup else 0.9, **options)
