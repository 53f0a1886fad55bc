"""Blocks of the drop-in classes lose no weights: no signal finds a gap at their ends."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastema.compat.averager import ModelAverager
from fastema.compat.torch_ema import ExponentialMovingAverage

from .interrupts import every_place, rung_during

pytestmark = pytest.mark.torch


class Case:
    """Weights, and blocks in which they hold an average."""

    def __init__(self, make: Callable[[list[Any]], Callable[[], Any]]) -> None:
        torch.manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(n)) for n in (3, 70)]
        self.block = make(self.weights)
        self.raw = [one.detach().clone() for one in self.weights]
        self.entered = 0

    def are_back(self) -> bool:
        return all(map(torch.equal, self.weights, self.raw))

    def run(self) -> None:
        """A block, and around it a handler that needs the weights."""
        try:
            with self.block():
                self.entered += not self.are_back()
        except BaseException:
            assert self.are_back()
            raise
        assert self.are_back()


def of_torch_ema(weights: list[Any]) -> Callable[[], Any]:
    ema = ExponentialMovingAverage(weights, 0.5)
    for one in weights:
        one.data.mul_(-2)
    return ema.average_parameters


def of_averager(weights: list[Any]) -> Callable[[], Any]:
    averager = ModelAverager([torch.randn_like(one) for one in weights])
    return lambda: averager.swapped(weights)


def test_weights_are_back_wherever_an_interrupt_comes() -> None:
    case = Case(of_torch_ema)
    every_place(case.run, lambda: None)
    assert case.entered
    case.run()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
# An interrupt that arrives while Python runs a weak reference's callback is printed and dropped.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("make", [of_torch_ema, of_averager])
def test_weights_are_back_whenever_a_timer_rings(make: Any) -> None:
    case, chance, rung = Case(make), random.Random(0), 0

    def several() -> None:
        for _ in range(10):
            case.run()

    case.run()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        rung += rung_during(chance.uniform(1e-6, 1e-3), several)
    assert rung
