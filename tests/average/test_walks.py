"""How many of fastema's functions stand between a call and the kernel."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastema
from fastema.average.average import Average
from fastema.engine.cpu import CpuRun

from .kinds import KINDS, which
from .weights import net

pytestmark = pytest.mark.torch

MOST = 10
"""Functions from the public name to the kernel, at most."""


def walk(call: Callable[[], object]) -> tuple[int, int]:
    """Return how many functions of fastema a call enters, and how many led to its kernel."""
    entered = depth = deepest = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered, depth, deepest
        if "fastema" not in frame.f_code.co_filename:
            return
        if event == "call":
            entered, depth = entered + 1, depth + 1
            if frame.f_code is CpuRun.run.__code__:
                deepest = max(deepest, depth)
        elif event == "return":
            depth -= 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered, deepest


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "into"])
def test_usual_update_enters_one_function(kind: str) -> None:
    average = KINDS[kind](net())
    for _ in range(3):
        average.update()
    assert walk(average.update) == (1, 0)  # the kernel runs within the native call


@pytest.mark.parametrize("kind", KINDS)
def test_other_calls_reach_the_kernel_in_few_functions(kind: str) -> None:
    average = KINDS[kind](net())
    _, deep = walk(average.update)
    assert 0 < deep <= MOST
    block = average.swapped(**which(average))
    _, deep = walk(block.__enter__)
    assert 0 < deep <= MOST
    _, deep = walk(lambda: block.__exit__(None, None, None))
    assert 0 < deep <= MOST


@pytest.mark.parametrize("face", [fastema.EMA, fastema.SWA, fastema.SMA, fastema.PowerEMA])
def test_faces_are_one_class_away_from_average(face: type) -> None:
    ours = [one for one in face.__mro__ if one.__module__.startswith("fastema")]
    assert ours == [face, Average]
    assert not [name for name in vars(face) if not name.startswith("_")]


def test_a_changed_module_is_noticed_within_the_native_call() -> None:
    model = net()
    average = fastema.EMA(model, decay=0.5)
    for _ in range(3):
        average.update()
    model.scale = torch.nn.Parameter(torch.tensor(3.0))
    old = average.shadow["scale"].clone()
    average.update()
    torch.testing.assert_close(average.shadow["scale"], (old + 3.0) / 2)
