"""Averages in two halves: a float32 run to the bit, of which one half is a bfloat16 checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastema

from ..support import reference
from .kinds import KINDS, all_of, unchanged
from .stored import exact, stored
from .weights import FLOATS, assert_bits, net, refresh_, snapshot, train_, values

pytestmark = pytest.mark.torch

DECAY = 0.97
SPLIT = "bf16+16"


def halves(ema: fastema.EMA, name: str, which: int = 0) -> tuple[np.ndarray, np.ndarray]:
    state = ema.state_dict()
    residual = state["residual"][which][name]
    assert residual.dtype == torch.int16
    return stored(state["shadow"][which][name]), residual.numpy().view(np.uint16)


def assert_is_split(ema: fastema.EMA, wide: fastema.EMA, which: int = 0) -> None:
    """The two halves are what a float32 average comes apart into."""
    for name in ema.averaged_names:
        high, residual = reference.split(stored(wide.shadows[which][name]))
        got = halves(ema, name, which)
        np.testing.assert_array_equal(got[0], high)
        np.testing.assert_array_equal(got[1], residual)
        assert ema.shadows[which][name].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["EMA", "three", "SWA", "PowerEMA"])
def test_it_is_a_float32_run_to_the_bit(kind: str, dtype: str) -> None:
    model = net(0, FLOATS[dtype])
    ema, wide = (KINDS[kind](model, shadow_dtype=one) for one in (SPLIT, "float32"))
    for steps in (0, 200):
        train_(model, range(steps), ema, wide)
        for which in range(len(ema.shadows)):
            assert_is_split(ema, wide, which)
    # The half that is used alone is the nearest bfloat16: half a unit in the last place at most.
    for shadow, other in zip(ema.shadows, wide.shadows, strict=True):
        for name in ema.averaged_names:
            high, value = exact(shadow[name]), exact(other[name])
            assert (np.abs(high - value) <= 2.0**-8 * np.abs(value)).all()


def test_the_high_half_is_a_checkpoint_and_all_that_a_bfloat16_model_takes() -> None:
    model = net(0, torch.bfloat16)
    ema = fastema.EMA(model, DECAY, shadow_dtype=SPLIT)
    train_(model, range(5), ema)
    before = all_of(ema)
    ready = net(9, torch.bfloat16)
    ready.load_state_dict(dict(ema.shadow))
    residuals = {
        name: entry.parts["residual"][0] for name, entry in ema._store.sets[0].items() if entry.form
    }
    bytes_of = {name: residual.numpy().tobytes() for name, residual in residuals.items()}
    with unchanged(model, ema), ema.swapped():
        assert_bits(model, snapshot(ready))
        for name, residual in residuals.items():
            assert residual.numpy().tobytes() == bytes_of[name]
        assert all_of(ema) == before


def test_from_and_to_bfloat16() -> None:
    model = net(0, torch.bfloat16)
    ema = fastema.EMA(model, DECAY)
    refresh_(model, 1)
    ema.update()
    before = values(dict(ema.shadow))
    ema.to(dtype=SPLIT)
    for name in ema.averaged_names:
        high, residual = halves(ema, name)
        np.testing.assert_array_equal(high, stored(before[name]))
        assert not residual.any()
    wide = fastema.EMA(model, DECAY, shadow_dtype="float32")
    wide.load_state_dict({**ema.to(dtype="float32").state_dict()})
    ema.to(dtype=SPLIT)
    refresh_(model, 2)
    ema.update()
    wide.update()
    assert_is_split(ema, wide)
    ema.to(dtype="bfloat16")
    for name in ema.averaged_names:
        nearest = reference.encode(exact(wide.shadow[name]), "bf16")
        np.testing.assert_array_equal(stored(ema.shadow[name]), nearest)
