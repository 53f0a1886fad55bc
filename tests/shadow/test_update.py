"""Updates: schedules, several averages, what leaves the model alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema import rules
from fastema.errors import ArgumentError

from .kinds import KINDS, all_of, last, unchanged, which
from .stored import same
from .truth import Loops
from .weights import (
    Net,
    assert_same,
    net,
    refresh_,
    snapshot,
    train_,
    values,
)

pytestmark = pytest.mark.torch

# Each schedule beside its decay at update n, written out once more.
SCHEDULES = {
    "number": (0.95, lambda n: 0.95),
    "constant": (rules.constant(0.9), lambda n: 0.9),
    "zero": (0.0, lambda n: 0.0),
    "warmup": (rules.warmup(0.9), lambda n: min(0.9, (1 + n) / (10 + n))),
    "half_life": (rules.half_life(8), lambda n: 0.5 ** (1 / 8)),
    "inverse_gamma": (
        rules.inverse_gamma(0.9, inv_gamma=2.0, power=0.75, minimum=0.1),
        lambda n: min(0.9, max(0.1, 1 - (1 + (n - 1) / 2) ** -0.75)),
    ),
    "mean": (rules.inverse_gamma(0.9999, power=1.0), lambda n: 1 - 1 / n),
}


WINDOW = {"decay": rules.window(3)}


def arrays(model: Net) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_equals_a_float64_loop(schedule: str) -> None:
    decay, formula = SCHEDULES[schedule]
    model = net()
    ema = fastema.EMA(model, decay)
    loops = Loops(arrays(model), "f32", "f32")
    for n in range(1, 101):
        refresh_(model, n)
        ema.update()
        loops.step(arrays(model), 1 - formula(n))
        assert ema.num_updates == n
        assert math.isclose(ema.decay, formula(n), rel_tol=1e-12, abs_tol=1e-12)
    loops.check(ema.shadow)


@pytest.mark.parametrize("schedule", ["number", "warmup", "inverse_gamma"])
@pytest.mark.parametrize("every", [2, 3, 10])
def test_update_every_takes_the_decay_to_the_kth_power(schedule: str, every: int) -> None:
    decay, formula = SCHEDULES[schedule]
    model = net()
    ema = fastema.EMA(model, decay, update_every=every)
    loops = Loops(arrays(model), "f32", "f32")
    for n in range(1, 51):
        refresh_(model, n)
        ema.update()
        if n % every == 0:
            loops.step(arrays(model), 1 - formula(n) ** every)
    loops.check(ema.shadow)


def read_shadow(average: Any, model: Net) -> dict[str, torch.Tensor]:
    return values(last(average))


def read_state(average: Any, model: Net) -> dict[str, torch.Tensor]:
    return values(average.state_dict()["shadow"][-1])


def read_swapped(average: Any, model: Net) -> dict[str, torch.Tensor]:
    with average.swapped(**which(average)):
        return values(model)


def read_applied(average: Any, model: Net) -> dict[str, torch.Tensor]:
    average.apply_shadow(model, **which(average))
    found = values(model)
    average.restore(model)
    return found


def read_state_swapped(average: Any, model: Net) -> dict[str, torch.Tensor]:
    with average.swapped(**which(average)):
        return values(average.state_dict()["shadow"][-1])


def read_copied(average: Any, model: Net) -> dict[str, torch.Tensor]:
    other = net(999)
    average.copy_to(other, **which(average))
    return values(other)


READERS = [
    *(read_shadow, read_state, read_swapped, read_applied, read_state_swapped, read_copied),
]
WHOLE = [read_swapped, read_applied, read_copied]
"""Those that show float32 also where it is kept in two halves."""
PLAIN = ["EMA", "three", "SWA", "SMA", "PowerEMA"]
READ = [(kind, read) for kind in PLAIN for read in READERS]
READ += [(kind, read) for kind in ("split", "three split") for read in WHOLE]


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "skip"}, {"start_after": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_update_leaves_the_weights_alone(kind: str, options: dict[str, Any]) -> None:
    model = net()
    average = KINDS[kind](model, **options)
    for n in range(1, 6):
        refresh_(model, n)
        with unchanged(model):
            average.update()


def train(kind: str | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = Net()
    ema = None if kind is None else KINDS[kind](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(
            model(torch.randn(8, 3, 6, 6)), torch.randint(5, (8,))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if ema is not None:
            ema.update()
            with ema.swapped(**which(ema)), torch.no_grad():
                model.eval()(torch.ones(2, 3, 6, 6))
            model.train()
    return losses, snapshot(model)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_to_the_bit_with_and_without_an_average(kind: str) -> None:
    with_losses, with_weights = train(kind)
    losses, weights = train(None)
    assert with_losses == losses
    assert_same(with_weights, weights)


REFUSED: list[dict[str, Any]] = [
    *({"decay": d} for d in (1.0, -0.1, float("nan"), None, "fast", [], (0.9, 1.0), (0.9, None))),
    *({"update_every": every} for every in (0, 1.5, True)),
    *({"start_after": start} for start in (-1, None)),
    *({"frozen": "drop"}, {"buffers": None}, {"rounding": "up"}),
    *({"seed": seed} for seed in (-1, 2**63, 1.0, True, None)),
    *({"on_nonfinite": guard} for guard in ("ignore", None)),
    WINDOW,
]


@pytest.mark.parametrize("arguments", REFUSED, ids=str)
def test_arguments_without_a_valid_value(arguments: dict[str, object]) -> None:
    (name,) = arguments
    with pytest.raises(ArgumentError, match=name if arguments != WINDOW else "SMA"):
        fastema.EMA(net(), **arguments)


@pytest.mark.parametrize("build", [fastema.EMA, fastema.SWA, fastema.SMA, fastema.PowerEMA])
def test_arguments_that_nobody_knows(build: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="update_evry"):
        build(net(), update_evry=3)


def test_repr_says_what_it_is() -> None:
    model = net()
    ema = fastema.EMA(model, 0.9, shadow_dtype="float64")
    ema.update()
    elements = sum(p.numel() for p in model.parameters())
    for part in (f"{elements:,}", "f64", "0.9", "1 update"):
        assert part in repr(ema)
    with ema.swapped():
        assert "applied" in repr(ema)
    assert "conv.weight" in repr(ema.shadow)


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
