"""Whole runs of scripts that import a peer, as they are and under install(): the same averages."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import ArgumentError

from ..support.peers import timm_averages

NEEDS = ("diffusers", "ema_pytorch", "timm", "torch_ema")

pytestmark = pytest.mark.torch

STEPS = 137
Update = Callable[[int], Any]
Tensors = Callable[[], Any]


def of_swa_utils(peer: Any, model: Any, folder: Path) -> Iterator[tuple[Update, Tensors]]:
    for options in (
        {},
        {"multi_avg_fn": peer.get_ema_multi_avg_fn(0.95)},
        {"avg_fn": peer.get_ema_avg_fn(0.95), "use_buffers": True},
        {"avg_fn": peer.get_swa_avg_fn()},
    ):
        made = peer.AveragedModel(model, **options)
        yield lambda _, made=made: made.update_parameters(model), made.parameters


def of_timm(peer: Any, model: Any, folder: Path) -> Iterator[tuple[Update, Tensors]]:
    for made in (
        peer.ModelEma(model, 0.95),
        peer.ModelEmaV2(model, 0.95),
        peer.ModelEmaV3(model, 0.95, update_after_step=9, use_warmup=True, warmup_gamma=3.0),
    ):
        counted = isinstance(made, peer.ModelEmaV3)
        yield (
            lambda step, made=made, counted=counted: made.update(
                model, **({"step": step} if counted else {})
            ),
            made.module.parameters if isinstance(made, nn.Module) else made.ema.parameters,
        )


def of_torch_ema(peer: Any, model: Any, folder: Path) -> Iterator[tuple[Update, Tensors]]:
    for counted in (True, False):
        made = peer.ExponentialMovingAverage(model.parameters(), 0.95, counted)
        yield lambda _, made=made: made.update(), lambda made=made: made.shadow_params


def of_diffusers(peer: Any, model: Any, folder: Path) -> Iterator[tuple[Update, Tensors]]:
    for options in (
        {"update_after_step": 11, "min_decay": 0.1},
        {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.7},
    ):
        made = peer.EMAModel(model.parameters(), decay=0.97, **options)
        yield (
            lambda _, made=made: made.step(model.parameters()),
            lambda made=made: made.shadow_params,
        )


def of_ema_pytorch(peer: Any, model: Any, folder: Path) -> Iterator[tuple[Update, Tensors]]:
    tree = {"weights": [one.detach() for one in model.parameters()]}
    for made in (
        peer.EMA(model),
        peer.EMA(model, beta=0.9, update_after_step=20, update_every=7),
        peer.EMA(model, beta=None, update_after_step=3, update_every=5, inv_gamma=2.0, power=0.8),
        peer.EMA(tree, beta=0.9, update_after_step=4, update_every=6),
        peer.EMAPytree(tree, beta=0.99, update_after_step=0),
        peer.KarrasEMA(model, sigma_rel=0.1, update_every=10),
    ):
        yield (
            lambda _, made=made: made.update(),
            lambda made=made: (
                made.ema_pytree["weights"]
                if hasattr(made, "ema_pytree")
                else made.ema_model.parameters()
            ),
        )
    several = peer.PostHocEMA(
        model,
        sigma_rels=(0.05, 0.28),
        update_every=10,
        checkpoint_every_num_steps=40,
        checkpoint_folder=folder / "snapshots",
        checkpoint_dtype=torch.float32,
    )
    yield lambda _: several.update(), several.ema_models.parameters


SCRIPTS: dict[str, tuple[str, Callable[..., Iterator[tuple[Update, Tensors]]]]] = {
    "swa_utils": ("torch.optim.swa_utils", of_swa_utils),
    "timm": ("timm.utils.model_ema", of_timm),
    "torch_ema": ("torch_ema", of_torch_ema),
    "diffusers": ("diffusers.training_utils", of_diffusers),
    "ema_pytorch": ("ema_pytorch", of_ema_pytorch),
}


@pytest.fixture(autouse=True)
def timm_without_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.utils.model_ema", timm_averages())


def run(peer: str, folder: Path) -> list[list[list[Any]]]:
    """The averages of a script at every tenth step and at the end."""
    home, script = SCRIPTS[peer]
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    generator = torch.Generator().manual_seed(5)
    averages = list(script(everything(import_module(home)), model, folder))
    seen = []
    for step in range(STEPS):
        with torch.no_grad():
            for one in model.parameters():
                one += 0.05 + 0.2 * torch.randn(one.shape, generator=generator)
        for update, _ in averages:
            update(step)
        if step % 10 == 0 or step == STEPS - 1:
            seen.append([[one.detach().clone() for one in tensors()] for _, tensors in averages])
    return seen


def everything(home: ModuleType) -> Any:
    """A peer's names, with those that it keeps in other modules."""
    if home.__name__ != "ema_pytorch":
        return home
    more = ("ema_pytree_pytorch", "post_hoc_ema")
    every = [home, *(import_module(f"ema_pytorch.{name}") for name in more)]
    return SimpleNamespace(**{k: v for one in every for k, v in vars(one).items()})


def differing(one: list[list[list[Any]]], other: list[list[list[Any]]]) -> set[int]:
    """Which averages differ at any time by more than what float32 decays are off."""
    return {
        at
        for mine, theirs in zip(one, other, strict=True)
        for at, pair in enumerate(zip(mine, theirs, strict=True))
        if not all(torch.allclose(*both, rtol=2e-5, atol=2e-5) for both in zip(*pair, strict=True))
    }


def test_a_synthesis_is_of_the_averages_that_were_asked_for(tmp_path: Path) -> None:
    """With update_every above 1 these are wider than asked, in theirs and under install()."""

    def synthesized(folder: Path) -> Any:
        peer = import_module("ema_pytorch")
        model = nn.Linear(1, 1)
        several = peer.PostHocEMA(
            model,
            sigma_rels=(0.05, 0.28),
            update_every=10,
            checkpoint_every_num_steps=20,
            checkpoint_folder=folder,
            checkpoint_dtype=torch.float32,
        )
        for step in range(200):
            nn.init.constant_(model.weight, float(step))
            several.update()
        return several.synthesize_ema_model(sigma_rel=0.1).ema_model.weight.item()

    theirs = synthesized(tmp_path / "theirs")
    with fastema.compat.install("ema_pytorch"):
        assert synthesized(tmp_path / "ours") == pytest.approx(theirs, rel=0.02)
    with fastema.compat.install("ema_pytorch", horizon="corrected"):
        assert synthesized(tmp_path / "corrected") > theirs + 20


def test_another_horizon_is_refused_while_a_peer_is_installed() -> None:
    with fastema.compat.install("ema_pytorch", "torch_ema"):
        with pytest.raises(ArgumentError, match="installed with horizon='peer': uninstall it"):
            fastema.compat.install("ema_pytorch", horizon="corrected")
        fastema.compat.install("torch_ema", horizon="corrected")  # which has no other one
    with pytest.raises(ArgumentError, match="horizon='theirs': expected one of peer, corrected"):
        fastema.compat.install("ema_pytorch", horizon="theirs")  # type: ignore[arg-type]
    with fastema.compat.install("ema_pytorch", horizon="corrected"):
        assert fastema.compat.installed() == ("ema_pytorch",)


@pytest.mark.parametrize("peer", SCRIPTS)
def test_an_installed_class_averages_when_and_over_what_its_peer_does(
    peer: str, tmp_path: Path
) -> None:
    theirs = run(peer, tmp_path / "theirs")
    with fastema.compat.install(peer):
        installed = run(peer, tmp_path / "ours")
    assert differing(theirs, installed) == set()
