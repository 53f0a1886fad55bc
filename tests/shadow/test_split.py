"""Averages in two halves: a float32 run to the bit, of which one half is a bfloat16 checkpoint."""

from typing import Any

import numpy as np
import pytest
import torch

import fastema

from ..support import reference
from .kinds import KINDS, unchanged
from .stored import exact, stored
from .weights import FLOATS, assert_bits, net, snapshot, train_

pytestmark = pytest.mark.torch

SPLIT = "bf16+16"


def assert_is_split(average: Any, wide: Any) -> None:
    """The two halves are what a float32 average comes apart into."""
    residuals = average.state_dict()["residual"]
    for i, shadow in enumerate(average.shadows):
        for name in average.averaged_names:
            high, low = reference.split(stored(wide.shadows[i][name]))
            np.testing.assert_array_equal(stored(shadow[name]), high)
            assert residuals[i][name].dtype == torch.int16
            np.testing.assert_array_equal(residuals[i][name].numpy().view(np.uint16), low)
            assert shadow[name].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["EMA", "three", "SWA", "PowerEMA"])
def test_it_is_a_float32_run_to_the_bit(kind: str, dtype: str) -> None:
    model = net(0, FLOATS[dtype])
    average, wide = (KINDS[kind](model, shadow_dtype=one) for one in (SPLIT, "float32"))
    for steps in (0, 200):
        train_(model, range(steps), average, wide)
        assert_is_split(average, wide)
    # The half that is used alone is the nearest bfloat16: half a unit in the last place at most.
    for shadow, other in zip(average.shadows, wide.shadows, strict=True):
        for name in average.averaged_names:
            high, value = exact(shadow[name]), exact(other[name])
            assert (np.abs(high - value) <= 2.0**-8 * np.abs(value)).all()


def test_the_high_half_is_a_checkpoint_and_all_that_a_bfloat16_model_takes() -> None:
    model, ready = net(0, torch.bfloat16), net(9, torch.bfloat16)
    ema = fastema.EMA(model, 0.97, shadow_dtype=SPLIT)
    train_(model, range(5), ema)
    ready.load_state_dict(dict(ema.shadow))
    residuals = {n: e.parts["residual"][0] for n, e in ema._store.sets[0].items() if e.form}
    held = snapshot(residuals)
    with unchanged(model, ema), ema.swapped():
        assert_bits(model, snapshot(ready))
        assert_bits(residuals, held)
