"""Non-finite weights: an update that skips or raises changes nothing."""

from typing import Any

import pytest
import torch

import fastema
from fastema.errors import NonFiniteError

from .kinds import full_state
from .stored import CODES
from .weights import net, refresh_, train_

pytestmark = pytest.mark.torch

BAD = [float("nan"), float("inf"), float("-inf")]
PLACES = {"first": 0, "last": -1, "in the middle": 301}


def make_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weights = {
        "a": torch.empty(700, dtype=dtype),
        "b": torch.empty(1400, dtype=dtype)[::2],
        "c": torch.empty(70, 10, dtype=dtype).t(),
        "other": torch.empty(9),
    }
    refresh_(weights, 0)
    return weights


def spoil(tensor: torch.Tensor, place: int, value: float) -> None:
    """Write one element, given its position in memory."""
    in_memory = tensor.t().reshape(-1) if tensor.dim() == 2 else tensor
    parts = torch.view_as_real(in_memory) if tensor.is_complex() else in_memory[:, None]
    parts[place, -1] = value


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", CODES, ids=CODES.values())
def test_one_nonfinite_weight_leaves_the_average_unchanged(dtype: torch.dtype, place: int) -> None:
    weights, clean = make_weights(dtype), make_weights(dtype)
    skipping = fastema.EMA(weights, (0.5, 0.9), on_nonfinite="skip")
    raising = fastema.EMA(weights, (0.5, 0.9), on_nonfinite="raise")
    mirror = fastema.EMA(clean, (0.5, 0.9))
    train_(weights, [1], skipping, raising)
    train_(clean, [1], mirror)
    before = full_state(mirror)
    cases = [(name, value) for name in "abc" for value in BAD]
    for count, (name, value) in enumerate(cases, 1):
        refresh_(weights, 1 + count)
        spoil(weights[name], place, value)
        with pytest.raises(NonFiniteError, match=f"'{name}'"):
            raising.update()
        skipping.update()
        assert full_state(skipping) == {**before, "num_skipped": count}
        assert full_state(raising) == before
    # Later updates behave as if those calls had not happened.
    train_(weights, [99], skipping, raising)
    train_(clean, [99], mirror)
    assert full_state(raising) == full_state(mirror)
    assert full_state(skipping) == {**full_state(mirror), "num_skipped": len(cases)}
    assert (skipping.num_updates, skipping.num_skipped) == (2, len(cases))


def test_error_names_every_nonfinite_tensor_and_no_other() -> None:
    model = net()
    ema = fastema.EMA(model, 0.9, on_nonfinite="raise")
    with torch.no_grad():
        model.conv.bias[2] = torch.nan
        model.scale.fill_(torch.inf)
    with pytest.raises(NonFiniteError) as caught:
        ema.update()
    text = str(caught.value)
    assert isinstance(caught.value, ValueError | ArithmeticError)
    assert [part for part in ("'conv.bias'", "'scale'", "update 1") if part not in text] == []
    assert "conv.weight" not in text
    assert ema.num_updates == ema.num_skipped == 0


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_statistics_leave_the_average_unchanged(bad: float, buffers: Any) -> None:
    """Counters and a copied mask of infinities do not count as non-finite."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(30))
    if buffers == "copy":
        model.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))
    skipping = fastema.EMA(model, 0.5, on_nonfinite="skip", frozen="copy", buffers=buffers)
    raising = fastema.EMA(model, 0.5, on_nonfinite="raise", frozen="copy", buffers=buffers)
    model[0].running_mean.add_(1)
    for one in (skipping, raising):
        one.update()
    before = full_state(raising)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model[0].running_var[17] = bad
    model[0].num_batches_tracked.add_(1)
    with pytest.raises(NonFiniteError, match=r"'0\.running_var' holds"):
        raising.update()
    skipping.update()
    assert full_state(raising) == before
    assert full_state(skipping) == {**before, "num_skipped": 1}
    model[0].running_var.fill_(3)
    for one in (skipping, raising):
        one.update()
        assert one.num_updates == 2
        assert one.shadow["0.num_batches_tracked"] == 1


def test_steps_of_an_update_skipped_for_a_nan_count_in_the_next_one_but_the_latest() -> None:
    model = net()
    skipping, mirror = (fastema.EMA(model, 0.75, on_nonfinite="skip") for _ in range(2))
    with torch.no_grad():
        model.scale.fill_(torch.nan)
    skipping.update(steps=4)  # as after an epoch of steps in one call
    skipping.update()
    assert skipping.num_updates == 0
    refresh_(model, 1)
    skipping.update(steps=2)
    mirror.update(steps=5)
    assert full_state(skipping) == {**full_state(mirror), "num_skipped": 2}
    train_(model, [2], skipping, mirror)
    assert full_state(skipping) == {**full_state(mirror), "num_skipped": 2}
