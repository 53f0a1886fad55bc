"""Models of many small tensors: the work of every call is linear in their number."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import fastema

from .support.work import grows_linearly

pytestmark = pytest.mark.torch

WEIGHTS: dict[str, Callable[[int], Any]] = {
    "module": lambda count: torch.nn.ParameterList(torch.randn(3) for _ in range(count)),
    "arrays": lambda count: {f"p{i}": np.full(3, i + 0.5) for i in range(count)},
    "modules": lambda count: torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(count)),
    "tensors": lambda count: {f"p{i}": torch.randn(3) for i in range(count)},
    "columns": lambda count: dict(enumerate(torch.randn(3, count).unbind(1))),
    "parts": lambda count: dict(enumerate(torch.randn(3 * count).split(3))),
}


def make_ema(weights: Any, applied: bool = False) -> fastema.EMA:
    ema = fastema.EMA(weights, 0.9)
    ema.update()
    if applied:
        ema.apply_shadow()
    return ema


CALLS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "build": lambda weights: lambda: fastema.EMA(weights, 0.9),
    "update": lambda weights: make_ema(weights).update,
    "state_dict applied": lambda weights: make_ema(weights, applied=True).state_dict,
    "load_state_dict": lambda weights: partial(
        make_ema(weights).load_state_dict, make_ema(weights).state_dict()
    ),
    "read": lambda weights: partial(dict, make_ema(weights).shadow),
    "read applied": lambda weights: partial(dict, make_ema(weights, applied=True).shadow),
    "apply_shadow": lambda weights: make_ema(weights).apply_shadow,
    "restore": lambda weights: make_ema(weights, applied=True).restore,
    "to": lambda weights: partial(make_ema(weights).to, dtype="float64"),
    "copy_to": lambda weights: partial(make_ema(weights).copy_to, weights),
    "plan": lambda weights: partial(fastema.swap_, dict(make_ema(weights).shadow), weights),
}


@pytest.mark.parametrize(
    ("weights", "call"),
    [
        *product(["module", "arrays"], CALLS),
        *product(["modules", "tensors", "columns", "parts"], ["build"]),
    ],
)
def test_calls_take_twice_the_work_for_twice_the_tensors(weights: str, call: str) -> None:
    assert grows_linearly(lambda count: CALLS[call](WEIGHTS[weights](count)))
