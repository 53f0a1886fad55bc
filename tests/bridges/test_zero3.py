"""Parameters of DeepSpeed's ZeRO-3 are refused at every entrance, before anything is written."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

import fastema
from fastema.bridges.registry import describe
from fastema.compat.ema_pytorch import EMA as PytorchEMA
from fastema.compat.litema import LitEma
from fastema.compat.swa_utils import AveragedModel, get_ema_multi_avg_fn
from fastema.compat.timm import ModelEmaV3
from fastema.compat.torch_ema import ExponentialMovingAverage
from fastema.errors import BridgeError

from ..support.zero3 import gather, partition

pytestmark = pytest.mark.torch


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def empty(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.empty(0) for name in named(model)}


ENTRANCES: dict[str, Callable[[Any], Any]] = {
    "EMA": lambda model: fastema.EMA(model),
    "SWA": lambda model: fastema.SWA(model),
    "SMA": lambda model: fastema.SMA(model, window=2),
    "PowerEMA": lambda model: fastema.PowerEMA(model),
    "offloaded": lambda model: fastema.EMA(model, offload=True),
    "stages": lambda model: fastema.EMA([model]),
    "iterator": lambda model: fastema.EMA(model.parameters()),
    "dict": lambda model: fastema.EMA(named(model)),
    "Plan, first": lambda model: fastema.Plan(named(model), empty(model)),
    "Plan, second": lambda model: fastema.Plan(empty(model), named(model)),
    "copy_": lambda model: fastema.copy_(empty(model), named(model)),
    "lerp_": lambda model: fastema.lerp_(named(model), empty(model), 0.5),
    "swap_": lambda model: fastema.swap_(empty(model), named(model)),
    "AveragedModel": AveragedModel,
    "a function of torch's": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9)
    ),
    "timm": ModelEmaV3,
    "ema_pytorch": PytorchEMA,
    "LitEma": LitEma,
}


@pytest.mark.parametrize("state", ["partitioned", "gathered"])
@pytest.mark.parametrize("name", ENTRANCES)
def test_zero3_parameters_are_refused_by_name(name: str, state: str) -> None:
    model = build()
    partition(model)
    if state == "gathered":
        gather(model)
    with pytest.raises(BridgeError) as refused:
        ENTRANCES[name](model)
    message = str(refused.value)
    for part in ("shape [5, 3]", "several ranks", "ZeRO stage 1 or 2", "p.ds_tensor"):
        assert part in message
    assert ("gathered now" in message) == (state == "gathered")
    assert message.startswith(("0: " if name == "iterator" else "0.weight: ", "0.0.weight"))


def test_lists_of_parameters_take_gathered_ones_only() -> None:
    model = build()
    partition(model)
    with pytest.raises(BridgeError, match="number 0 of the list: a parameter of shape"):
        ExponentialMovingAverage(model.parameters(), 0.9)
    gather(model)
    ema = ExponentialMovingAverage(model.parameters(), 0.9)
    ema.update()


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda ema, model: ema.update(model),
    "apply_shadow": lambda ema, model: ema.apply_shadow(model),
    "copy_to": lambda ema, model: ema.copy_to(model),
}


@pytest.mark.parametrize("call", CALLS)
def test_average_of_whole_weights_refuses_a_model_partitioned_since(call: str) -> None:
    model = build()
    ema = fastema.EMA(model, decay=0.5)
    before = {name: one.clone() for name, one in ema.shadow.items()}
    partition(model)
    with pytest.raises(
        BridgeError, match=r"0\.weight: a parameter of shape \[5, 3\] under DeepSpeed"
    ):
        CALLS[call](ema, model)
    assert ema.num_updates == 0
    assert not ema.applied
    assert all(torch.equal(one, before[name]) for name, one in ema.shadow.items())


def test_parts_and_skipped_parameters_are_averaged_as_the_error_says() -> None:
    model = build()
    partition(model)
    parts = {name: one.ds_tensor for name, one in named(model).items()}
    ema = fastema.EMA(parts, decay=0.5)
    raw = {name: one.clone() for name, one in parts.items()}
    for one in parts.values():
        one.add_(1)
    ema.update()
    for name, one in ema.shadow.items():
        torch.testing.assert_close(one, raw[name] + 0.5)
    policy = {**dict.fromkeys(named(model), "skip"), "1.running*": "average"}
    assert fastema.EMA(model, policy=policy).averaged_names == {"1.running_mean", "1.running_var"}
    gather(model)
    for one in named(model).values():
        assert describe(one.data).shape == one.shape


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    known = named(model)
    return {name: one for name, one in model.state_dict().items() if name in known}


HIDDEN: dict[str, Callable[[Any], Any]] = {
    "EMA": lambda model: fastema.EMA(state(model)),
    "SMA": lambda model: fastema.SMA(state(model), window=2),
    "offloaded": lambda model: fastema.EMA(state(model), offload=True),
    "data": lambda model: fastema.EMA([one.data for one in model.parameters()]),
    "Plan": lambda model: fastema.Plan(empty(model), state(model)),
    "copy_": lambda model: fastema.copy_(empty(model), state(model)),
    "torch's AveragedModel": lambda model: swa_utils.AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9)
    ),
}


def make_averages_twice(entrance: Callable[[Any], Any], model: nn.Module) -> None:
    average = entrance(model)
    if isinstance(average, swa_utils.AveragedModel):
        average.update_parameters(model)  # the first one copies
        average.update_parameters(model)


@pytest.mark.parametrize("name", HIDDEN)
def test_tensors_that_are_all_empty_are_refused_without_a_sign_of_zero3(name: str) -> None:
    model = build()
    partition(model)
    with pytest.raises(BridgeError, match=r"shape \[0\]. DeepSpeed's ZeRO-3 may have partitioned"):
        make_averages_twice(HIDDEN[name], model)


@pytest.mark.parametrize("loaded", [False, True])
def test_single_empty_tensor_is_refused_only_where_zero3_partitioned_parameters(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"w": torch.arange(3.0), "lora.a": torch.empty(0)}
    zero = ModuleType("deepspeed.runtime.zero.partition_parameters")
    zero.Init = type("Init", (), {"param_id": 0})  # type: ignore[attr-defined]
    if loaded:
        zero.Init.param_id = 2
    monkeypatch.setitem(sys.modules, zero.__name__, zero)
    if loaded:
        with pytest.raises(BridgeError, match=r"'lora.a' of 2 tensors .* has partitioned"):
            fastema.EMA(weights)
        ema = fastema.EMA(weights, policy={"lora.a": "skip"})
    else:
        ema = fastema.EMA(weights, decay=0.5)
    ema.update()
    assert "w" in ema.shadow
