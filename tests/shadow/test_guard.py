"""Weights that are not finite: averaged, left out or refused, all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastema
from fastema.errors import NonFiniteError

from .kinds import all_of
from .stored import CODES
from .weights import net, refresh_, train_

pytestmark = pytest.mark.torch

DTYPES = [*CODES]
BAD = [float("nan"), float("inf"), float("-inf")]
PLACES = {"first": 0, "last": -1, "in the middle": 301}


def weights_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weights = {
        "a": torch.empty(700, dtype=dtype),
        "b": torch.empty(1400, dtype=dtype)[::2],
        "c": torch.empty(70, 10, dtype=dtype).t(),
        "other": torch.empty(9),
    }
    refresh_(weights, 0)
    return weights


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements in the order of memory, as a view."""
    return tensor.t().reshape(-1) if tensor.dim() == 2 else tensor


def spoil(tensor: torch.Tensor, place: int, value: float) -> None:
    if tensor.is_complex():
        torch.view_as_real(flat(tensor))[place, 1] = value
    else:
        flat(tensor)[place] = value


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=CODES.values())
def test_one_bad_element_leaves_everything_as_it_was(dtype: torch.dtype, place: int) -> None:
    weights = weights_of(dtype)
    skipping = fastema.EMA(weights, (0.5, 0.9), on_nonfinite="skip")
    raising = fastema.EMA(weights, (0.5, 0.9), on_nonfinite="raise")
    refresh_(weights, 1)
    for one in (skipping, raising):
        one.update()
    before = all_of(skipping)
    cases = [(name, value) for name in "abc" for value in BAD]
    for count, (name, value) in enumerate(cases, 1):
        refresh_(weights, 1 + count)
        spoil(weights[name], place, value)
        with pytest.raises(NonFiniteError, match=f"'{name}'"):
            raising.update()
        skipping.update()
        assert skipping.num_skipped == count
        assert all_of(skipping) == {**before, "num_skipped": count}
        assert all_of(raising) == before
    # And it goes on as if those calls had not been.
    clean = weights_of(dtype)
    mirror = fastema.EMA(clean, (0.5, 0.9))
    train_(clean, (1, 99), mirror)
    refresh_(weights, 99)
    for one in (skipping, raising):
        one.update()
        assert one.num_updates == 2
    assert all_of(raising) == all_of(mirror)
    assert all_of(skipping) == {**all_of(mirror), "num_skipped": len(cases)}


def test_the_error_names_every_bad_tensor_and_no_other() -> None:
    model = net()
    ema = fastema.EMA(model, 0.9, on_nonfinite="raise")
    with torch.no_grad():
        model.conv.bias[2] = torch.nan
        model.scale.fill_(torch.inf)
    with pytest.raises(NonFiniteError) as caught:
        ema.update()
    text = str(caught.value)
    assert isinstance(caught.value, ValueError | ArithmeticError)
    assert "'conv.bias'" in text
    assert "'scale'" in text
    assert "conv.weight" not in text
    assert "update 1" in text
    assert ema.num_updates == ema.num_skipped == 0


class Normed(torch.nn.Module):
    """A layer with statistics, counters and a mask of infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(30)
        mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        self.register_buffer("mask", mask)


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_statistics_leave_everything_as_it_was(bad: float, buffers: Any) -> None:
    model = Normed()
    if buffers == "average":
        del model.mask  # whose average would be NaN
    options = {"frozen": "copy", "buffers": buffers}
    skipping = fastema.EMA(model, 0.5, on_nonfinite="skip", **options)
    raising = fastema.EMA(model, 0.5, on_nonfinite="raise", **options)
    model.norm.running_mean.add_(1)
    for one in (skipping, raising):
        one.update()
    assert skipping.num_updates == 1
    before = all_of(skipping)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    model.norm.running_var[17] = bad
    model.norm.num_batches_tracked.add_(1)
    with pytest.raises(NonFiniteError, match=r"'norm\.running_var' holds"):
        raising.update()
    skipping.update()
    assert all_of(raising) == before
    assert all_of(skipping) == {**before, "num_skipped": 1}
    model.norm.running_var.fill_(3)
    for one in (skipping, raising):
        one.update()
        assert one.num_updates == 2
        assert one.shadow["norm.num_batches_tracked"] == 1
