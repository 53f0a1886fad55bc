"""The peers of the swap: the average into the model for evaluation, and the weights back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.race.peers import OURS, Peer


@dataclass(frozen=True)
class Swapping:
    """A peer that has averaged once and can be swapped."""

    apply: Callable[[], object]
    restore: Callable[[], object]
    average: Callable[[], list[Tensor]]  # in the order of model.parameters(), before apply


def _fastema(model: nn.Module, decay: float, dtype: torch.dtype) -> Swapping:
    import fastema

    ema = fastema.EMA(model, decay, shadow_dtype=dtype)
    names = [name for name, _ in model.named_parameters()]
    ema.update()
    return Swapping(ema.apply_shadow, ema.restore, lambda: [ema.shadow[name] for name in names])


def _torch_ema(model: nn.Module, decay: float, dtype: torch.dtype) -> Swapping:
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay, use_num_updates=False)
    ema.to(dtype=dtype)

    def apply() -> None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())

    return Swapping(apply, lambda: ema.restore(model.parameters()), lambda: ema.shadow_params)


def _diffusers(foreach: bool) -> Callable[[nn.Module, float, torch.dtype], Swapping]:
    def setup(model: nn.Module, decay: float, dtype: torch.dtype) -> Swapping:
        from diffusers.training_utils import EMAModel

        ema = EMAModel(model.parameters(), decay=decay, min_decay=decay, foreach=foreach)
        ema.to(dtype=dtype)

        def apply() -> None:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())

        return Swapping(
            apply, lambda: ema.restore(list(model.parameters())), lambda: ema.shadow_params
        )

    return setup


SWAPS: tuple[Peer[Swapping], ...] = (
    Peer(OURS, _fastema),
    Peer("torch_ema store + copy_to + restore", _torch_ema, module="torch_ema"),
    Peer("diffusers store + copy_to + restore", _diffusers(foreach=False), module="diffusers"),
    Peer(
        "diffusers store + copy_to + restore, foreach", _diffusers(foreach=True), module="diffusers"
    ),
)
