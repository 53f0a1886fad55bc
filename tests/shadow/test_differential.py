"""Side by side with the packages people use, on the same weights, where those are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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
ROOT = Path(__file__).resolve().parents[2]

Average = dict[str, torch.Tensor]


def timm_model_ema() -> ModuleType:
    """The one file of timm that is needed; the package asks for torchvision."""
    from bench.race.peers import timm_model_ema as load

    try:
        return load()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def run(
    peer: Callable[[Net], tuple[Callable[[], object], Callable[[], Average]]],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """Average one model by both, and compare at every tenth step."""
    model = net(0, dtype)
    update, average = peer(model)
    ema = options.pop("kind", fastema.EMA)(model, **options)
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


def named(model: nn.Module, tensors: list[torch.Tensor]) -> Average:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, tensors, strict=True))


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("multi", [True, False])
def test_averaged_model(multi: bool, use_buffers: bool) -> None:
    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        function = (
            {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}
            if multi
            else {"avg_fn": swa_utils.get_ema_avg_fn(0.9)}
        )
        averaged = swa_utils.AveragedModel(model, use_buffers=use_buffers, **function)
        averaged.update_parameters(model)  # the first call only copies

        def average() -> Average:
            module = averaged.module
            found = dict(module.named_parameters())
            if use_buffers:  # it averages the integer counter too
                found |= {n: b for n, b in module.named_buffers() if b.is_floating_point()}
            return {n: t.detach() for n, t in found.items()}

        return lambda: averaged.update_parameters(model), average

    run(peer, decay=0.9, buffers="average" if use_buffers else "copy")


@pytest.mark.parametrize("multi", [True, False])
def test_averaged_model_that_takes_the_mean(multi: bool) -> None:
    """Of the weights of each update; ``inverse_gamma`` with power 1 is the running mean too."""

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        function = {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()} if multi else {}
        averaged = swa_utils.AveragedModel(model, **function)
        return (
            lambda: averaged.update_parameters(model),
            lambda: {n: p.detach() for n, p in averaged.module.named_parameters()},
        )

    run(peer, decay=rules.inverse_gamma(1 - 1e-9, power=1.0))
    run(peer, kind=fastema.SWA)


@pytest.mark.parametrize("warmup", [True, False])
def test_torch_ema(warmup: bool) -> None:
    torch_ema = pytest.importorskip("torch_ema")

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        average = torch_ema.ExponentialMovingAverage(
            model.parameters(), 0.9, use_num_updates=warmup
        )
        return (
            lambda: average.update(model.parameters()),
            lambda: named(model, average.shadow_params),
        )

    run(peer, decay=rules.warmup(0.9) if warmup else 0.9)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
def test_ema_pytorch(foreach: bool, warmup: bool) -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        average = ema_pytorch.EMA(
            model,
            ema_model=copy.deepcopy(model),
            beta=0.9,
            min_value=0.0 if warmup else 0.9,
            inv_gamma=2.0,
            power=0.75,
            update_every=1,
            update_after_step=0,
            use_foreach=foreach,
        )
        average.update()  # the first call only copies
        found = average.ema_model
        return average.update, lambda: {n: p.detach() for n, p in found.named_parameters()}

    # Its second update, our first, has one behind it: 1 - (1 + 1 / inv_gamma) ** -power.
    run(peer, decay=Later(rules.inverse_gamma(0.9, 2.0, 0.75)) if warmup else 0.9)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
def test_diffusers(foreach: bool, warmup: bool) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        average = training_utils.EMAModel(
            model.parameters(),
            decay=0.9,
            min_decay=0.0 if warmup else 0.9,
            use_ema_warmup=warmup,
            inv_gamma=2.0,
            power=0.75,
            foreach=foreach,
        )
        average.step(model.parameters())  # the first call uses decay 0
        return (
            lambda: average.step(model.parameters()),
            lambda: named(model, average.shadow_params),
        )

    run(peer, decay=Later(rules.inverse_gamma(0.9, 2.0, 0.75)) if warmup else 0.9)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("shadow", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm(dtype: torch.dtype, shadow: torch.dtype, warmup: bool) -> None:
    timm = timm_model_ema()
    steps = iter(range(1, STEPS + 1))

    def peer(model: Net) -> tuple[Callable[[], object], Callable[[], Average]]:
        average = timm.ModelEmaV3(
            model,
            decay=0.9,
            dtype=shadow,
            use_warmup=warmup,
            warmup_gamma=2.0,
            warmup_power=0.75,
        )

        # Without a step it does not warm up, and does not copy at the first update either.
        return (
            lambda: average.update(model, next(steps) if warmup else None),
            average.module.state_dict,
        )

    decay = rules.inverse_gamma(0.9, 2.0, 0.75) if warmup else 0.9
    run(peer, dtype, decay=decay, shadow_dtype=shadow, buffers="average")
