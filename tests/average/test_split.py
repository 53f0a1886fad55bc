"""Averages split into two halves: float32 to the bit; the high half is a bfloat16 checkpoint."""

from typing import Any

import numpy as np
import pytest
import torch

import fastema

from ..support import reference
from ..support.states import nested
from .kinds import KINDS, assert_unchanged
from .stored import exact, stored
from .weights import FLOATS, assert_bits, net, snapshot, train_

pytestmark = pytest.mark.torch

SPLIT = "bf16+16"


def assert_is_split(average: Any, wide: Any) -> None:
    """Assert that the halves are the split of a float32 average."""
    residuals = nested(average.state_dict())["residual"]
    for i, shadow in enumerate(average.shadows):
        for name in average.averaged_names:
            high, low = reference.split(stored(wide.shadows[i][name]))
            np.testing.assert_array_equal(stored(shadow[name]), high)
            assert residuals[i][name].dtype == torch.int16
            np.testing.assert_array_equal(residuals[i][name].numpy().view(np.uint16), low)
            assert shadow[name].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["EMA", "three", "SWA", "PowerEMA"])
def test_split_average_equals_a_float32_one_to_the_bit(kind: str, dtype: str) -> None:
    model = net(0, FLOATS[dtype])
    average, wide = (KINDS[kind](model, shadow_dtype=one) for one in (SPLIT, "float32"))
    for steps in (0, 200):
        train_(model, range(steps), average, wide)
        assert_is_split(average, wide)
    # The high half alone is within half a unit in the last place of a bfloat16.
    for shadow, other in zip(average.shadows, wide.shadows, strict=True):
        for name in average.averaged_names:
            high, value = exact(shadow[name]), exact(other[name])
            assert (np.abs(high - value) <= 2.0**-8 * np.abs(value)).all()


def test_bfloat16_model_loads_and_swaps_only_the_high_half() -> None:
    model, ready = net(0, torch.bfloat16), net(9, torch.bfloat16)
    ema = fastema.EMA(model, 0.97, shadow_dtype=SPLIT)
    train_(model, range(5), ema)
    ready.load_state_dict(dict(ema.shadow))
    residuals = {n: e.parts["residual"][0] for n, e in ema._memory.sets[0].items() if e.form}
    held = snapshot(residuals)
    with assert_unchanged(model, ema), ema.swapped():
        assert_bits(model, snapshot(ready))
        assert_bits(residuals, held)
