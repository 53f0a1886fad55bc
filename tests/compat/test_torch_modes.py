"""Every class of modules and lists with what torch can switch on: TorchScript, swapped tensors."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.compat import composer, litema, mmengine, swa_utils, timm, ultralytics
from fastema.compat.diffusers import EMAModel
from fastema.compat.torch_ema import ExponentialMovingAverage
from fastema.errors import ArgumentError

pytestmark = pytest.mark.torch

# How an average is made of a model, updated, and where its module is.


def network() -> Any:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))


# -- torch.utils.swap_tensors ----------------------------------------------------------------------


@pytest.fixture
def swapping() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.usefixtures("swapping")
def test_diffusers_average_lets_a_model_convert_by_swapping() -> None:
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    ema, truth = EMAModel(model.parameters(), decay=0.75, min_decay=0.75), None
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5)
        ema.step(model.parameters())
        weight = model[0].weight.detach().double()
        truth = weight if truth is None else 0.75 * truth + 0.25 * weight
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        model.double().float()
        ema.restore(model.parameters())
    assert truth is not None
    torch.testing.assert_close(ema.shadow_params[0].double(), truth, rtol=1e-6, atol=1e-7)


# -- decays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [fastema.rules.warmup(0.99), "0.9", None, lambda n: 0.9])
@pytest.mark.parametrize(
    "make",
    [
        lambda m, d: swa_utils.get_ema_multi_avg_fn(d),
        lambda m, d: swa_utils.get_ema_avg_fn(d),
        lambda m, d: timm.ModelEma(m, d).update(m),
        lambda m, d: timm.ModelEmaV2(m, d).update(m),
        lambda m, d: timm.ModelEmaV3(m, d, use_warmup=True).update(m, step=5),
        lambda m, d: ExponentialMovingAverage(m.parameters(), d),
        lambda m, d: EMAModel(m.parameters(), d),
        lambda m, d: EMAModel(m.parameters(), 0.9, min_decay=d),
        lambda m, d: mmengine.ExponentialMovingAverage(m, d),
        lambda m, d: ultralytics.ModelEMA(m, d),
        lambda m, d: litema.LitEma(m, d),
        lambda m, d: composer.compute_ema(m, copy.deepcopy(m), d),
    ],
)
def test_a_decay_that_is_no_number_is_refused_in_words(make: Any, wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="expected a number from 0 to 1") as caught:
        make(network(), wrong)
    takes_rules = "fastema.EMA takes the rules" in str(caught.value)
    assert takes_rules is not (wrong is None or isinstance(wrong, str))
