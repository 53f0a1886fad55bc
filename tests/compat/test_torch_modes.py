"""Drop-in classes refuse a decay that is not a number."""

from typing import Any

import pytest
from torch import nn

import fastema
from fastema.compat import litema, swa_utils, timm, ultralytics
from fastema.compat.diffusers import EMAModel
from fastema.compat.torch_ema import ExponentialMovingAverage
from fastema.errors import ArgumentError

pytestmark = pytest.mark.torch


def build_network() -> Any:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))


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
        lambda m, d: ultralytics.ModelEMA(m, d),
        lambda m, d: litema.LitEma(m, d),
    ],
)
def test_non_numeric_decay_is_refused_with_advice(make: Any, wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="expected a number from 0 to 1") as caught:
        make(build_network(), wrong)
    takes_rules = "fastema.EMA takes the rules" in str(caught.value)
    assert takes_rules is not (wrong is None or isinstance(wrong, str))
