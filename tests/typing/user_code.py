"""What users write: checked by mypy and pyright in their strict modes, and not run."""

import numpy as np
import torch
from torch import Tensor, nn

import fastema
from fastema import rules
from fastema.checkpoint import Conversion, convert, inspect, load, load_into, save
from fastema.compat.swa_utils import AveragedModel, get_ema_multi_avg_fn
from fastema.compat.timm import ModelEmaV3
from fastema.compat.torch_ema import ExponentialMovingAverage
from fastema.errors import FastemaError, LayoutError
from fastema.lightning import EMACallback
from fastema.tracking import MetricSmoother, SimpleMovingAverage


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def train(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    ema = fastema.EMA(model, decay=rules.warmup(0.999), shadow_dtype="float32", offload="skip")
    ema.follow(optimizer, update_if=lambda: True)
    ema.update(steps=2)
    with ema.swapped() as held:
        held.layer.weight.sum()
    with ema.swapped(which=0) as same:
        same.forward(torch.ones(1, 2))
    ema.apply_shadow()
    ema.restore()
    count: int = ema.num_updates
    names: set[str] = ema.averaged_names
    tensors: dict[str, Tensor] = dict(ema.shadow)
    ema.load_state_dict(ema.state_dict(), schedule="mine")
    model.load_state_dict(ema.model_state_dict())
    save(ema, "ema.safetensors", wait=False)
    load_into(ema, "ema.safetensors")
    print(ema.report(), ema.decay, ema.version, count, names)
    return tensors


def averages(model: Model) -> None:
    swa = fastema.SWA(model, start_after=10)
    sma = fastema.SMA(model, window=10)
    power = fastema.PowerEMA(model, sigma_rels=(0.05, 0.1))
    several = fastema.EMA(model, decay=(0.9, rules.half_life(100)), policy={"*.bias": "copy"})
    for one in (swa, sma, power, several):
        one.update()
    fastema.update_bn([torch.ones(1, 2)], model)
    fastema.posthoc.save_snapshot(power, "snapshots")
    found = fastema.posthoc.synthesize("snapshots", sigma_rel=0.15, step=7, into=model)
    print(found.error)


def wrong_options(model: Model) -> None:
    """Each comment is an error itself if a type checker does not find the wrong option."""
    fastema.EMA(model, shadow_dtyp="float32")  # type: ignore[call-arg]
    fastema.EMA(model, update_every="2")  # type: ignore[arg-type]
    fastema.SWA(model, frozen="melt")  # type: ignore[arg-type]
    fastema.SMA(model, 10, capturable=1)  # type: ignore[arg-type]
    fastema.PowerEMA(model, policy={"*.bias": "melt"})  # type: ignore[dict-item]
    EMACallback(on_nonfinite="stop")  # type: ignore[arg-type]


def arrays_and_files() -> None:
    weights = {"w": np.ones(3)}
    with fastema.EMA(weights, decay=0.9).swapped() as held:
        held["w"].sum()
    plan = fastema.Plan({"w": np.zeros(3)}, weights)
    plan.lerp_(0.1)
    fastema.lerp_([np.zeros(3)], [np.ones(3)], 0.1)

    try:
        done: Conversion = convert("in.pt", "out.safetensors", to="safetensors")
        print(done.lost, load("out.safetensors").names, inspect("out.safetensors").average)
    except (LayoutError, FastemaError) as error:
        print(error)


def in_place_of_others(model: Model) -> None:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    averaged.update_parameters(model)
    ModelEmaV3(model, decay=0.999).update(model, step=1)
    ema = ExponentialMovingAverage(model.parameters(), decay=0.995)
    with ema.average_parameters():
        model.forward(torch.ones(1, 2))
    MetricSmoother().update({"loss": 0.5})
    mean: float = SimpleMovingAverage(10).update(1.0)
    print(mean)
