"""Several averages in one pass over the weights: each is what it is alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fastema
from fastema import rules
from fastema.errors import ArgumentError, CheckpointError

from .kinds import all_of, unchanged
from .stored import Specified, same, stored
from .weights import BUFFERS, net, refresh_, train_

pytestmark = pytest.mark.torch

DECAYS = (0.9, 0.99, 0.5)
MIXED = (
    *(0.9, rules.cumulative_mean(), rules.power(0.1), rules.warmup(0.99)),
    *(rules.debiased(rules.constant(0.95)), rules.debiased(rules.warmup(0.999))),
)


def assorted(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Dtypes, orders of axes and gaps that no one table holds."""
    weights = {
        "f32": torch.empty(1001),
        "f32 transposed": torch.empty(30, 70).t(),
        "f64": torch.empty(77, dtype=torch.float64),
        "bf16": torch.empty(3000, dtype=torch.bfloat16),
        "bf16 gaps": torch.empty(500, dtype=torch.bfloat16)[::3],
        "f16": torch.empty(8, 9, dtype=torch.float16),
        "c64": torch.empty(65, dtype=torch.complex64),
        "scalar": torch.empty(()),
        "empty": torch.empty(0, 5),
        "count": torch.empty(3, dtype=torch.int64),
    }
    refresh_(weights, 0)
    return weights


@pytest.mark.parametrize(
    "options", [{}, {"update_every": 3}, {"start_after": 4, "update_every": 2}]
)
@pytest.mark.parametrize("several", [DECAYS, MIXED], ids=["decays", "mixed"])
def test_each_is_to_the_bit_what_it_is_alone(several: Any, options: dict[str, Any]) -> None:
    weights = assorted()
    together, *alone = (
        fastema.EMA(weights, one, rounding="nearest", **options) for one in (several, *several)
    )
    for step in range(1, 20):
        refresh_(weights, step)
        for one in (together, *alone):
            one.update()
        assert together.decay == tuple(one.decay for one in alone)
    for one, shadow in zip(alone, together.shadows, strict=True):
        assert same(one.shadow, shadow)


def test_each_has_random_bits_of_its_own() -> None:
    weights = {"w": torch.randn(5000).bfloat16()}
    ema = fastema.EMA(weights, (0.99, 0.99, 0.9), seed=4)
    decays = (0.99, 0.99, 0.9)
    specified = [Specified(one["w"], "w", which=k, seed=4) for k, one in enumerate(ema.shadows)]
    for step in range(1, 6):
        refresh_(weights, step)
        ema.update()
        for one, decay in zip(specified, decays, strict=True):
            one.update(weights["w"], 1 - decay, step)
    for one, shadow in zip(specified, ema.shadows, strict=True):
        one.check(shadow["w"])
    assert not same(ema.shadows[0], ema.shadows[1])


def test_one_in_a_sequence_is_one() -> None:
    weights = assorted()
    ema = fastema.EMA(weights, (0.9,))
    alone = fastema.EMA(weights, 0.9)
    refresh_(weights, 1)
    ema.update()
    alone.update()
    assert ema.decay == 0.9
    assert same(ema.shadow, alone.shadow)


def test_copied_buffers_are_in_all_of_them_and_take_memory_once() -> None:
    model = net()
    ema = fastema.EMA(model, DECAYS)
    train_(model, range(1, 4), ema)
    buffers = dict(model.named_buffers())
    for shadow in ema.shadows:
        assert BUFFERS.issubset(shadow)
        for name in BUFFERS:
            assert torch.equal(shadow[name], buffers[name])
            assert shadow[name].data_ptr() == ema.shadows[0][name].data_ptr()
    pointers = {shadow["conv.weight"].data_ptr() for shadow in ema.shadows}
    assert len(pointers) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1, 2, -1])
def test_one_is_applied_and_the_others_stay(which: int, dtype: torch.dtype) -> None:
    model = net(0, dtype)
    ema = fastema.EMA(model, DECAYS, shadow_dtype="float32")
    train_(model, range(1, 6), ema)
    before = all_of(ema)

    def others() -> list[int]:
        rest = [shadow for i, shadow in enumerate(ema.shadows) if i != which % 3]
        return [shadow["conv.weight"].data_ptr() for shadow in rest]

    places, mean = others(), ema.shadows[which]["conv.weight"].clone()
    for _ in range(2):
        with unchanged(model, ema), ema.swapped(which=which):
            held = model.conv.weight.detach()
            torch.testing.assert_close(held.float(), mean, rtol=2.0**-8, atol=0)
            assert dtype == torch.bfloat16 or torch.equal(held, mean)
            assert all_of(ema) == before
            # Those that are not in the model are seen where they are, not as copies.
            assert others() == places


def test_one_alone_may_be_named() -> None:
    model = net()
    ema = fastema.EMA(model, 0.9)
    refresh_(model, 1)
    for which in (0, -1, None):
        with unchanged(model, ema), ema.swapped(which=which):
            assert ema.applied
    with pytest.raises(ArgumentError, match="which=1"):
        ema.apply_shadow(which=1)


@pytest.mark.parametrize("applied", [None, 1])
def test_saved_and_resumed(applied: int | None) -> None:
    weights, twins = assorted(), assorted()
    ema = fastema.EMA(weights, MIXED)
    train_(weights, range(1, 6), ema)
    with nullcontext() if applied is None else ema.swapped(which=applied):
        state = ema.state_dict()
    resumed = fastema.EMA(twins, (0.5,) * len(MIXED))
    resumed.load_state_dict(state)
    assert resumed.schedule == ema.schedule
    train_(weights, range(6, 11), ema)
    train_(twins, range(6, 11), resumed)
    assert all_of(resumed) == all_of(ema)
    for rules_ in (MIXED[:-1], 0.9):
        with pytest.raises(CheckpointError):
            fastema.EMA(twins, rules_).load_state_dict(state)


def test_another_dtype_for_all_of_them() -> None:
    model = net()
    ema = fastema.EMA(model, DECAYS)
    train_(model, range(1, 4), ema)
    before = [{name: stored(shadow[name]) for name in ema.averaged_names} for shadow in ema.shadows]
    ema.to(dtype="float64")
    for shadow, was in zip(ema.shadows, before, strict=True):
        for name in ema.averaged_names:
            assert shadow[name].dtype == torch.float64
            assert (stored(shadow[name]) == was[name]).all()
    alone = [fastema.EMA(model, decay, shadow_dtype="float64") for decay in DECAYS]
    for one, shadow in zip(alone, ema.shadows, strict=True):
        one.load_state_dict({**one.state_dict(), "shadow": [dict(shadow)]})
    for average in (ema, *alone):
        average.update()
    for one, shadow in zip(alone, ema.shadows, strict=True):
        assert same(one.shadow, shadow)
