"""Writes to a model that holds the average, and autograd graphs on both sides of a swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastema
from fastema.errors import StateError

from .kinds import KINDS, trained_kind, unchanged, which
from .weights import Net, net, refresh_, train_

pytestmark = pytest.mark.torch

Write = Callable[[Net], object]


def trained(dtype: Any = None, shadow_dtype: Any = None) -> tuple[Net, fastema.EMA[Net]]:
    model = net(0, dtype)
    ema = fastema.EMA(model, 0.5, shadow_dtype=shadow_dtype)
    train_(model, (1, 2), ema)
    refresh_(model, 3)
    return model, ema


def step(model: Net) -> None:
    """One step of training."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dtype = model.conv.weight.dtype
    model(torch.randn(4, 3, 6, 6, dtype=dtype)).square().mean().backward()
    optimizer.step()


WRITES: dict[str, Write] = {
    "training step": step,
    "load_state_dict": lambda model: model.load_state_dict(net(9).state_dict()),
    "one tensor": lambda model: model.head.weight.detach().mul_(2),
}

DTYPES = [("f32", None), ("bf16", "f32"), ("bf16", "bf16+16"), ("f32", "f64")]
NAMES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64, "bf16+16": "bf16+16"}


def in_a_block(model: Net, ema: fastema.EMA[Net], what: str) -> None:
    with ema.swapped():
        WRITES[what](model)


def between_calls(model: Net, ema: fastema.EMA[Net], what: str) -> None:
    ema.apply_shadow()
    WRITES[what](model)
    ema.restore()


def in_a_decorated_function(model: Net, ema: fastema.EMA[Net], what: str) -> None:
    @ema.swapped()
    def evaluate() -> int:
        WRITES[what](model)
        return 1

    evaluate()


@pytest.mark.parametrize("how", [in_a_block, between_calls, in_a_decorated_function])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("what", WRITES)
def test_weights_written_meanwhile_raise_once_the_raw_ones_are_back(
    what: str, dtypes: tuple[str, str | None], how: Callable[..., None]
) -> None:
    dtype, shadow = dtypes
    model, ema = trained(NAMES[dtype], shadow and NAMES[shadow])
    now_holds = r"(?s)now holds what was written:.*'head\.weight'"
    with unchanged(model), pytest.raises(StateError, match=now_holds):
        how(model, ema, what)
    assert not ema.applied
    with unchanged(model, ema), ema.swapped():
        pass
    ema.update()


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_moving_is_no_writing(kind: str) -> None:
    model = net(0)
    average = trained_kind(kind, model)
    with unchanged(model, average), average.swapped(**which(average)):
        model.eval()
        model(torch.randn(2, 3, 6, 6)).sum().backward()
        model.state_dict()
        model.requires_grad_(False).requires_grad_(True)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        average.state_dict()


# -- autograd -------------------------------------------------------------------------------------


def output(model: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, model.head.weight).square().sum()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_graph_from_before_the_block_goes_on_after_it(dtypes: tuple[str, str | None]) -> None:
    """Also where statistics were written in the block."""
    dtype, shadow = dtypes
    model, ema = trained(NAMES[dtype], shadow and NAMES[shadow])
    x = torch.randn(3, 12, dtype=NAMES[dtype], requires_grad=True)
    (expected,) = torch.autograd.grad(output(model, x), x)
    for statistics in (False, True):
        loss = output(model, x)
        for _ in range(2):
            with ema.swapped():
                output(model, x)
                if statistics:
                    fastema.update_bn([torch.randn(8, 3, 6, 6, dtype=NAMES[dtype])], model)
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("later", range(5))
def test_a_graph_from_the_block_raises_after_it(later: int) -> None:
    """Also once training has counted on: its counter never comes to where the block's was."""
    model, ema = trained()
    x = torch.randn(3, 12, requires_grad=True)
    with ema.swapped():
        loss = output(model, x)
    with torch.no_grad():
        for _ in range(later):
            model.head.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
