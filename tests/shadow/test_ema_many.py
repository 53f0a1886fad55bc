"""Several averages in one pass over the weights: each is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastema
from fastema import rules

from .kinds import all_of, unchanged
from .stored import same
from .weights import net, refresh_, train_

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
