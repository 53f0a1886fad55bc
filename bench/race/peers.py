"""The peers: every way to average weights that the benchmarks and the tests compare.

Each entry of `PEERS` is set up from a model and a decay, and gives a call that does one update at
that constant decay. The table `tests.support.peers`, shared with the tests, knows how to build,
update and read a peer's class.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.peers import PEERS as AVERAGES


@dataclass(frozen=True)
class PeerCalls:
    """The calls of a peer that was set up on one model."""

    update: Callable[[], object]
    average: Callable[[], list[Tensor]]  # in the order of model.parameters()
    apply: Callable[[], object] | None = None  # put the average into the model
    restore: Callable[[], object] | None = None  # restore the weights


Setup = Callable[[nn.Module, float, torch.dtype], PeerCalls]
"""Starts averaging: ``setup(model, decay, average_dtype)``."""


@dataclass(frozen=True)
class Refusal:
    """Why a peer does not run a mix of dtypes.

    `error` is a part of the message that the peer raises for this mix. It is None if the peer would
    run but duplicate another entry.
    """

    reason: str
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Peer:
    """One row of a table.

    Parameters
    ----------
    name
        Name in reports.
    setup
        ``setup(model, decay, average_dtype)`` starts averaging the model.
    module
        Top-level module that must be installed; None if torch alone is enough.
    refusals
        Mix of dtypes -> why the peer does not run it.
    rounds_weights
        Whether ``(1 - decay) * weight`` is rounded to bf16 for an f32 average of a bf16 model.
    stochastic
        Whether bf16 averages are rounded stochastically.
    swap
        Name in races of swaps; empty if the peer does not take part.
    """

    name: str
    setup: Setup
    module: str | None = None
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    rounds_weights: bool = False
    stochastic: bool = False
    swap: str = ""

    def missing(self) -> str | None:
        """Return why the peer cannot run in this environment, or None if it can."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def copy_parameters(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Return detached copies of the parameters in `dtype`."""
    return [p.detach().to(dtype, copy=True) for p in model.parameters()]


def _loop(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
    averages = copy_parameters(model, dtype)

    @torch.no_grad()
    def update() -> None:
        for average, weight in zip(averages, model.parameters(), strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)

    return PeerCalls(update, lambda: averages)


def _foreach_lerp(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
    averages = copy_parameters(model, dtype)
    weights = [p.detach() for p in model.parameters()]
    return PeerCalls(lambda: torch._foreach_lerp_(averages, weights, 1 - decay), lambda: averages)


def _foreach_cast(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
    averages = copy_parameters(model, dtype)
    weights = [p.detach() for p in model.parameters()]

    def update() -> None:
        torch._foreach_lerp_(averages, [w.to(dtype) for w in weights], 1 - decay)

    return PeerCalls(update, lambda: averages)


Options = Callable[[nn.Module, float, torch.dtype], dict[str, Any]]
"""Returns options for a peer's class: ``options(model, decay, average_dtype)``."""


def _setup_class(name: str, options: Options, *, copies_first: bool = False) -> Setup:
    """Return the set-up of a peer's own class, as described in the table of the tests.

    Parameters
    ----------
    name
        Key in `tests.support.peers.PEERS`.
    options
        Returns options of the class that keep the decay constant.
    copies_first
        Whether the first update only copies the weights. Set-up then runs it.
    """
    peer = AVERAGES[name]

    def setup(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
        average = peer.make(peer.module("theirs"), model, **options(model, decay, dtype))
        peer.convert(average, dtype)
        names = [name for name, _ in model.named_parameters()]

        def averages() -> list[Tensor]:
            found = peer.averages(average, model)
            return [found[name] for name in names]

        if copies_first:
            peer.update(average, model, 0)
        update = partial(peer.update, average, model, 1)
        if not hasattr(average, "store"):
            return PeerCalls(update, averages)
        weights = list(model.parameters())

        def apply() -> None:
            average.store(weights)
            average.copy_to(weights)

        return PeerCalls(update, averages, apply, partial(average.restore, weights))

    return setup


def _swa(kind: str) -> Setup:
    def options(model: nn.Module, decay: float, dtype: torch.dtype) -> dict[str, Any]:
        return {"kind": kind, "decay": decay}

    return _setup_class(f"swa_utils {kind}", options, copies_first=True)


def _torch_ema(model: nn.Module, decay: float, dtype: torch.dtype) -> dict[str, Any]:
    return {"decay": decay, "use_num_updates": False}


def _ema_pytorch(foreach: bool) -> Setup:
    def options(model: nn.Module, decay: float, dtype: torch.dtype) -> dict[str, Any]:
        # beta == min_value disables the warm-up.
        constant = {"beta": decay, "min_value": decay, "update_after_step": 0}
        casts = any(weight.dtype != dtype for weight in model.parameters())
        return {**constant, "use_foreach": foreach, "coerce_dtype": casts}

    return _setup_class("ema_pytorch EMA", options, copies_first=True)


def _timm(stochastic: bool) -> Setup:
    def options(model: nn.Module, decay: float, dtype: torch.dtype) -> dict[str, Any]:
        return {"decay": decay, "dtype": dtype, "stochastic_rounding": stochastic}

    return _setup_class("timm ModelEmaV3", options)


def _diffusers(foreach: bool) -> Setup:
    def options(model: nn.Module, decay: float, dtype: torch.dtype) -> dict[str, Any]:
        # The decay always warms up, except with min_decay == decay.
        return {"decay": decay, "min_decay": decay, "foreach": foreach}

    return _setup_class("diffusers", options, copies_first=True)


def setup_ema(**options: Any) -> Setup:
    """Return a set-up that builds `fastema.EMA` with these options."""

    def setup(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
        import fastema

        ema = fastema.EMA(model, decay, **{"shadow_dtype": dtype, **options})
        names = [name for name, _ in model.named_parameters()]
        return PeerCalls(
            ema.update, lambda: [ema.shadow[name] for name in names], ema.apply_shadow, ema.restore
        )

    return setup


def _fastema_plan(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
    import fastema

    averages = copy_parameters(model, dtype)
    plan = fastema.Plan(averages, [p.detach() for p in model.parameters()])
    return PeerCalls(lambda: plan.lerp_(1 - decay), lambda: averages)


OURS = "fastema.EMA"

_SAME_DTYPE_ONLY = Refusal(
    "raises: lerp needs the average and the weights in one dtype", error="expected dtype"
)
_NOTHING_TO_CAST = Refusal("nothing to cast: the same as torch._foreach_lerp_")
_ONLY_BF16_AVERAGES = Refusal("an f32 average is not rounded: the same as the entry without it")

PEERS: tuple[Peer, ...] = (
    Peer(OURS, setup_ema(rounding="stochastic"), stochastic=True, swap=OURS),
    Peer(
        "fastema.EMA, nearest",
        setup_ema(rounding="nearest"),
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
        _swa("ema multi"),
        refusals={"bf16/f32": _SAME_DTYPE_ONLY},
    ),
    Peer("AveragedModel avg_fn", _swa("ema"), rounds_weights=True),
    Peer(
        "torch_ema",
        _setup_class("torch_ema", _torch_ema),
        module="torch_ema",
        swap="torch_ema store + copy_to + restore",
    ),
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
"""The peers that can put the average into the model for evaluation and restore the weights."""
