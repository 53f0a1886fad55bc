"""Averages loaded without a sufficient number of updates: refused, never discarded in silence."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.checkpoint import load_into, save
from fastema.errors import ArgumentError, CheckpointError
from fastema.rules import InverseGamma, cumulative_mean, warmup

NEEDS = ("torch",)

pytestmark = pytest.mark.usefixtures("inside")


def build(kind: Any = fastema.EMA, **options: Any) -> tuple[nn.Module, Any]:
    model = nn.Linear(3, 2)
    return model, kind(model, **options)


AVERAGES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "start_after": (fastema.EMA, {"decay": 0.9, "start_after": 100}, 100),
    "start_after, every fourth": (
        fastema.EMA, {"decay": 0.9, "start_after": 101, "update_every": 4}, 101,
    ),
    "SWA": (fastema.SWA, {}, 1),
    "SWA, later": (fastema.SWA, {"start_after": 7}, 8),
    "PowerEMA": (fastema.PowerEMA, {"sigma_rels": 0.1}, 1),
    "zero_debias": (fastema.EMA, {"decay": 0.9, "zero_debias": True}, 1),
    "several rules, one a mean": (
        fastema.EMA, {"decay": cumulative_mean(), "update_every": 3}, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_average_without_a_count_is_refused_if_the_next_update_would_replace_it(name: str) -> None:
    kind, options, least = AVERAGES[name]
    stored = nn.Linear(3, 2).state_dict()
    torch.save({"ema": stored}, "best.pt")
    model, ema = build(kind, **options)
    before = {name: one.clone() for name, one in ema.shadow.items()}
    with pytest.raises(
        ArgumentError, match="would replace it by the weights: pass num_up"
    ) as caught:
        load_into(ema, "best.pt")
    assert str(caught.value).endswith(f", here {least} or more") == ("start_after" in options)
    with pytest.raises(ArgumentError, match=f"counts {max(least - 1, 1)} updates|unknown age"):
        load_into(ema, "best.pt", num_updates=None if least == 1 else least - 1)
    assert ema.num_updates == 0
    for key, one in ema.shadow.items():
        assert torch.equal(one, before[key])
    load_into(ema, "best.pt", num_updates=least)
    for key, one in ema.shadow.items():
        assert torch.equal(one, stored[key])
    for _ in range(options.get("update_every", 1)):
        ema.update()
    weight = model.weight.detach()
    share = (ema.shadow["weight"] - weight) / (stored["weight"] - weight)
    assert bool((share > 0.001).all())  # a power function gives its second weights nearly all
    assert bool((share < 1).all())


@pytest.mark.parametrize("rule", [warmup(0.999), InverseGamma(0.999, 1.0, 0.75, 0.1)])
def test_count_is_asked_for_where_the_schedule_depends_on_it(rule: Any) -> None:
    torch.save({"ema": nn.Linear(3, 2).state_dict()}, "best.pt")
    _, ema = build(decay=rule)
    with pytest.raises(ArgumentError, match="depends on it: pass num_updates, or 0 to start over"):
        load_into(ema, "best.pt")
    load_into(ema, "best.pt", num_updates=500)
    assert ema.num_updates == 500
    load_into(ema, "best.pt")  # continues from its own count
    assert ema.num_updates == 500
    load_into(ema, "best.pt", num_updates=0)
    assert ema.num_updates == 0


def test_count_is_not_asked_for_where_it_makes_no_difference() -> None:
    stored = nn.Linear(3, 2).state_dict()
    torch.save({"ema": stored}, "best.pt")
    for options in ({"decay": 0.9}, {"decay": 0.9, "update_every": 3}, {"decay": 0.0}):
        _, ema = build(**options)
        load_into(ema, "best.pt")
        assert torch.equal(ema.shadow["weight"], stored["weight"])


def test_recorded_count_that_is_too_small_is_refused_and_can_be_replaced() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2))
    for _ in range(5):
        averaged.update_parameters(nn.Linear(3, 2))
    torch.save(averaged.state_dict(), "swa.pt")
    _, swa = build(fastema.SWA)
    load_into(swa, "swa.pt")
    assert swa.num_updates == 5
    _, ema = build(decay=0.9, start_after=100)
    with pytest.raises(ArgumentError, match=r"counts 5 updates.*here 100 or more"):
        load_into(ema, "swa.pt")
    load_into(ema, "swa.pt", num_updates=100)
    assert torch.equal(ema.shadow["weight"], averaged.module.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windowed_mean_refuses_another_librarys_file_and_says_why(dtype: torch.dtype) -> None:
    torch.save({"ema": nn.Linear(3, 2, dtype=dtype).state_dict()}, "best.pt")
    sma = fastema.SMA(nn.Linear(3, 2, dtype=dtype), window=3)
    with pytest.raises(ArgumentError, match=r"only from its own file.*into an EMA or SWA"):
        load_into(sma, "best.pt", num_updates=9)


def test_own_file_takes_no_count_and_mine_must_not_discard_it() -> None:
    model, ema = build(decay=0.5)
    for _ in range(9):
        ema.update()
    save(ema, "ema.safetensors")
    torch.save(ema.state_dict(), "ema.pt")
    for path in ("ema.safetensors", "ema.pt"):
        with pytest.raises(ArgumentError, match=re.escape(path) + ".* records it; leave it out"):
            load_into(ema, path, num_updates=3)
        later = fastema.EMA(model, decay=0.9, start_after=10)
        with pytest.raises(CheckpointError, match="its 9 updates are too few for schedule='mine'"):
            load_into(later, path, schedule="mine")
        assert later.num_updates == 0
        begun = fastema.EMA(model, decay=0.9, start_after=9)
        load_into(begun, path, schedule="mine")
        assert begun.num_updates == 9
