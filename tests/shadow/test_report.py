"""What an average says of itself: plain sentences, true at every point of a run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import fastema
from fastema import rules
from fastema.rules.units import effective_steps

KINDS: dict[str, Any] = {
    "ema": lambda x, **o: fastema.EMA(x, 0.99, **o),
    "several": lambda x, **o: fastema.EMA(x, (0.9, 0.999), **o),
    "debiased": lambda x, **o: fastema.EMA(x, 0.99, zero_debias=True, **o),
    "warmup": lambda x, **o: fastema.EMA(x, rules.warmup(0.9999), **o),
    "swa": fastema.SWA,
    "sma": lambda x, **o: fastema.SMA(x, 5, **o),
    "power": fastema.PowerEMA,
}


def after(kind: str, updates: int, **options: Any) -> Any:
    average = KINDS[kind]([np.ones(3)], **options)
    for _ in range(updates):
        average.update()
    return average


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("updates", [3, 9, 10, 57, 2003])
@pytest.mark.parametrize("every", [1, 10])
def test_the_numbers_are_those_of_the_rules(kind: str, updates: int, every: int) -> None:
    average = after(kind, updates, update_every=every)
    _, *lines = average.report().split("\n")
    if updates < every:
        assert lines == ["nothing is averaged yet: it is the weights it was built from"]
        return
    for line, rule in zip(lines, average.schedule.rules, strict=True):
        reach = effective_steps(rule, updates, every)
        said = re.search(r"lags ([\d.,]+) \+/- ([\d.,]+) steps? behind", line)
        if said is None:
            assert line.endswith("it is the latest weights")
            assert reach.mean_age == 0
            continue
        numbers = [float(number.replace(",", "")) for number in said.groups()]
        np.testing.assert_allclose(numbers, reach[:2], rtol=0.06)
        share = re.search(r"([\d.]+) % of it is the weights it was built from", line)
        assert (share is not None) == (reach.initial_share >= 0.0005)
        if share is not None:
            assert float(share[1]) == pytest.approx(100 * reach.initial_share, rel=0.01)


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_what_was_skipped(skipped: int) -> None:
    x = np.ones(3)
    ema = fastema.EMA([x], 0.9, on_nonfinite="skip")
    x[0] = np.nan
    for _ in range(skipped):
        ema.update()
    x[0] = 1
    ema.update()
    lines = ema.report().split("\n")
    said = {1: ["1 call was skipped: a weight was not finite"]}
    said[2] = ["2 calls were skipped: a weight was not finite"]
    assert lines[1:-1] == said.get(skipped, [])


SHOWN = {
    "ema": "EMA(3 weights in 1 tensor, f64, decay 0.99, 1 update)",
    "several": "EMA(3 weights in 1 tensor, f64, decay 0.9; decay 0.999, 1 update)",
    "debiased": "EMA(3 weights in 1 tensor, f64, decay 0.99, bias-corrected, 1 update)",
    "warmup": "EMA(3 weights in 1 tensor, f64, decay 0.9999 with warm-up, 1 update)",
    "swa": "SWA(3 weights in 1 tensor, f64, mean of all weights, 1 update)",
    "sma": "SMA(3 weights in 1 tensor, f64, mean of the last 5 weights, 1 update)",
    "power": "PowerEMA(3 weights in 1 tensor, f64, power function of sigma_rel 0.05; power "
    "function of sigma_rel 0.1, 1 update)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_shows_its_rule(kind: str) -> None:
    assert repr(after(kind, 1)) == SHOWN[kind]
