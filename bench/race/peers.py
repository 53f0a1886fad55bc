"""The peers: every way to average weights that the benchmarks and the tests compare.

One table, `PEERS`. Each entry sets up from a model and a decay and hands back a call that does one
update at that constant decay; set-up also spends whatever first call a peer uses up on copying.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn


@dataclass(frozen=True)
class Running:
    """A peer at work on one model."""

    update: Callable[[], object]
    average: Callable[[], list[Tensor]]  # in the order of model.parameters()
    apply: Callable[[], object] | None = None  # the average into the model
    restore: Callable[[], object] | None = None  # and the weights back


@dataclass(frozen=True)
class Refusal:
    """Why a peer does not run a mix of dtypes.

    `error` is a part of the message that the peer raises when it is made to; None where the entry
    would run, but measure the same as another entry.
    """

    reason: str
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Peer:
    """One row of a table.

    Parameters
    ----------
    name
        As reports show it.
    setup
        ``setup(model, decay, average_dtype)`` puts it to work.
    module
        Top-level module that must be installed; None where torch alone is enough.
    refusals
        Mix -> why the peer does not run it.
    rounds_weights
        With an f32 average of a bf16 model, ``(1 - decay) * weight`` is rounded to bf16 on the way.
    stochastic
        Rounds at random to one of the two neighbours in bf16.
    swap
        Its name in races of swaps; empty where it does not take part.
    """

    name: str
    setup: Callable[[nn.Module, float, torch.dtype], Running]
    module: str | None = None
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    rounds_weights: bool = False
    stochastic: bool = False
    swap: str = ""

    def missing(self) -> str | None:
        """Return why the peer cannot run here at all, or None if it can."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def copies(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Return detached copies of the parameters in `dtype`."""
    return [p.detach().to(dtype, copy=True) for p in model.parameters()]


