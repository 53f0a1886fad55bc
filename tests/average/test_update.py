"""Updates: several averages in one, training unaffected, invalid arguments refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastema
from fastema import rules
from fastema.errors import ArgumentError

from .kinds import KINDS, assert_unchanged, which
from .stored import is_same
from .weights import Net, assert_same, net, refresh_, snapshot, train_

pytestmark = pytest.mark.torch


def train(kind: str | None, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = Net()
    ema = None if kind is None else KINDS[kind](model, **options)
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
            with assert_unchanged(model):
                ema.update()
            with ema.swapped(**which(ema)), torch.no_grad():
                model.eval()(torch.ones(2, 3, 6, 6))
            model.train()
    return losses, snapshot(model)


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "skip"}, {"start_after": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_with_an_average_equals_training_without_to_the_bit(
    kind: str, options: dict[str, Any]
) -> None:
    with_losses, with_weights = train(kind, **options)
    losses, weights = train(None)
    assert with_losses == losses
    assert_same(with_weights, weights)


WINDOW = {"decay": rules.window(3)}
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
def test_invalid_arguments_are_refused_by_name(arguments: dict[str, object]) -> None:
    (name,) = arguments
    with pytest.raises(ArgumentError, match=name if arguments != WINDOW else "SMA"):
        fastema.EMA(net(), **arguments)


@pytest.mark.parametrize("build", [fastema.EMA, fastema.SWA, fastema.SMA, fastema.PowerEMA])
def test_unknown_arguments_are_refused(build: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="update_evry"):
        build(net(), update_evry=3)


DECAYS = (0.9, 0.99, 0.5)
MIXED = (
    *(0.9, rules.cumulative_mean(), rules.power(0.1), rules.warmup(0.99)),
    *(rules.debiased(rules.constant(0.95)), rules.debiased(rules.warmup(0.999))),
)


def assorted_weights() -> dict[str, torch.Tensor]:
    """Return tensors whose dtypes, axis orders and gaps do not fit into one table."""
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
    "options", [{}, {"update_every": 3}, {"start_after": 4, "update_every": 2}], ids=str
)
@pytest.mark.parametrize("several", [DECAYS, MIXED], ids=["decays", "mixed"])
def test_several_averages_equal_one_run_each_bitwise(several: Any, options: dict[str, Any]) -> None:
    weights = assorted_weights()
    together, *alone = (
        fastema.EMA(weights, one, rounding="nearest", **options) for one in (several, *several)
    )
    for step in range(1, 20):
        train_(weights, [step], together, *alone)
        assert together.decay == tuple(one.decay for one in alone)
    for one, shadow in zip(alone, together.shadows, strict=True):
        assert is_same(one.shadow, shadow)
