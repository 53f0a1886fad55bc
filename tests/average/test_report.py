"""What an average reports: report(), repr, and hints for names of other libraries."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastema
from fastema import hints, rules
from fastema.errors import StateError
from fastema.rules.units import effective_steps

from .weights import net

pytestmark = pytest.mark.torch

POWERS = "power function of sigma_rel 0.05; power function of sigma_rel 0.1"
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "ema": (fastema.EMA, {"decay": 0.99}, "decay 0.99"),
    "several": (fastema.EMA, {"decay": (0.9, 0.999)}, "decay 0.9; decay 0.999"),
    "debiased": (fastema.EMA, {"decay": 0.99, "zero_debias": True}, "decay 0.99, bias-corrected"),
    "warmup": (fastema.EMA, {"decay": rules.warmup(0.9999)}, "decay 0.9999 with warm-up"),
    "swa": (fastema.SWA, {}, "mean of all weights"),
    "sma": (fastema.SMA, {"window": 5}, "mean of the last 5 weights"),
    "power": (fastema.PowerEMA, {}, POWERS),
}


def average_after(kind: str, updates: int, **options: Any) -> Any:
    build, given, _ = KINDS[kind]
    average = build([np.ones(3)], **given, **options)
    for _ in range(updates):
        average.update()
    return average


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("updates", [3, 9, 10, 57, 2003])
@pytest.mark.parametrize("every", [1, 10])
def test_report_agrees_with_effective_steps(kind: str, updates: int, every: int) -> None:
    average = average_after(kind, updates, update_every=every)
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


def test_report_counts_skipped_calls() -> None:
    x = np.ones(3)
    ema = fastema.EMA([x], 0.9, on_nonfinite="skip")
    for said in ([], ["1 call was skipped"], ["2 calls were skipped"]):
        x[0] = 1
        ema.update()
        lines = [f"{one}: a weight was not finite" for one in said]
        assert ema.report().split("\n")[1:-1] == lines
        x[0] = np.nan
        ema.update()


def test_repr_shows_applied_and_names_of_tensors() -> None:
    ema = fastema.EMA(net(), 0.9)
    with ema.swapped():
        assert "applied" in repr(ema)
    assert "applied" not in repr(ema)
    assert "conv.weight" in repr(ema.shadow)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("average_parameters", r"swapped\(\)"),
        ("module", r"functional_call\(model, ema\.model_state_dict\(\), x\)"),
        ("cuda", r"use to\(\)"),
        ("step", r"use update\(\)"),
        ("shadow_params", r"ema\.shadow"),
    ],
)
def test_attribute_of_another_library_raises_with_a_hint(name: str, said: str) -> None:
    with pytest.raises(AttributeError, match=f"'EMA' object has no attribute '{name}': .*{said}"):
        getattr(fastema.EMA([np.ones(3)]), name)
    for kind in (fastema.EMA, fastema.SWA, fastema.SMA, fastema.PowerEMA):
        assert not [name for name in hints._HINTS if hasattr(kind, name)]


def test_an_average_is_neither_copied_nor_pickled() -> None:
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(StateError, match="state_dict"):
            copied(fastema.EMA([np.ones(3)]))