def _loop(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
    averages = copies(model, dtype)

    @torch.no_grad()
    def update() -> None:
        for average, weight in zip(averages, model.parameters(), strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)

    return Running(update, lambda: averages)


def _foreach_lerp(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
    averages = copies(model, dtype)
    weights = [p.detach() for p in model.parameters()]
    return Running(lambda: torch._foreach_lerp_(averages, weights, 1 - decay), lambda: averages)


def _foreach_cast(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
    averages = copies(model, dtype)
    weights = [p.detach() for p in model.parameters()]

    def update() -> None:
        torch._foreach_lerp_(averages, [w.to(dtype) for w in weights], 1 - decay)

    return Running(update, lambda: averages)


def _averaged_model(model: nn.Module, averaged: AveragedModel, dtype: torch.dtype) -> Running:
    averaged.module.to(dtype)
    averaged.update_parameters(model)  # the first call only copies
    return Running(
        lambda: averaged.update_parameters(model), lambda: list(averaged.module.parameters())
    )


def _averaged_model_multi(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return _averaged_model(model, averaged, dtype)


def _averaged_model_single(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(decay))
    return _averaged_model(model, averaged, dtype)


def _torch_ema(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay, use_num_updates=False)
    ema.to(dtype=dtype)

    # Without an argument it goes by weak references, and nothing else here holds the model.
    def apply() -> None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())

    return Running(
        lambda: ema.update(model.parameters()),
        lambda: ema.shadow_params,
        apply,
        lambda: ema.restore(model.parameters()),
    )


def _ema_pytorch(foreach: bool) -> Callable[[nn.Module, float, torch.dtype], Running]:
    def setup(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
        from copy import deepcopy

        from ema_pytorch import EMA

        ema = EMA(
            model,
            ema_model=deepcopy(model).to(dtype),
            beta=decay,
            min_value=decay,  # beta == min_value leaves no room for the warm-up
            update_every=1,
            update_after_step=0,
            use_foreach=foreach,
            coerce_dtype=any(p.dtype != dtype for p in model.parameters()),
        )
        ema.update()  # the first call only copies
        return Running(ema.update, lambda: list(ema.ema_model.parameters()))

    return setup


def timm_model_ema() -> ModuleType:
    """Load ``timm/utils/model_ema.py`` by itself.

    The file needs nothing but torch, while ``import timm`` needs torchvision as well.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("timm is not installed", name="timm")
    path = Path(spec.submodule_search_locations[0]) / "utils" / "model_ema.py"
    file_spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert file_spec is not None
    assert file_spec.loader is not None
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    return module


def _timm(stochastic: bool) -> Callable[[nn.Module, float, torch.dtype], Running]:
    def setup(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
        ema = timm_model_ema().ModelEmaV3(
            model, decay=decay, dtype=dtype, stochastic_rounding=stochastic
        )
        return Running(lambda: ema.update(model), lambda: list(ema.module.parameters()))

    return setup


def _diffusers(foreach: bool) -> Callable[[nn.Module, float, torch.dtype], Running]:
    def setup(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
        from diffusers.training_utils import EMAModel

        # Its decay always warms up; min_decay == decay leaves no room for that.
        ema = EMAModel(model.parameters(), decay=decay, min_decay=decay, foreach=foreach)
        ema.to(dtype=dtype)
        ema.step(model.parameters())  # the first call uses decay 0

        def apply() -> None:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())

        return Running(
            lambda: ema.step(model.parameters()),
            lambda: ema.shadow_params,
            apply,
            lambda: ema.restore(list(model.parameters())),
        )

    return setup


def our_ema(**options: Any) -> Callable[[nn.Module, float, torch.dtype], Running]:
    """Return the set-up of `fastema.EMA` with these options."""

    def setup(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
        import fastema

        ema = fastema.EMA(model, decay, **{"shadow_dtype": dtype, **options})
        names = [name for name, _ in model.named_parameters()]
        return Running(
            ema.update, lambda: [ema.shadow[name] for name in names], ema.apply_shadow, ema.restore
        )

    return setup


def _fastema_plan(model: nn.Module, decay: float, dtype: torch.dtype) -> Running:
    import fastema

    averages = copies(model, dtype)
    plan = fastema.Plan(averages, [p.detach() for p in model.parameters()])
    return Running(lambda: plan.lerp_(1 - decay), lambda: averages)


OURS = "fastema.EMA"

_SAME_DTYPE_ONLY = Refusal(
    "raises: lerp needs the average and the weights in one dtype", error="expected dtype"
)
_NOTHING_TO_CAST = Refusal("nothing to cast: the same as torch._foreach_lerp_")
_ONLY_BF16_AVERAGES = Refusal("an f32 average is not rounded: the same as the entry without it")

PEERS: tuple[Peer, ...] = (
    Peer(OURS, our_ema(rounding="stochastic"), stochastic=True, swap=OURS),
    Peer(
        "fastema.EMA, nearest",
        our_ema(rounding="nearest"),
        refusals={"f32/f32": _ONLY_BF16_AVERAGES, "bf16/f32": _ONLY_BF16_AVERAGES},
    ),
    Peer("fastema.Plan.lerp_", _fastema_plan),
    Peer("torch mul_/add_ loop", _loop),
    Peer("torch._foreach_lerp_", _foreach_lerp, refusals={"bf16/f32": _SAME_DTYPE_ONLY}),
    Peer(
        "torch._foreach_lerp_, casts",
        _foreach_cast,
        refusals={"f32/f32": _NOTHING_TO_CAST, "bf16/bf16": _NOTHING_TO_CAST},
    ),
    Peer(
        "AveragedModel multi_avg_fn",
        _averaged_model_multi,
        refusals={"bf16/f32": _SAME_DTYPE_ONLY},
    ),
    Peer("AveragedModel avg_fn", _averaged_model_single, rounds_weights=True),
    Peer("torch_ema", _torch_ema, module="torch_ema", swap="torch_ema store + copy_to + restore"),
    Peer("ema_pytorch", _ema_pytorch(foreach=False), module="ema_pytorch"),
    Peer("ema_pytorch foreach", _ema_pytorch(foreach=True), module="ema_pytorch"),
    Peer("timm ModelEmaV3", _timm(stochastic=False), module="timm"),
    Peer(
        "timm ModelEmaV3, stochastic",
        _timm(stochastic=True),
        module="timm",
        refusals={"f32/f32": _ONLY_BF16_AVERAGES, "bf16/f32": _ONLY_BF16_AVERAGES},
        stochastic=True,
    ),
    Peer(
        "diffusers EMAModel",
        _diffusers(foreach=False),
        module="diffusers",
        swap="diffusers store + copy_to + restore",
    ),
    Peer(
        "diffusers EMAModel foreach",
        _diffusers(foreach=True),
        module="diffusers",
        swap="diffusers store + copy_to + restore, foreach",
    ),
)

SWAPS = tuple(replace(peer, name=peer.swap) for peer in PEERS if peer.swap)
"""Those that put the average into the model for evaluation, and the weights back."""
