"""A model of many small tensors: the work of every call grows as their number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import LayoutError
from fastema.layout.group import refuse_overlap
from fastema.layout.spec import TensorSpec

from .support.work import grows_linearly, lines_of

pytestmark = pytest.mark.torch


def module(count: int) -> Any:
    made = torch.nn.Module()
    for i in range(count):
        made.register_parameter(f"p{i}", torch.nn.Parameter(torch.randn(3)))
    return made


WEIGHTS: dict[str, Callable[[int], Any]] = {
    "module": module,
    "modules": lambda count: torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(count)),
    "tensors": lambda count: {f"p{i}": torch.randn(3) for i in range(count)},
    "arrays": lambda count: {
        f"p{i}": np.random.default_rng(i).normal(size=3) for i in range(count)
    },
    "columns": lambda count: dict(enumerate(torch.randn(3, count).unbind(1))),
    "parts": lambda count: dict(enumerate(torch.randn(3 * count).split(3))),
}


def ready(weights: Any, applied: bool = False, **options: Any) -> fastema.EMA:
    ema = fastema.EMA(weights, 0.9, **options)
    ema.update()
    if applied:
        ema.apply_shadow()
    return ema


def loading(weights: Any) -> Callable[[], Any]:
    ema = ready(weights)
    state = ema.state_dict()
    return lambda: ema.load_state_dict(state)


def reading(ema: fastema.EMA) -> Callable[[], Any]:
    return lambda: [ema.shadow[name] for name in ema.shadow]


def planning(weights: Any, averages: Any) -> Callable[[], Any]:
    return lambda: fastema.Plan(averages, weights).swap_()


CALLS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "build": lambda weights: lambda: fastema.EMA(weights, 0.9),
    "update": lambda weights: ready(weights).update,
    "state_dict": lambda weights: ready(weights).state_dict,
    "state_dict applied": lambda weights: ready(weights, applied=True).state_dict,
    "load_state_dict": loading,
    "read": lambda weights: reading(ready(weights)),
    "read applied": lambda weights: reading(ready(weights, applied=True)),
    "apply_shadow": lambda weights: ready(weights).apply_shadow,
    "restore": lambda weights: ready(weights, applied=True).restore,
    "to": lambda weights: partial(ready(weights).to, dtype="float64"),
    "copy_to": lambda weights: partial(ready(weights).copy_to, weights),
    "plan": lambda weights: planning(weights, dict(ready(weights).shadow)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("weights", ["module", "arrays"])
def test_calls_take_twice_the_work_for_twice_the_tensors(weights: str, call: str) -> None:
    assert grows_linearly(lambda count: CALLS[call](WEIGHTS[weights](count)))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_averages_are_built_in_linear_time(weights: str) -> None:
    assert grows_linearly(lambda count: CALLS["build"](WEIGHTS[weights](count)))


# -- overlap ---------------------------------------------------------------------------------------

Sides = tuple[list[tuple[str, TensorSpec]], list[tuple[str, TensorSpec]]]


def spec(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(4096 + 4 * address, shape, strides, "f32", "cpu")


def columns(count: int) -> Sides:
    """Of one matrix: each span reaches into those of all others."""
    return [(f"c{i}", spec(i, (5,), (count,))) for i in range(count)], []


def joined(count: int) -> Sides:
    """Three matrices side by side in the rows of each of many."""
    return [
        (f"m{i}", spec(150 * (i // 3) + 10 * (i % 3), (5, 10), (30, 1))) for i in range(count)
    ], []


def among_what_is_read(count: int) -> Sides:
    """Many names of one tensor that is read, between the elements of one that is written."""
    read = [(f"r{i}", spec(1, (40,), (2,))) for i in range(count)]
    return [("written", spec(0, (40,), (2,)))], read


def end_to_end(count: int) -> Sides:
    return [(f"p{i}", spec(5 * i, (5,), (1,))) for i in range(count)], []


LAYOUTS = [columns, joined, among_what_is_read, end_to_end]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlap_is_looked_for_in_linear_time(layout: Callable[[int], Sides]) -> None:
    assert grows_linearly(lambda count: lambda: refuse_overlap(*layout(count)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_element_that_is_shared_is_found_among_many(layout: Callable[[int], Sides]) -> None:
    written, read = layout(200)
    refuse_overlap(written, read)
    last = written[-1][1]
    for shared in (last.address, last.span()[1] - 4):
        there = TensorSpec(shared, (1,), (1,), "f32", "cpu")
        for sides in (([*written, ("other", there)], read), (written, [*read, ("other", there)])):
            with pytest.raises(LayoutError) as caught:
                refuse_overlap(*sides)
            assert {written[-1][0], "other"} <= set(str(caught.value).replace("(", " ").split())


def test_work_is_counted() -> None:
    def quadratic(count: int) -> Callable[[], Any]:
        specs = [spec(i, (1,), (1,)) for i in range(count)]
        return lambda: [one.size for one in specs for _ in specs]

    def linear(count: int) -> Callable[[], Any]:
        specs = [spec(i, (1,), (1,)) for i in range(count)]
        return lambda: [one.size for one in specs]

    assert grows_linearly(linear)
    assert not grows_linearly(quadratic)
    assert lines_of(lambda: None) == 0
