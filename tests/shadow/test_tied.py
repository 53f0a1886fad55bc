"""Weights under several names are averaged once, swapped once, and found under all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import LayoutError

from .kinds import KINDS, PARTS, all_of, last, unchanged, which

pytestmark = pytest.mark.torch


class Lang(nn.Module):
    """An embedding and an output projection, tied in one of three ways or not at all."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tie == "parameter":
            self.head.weight = self.embed.weight
        elif tie == "storage":
            self.head.weight.data = self.embed.weight.data
        elif tie == "module":
            self.again = self.embed


TIES = ["parameter", "storage", "module"]
DTYPES = [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"shadow_dtype": "float32"})]
OTHER_NAME = {"parameter": "head.weight", "storage": "head.weight", "module": "again.weight"}


def train_(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", TIES)
def test_swapped_once(tie: str, kind: str) -> None:
    model = Lang(tie)
    average = KINDS[kind](model)
    for n in range(1, 6):
        train_(model, n)
        average.update()
    train_(model, 6)
    held, whole = all_of(average), Lang("none")
    average.copy_to(whole, **which(average))
    with unchanged(model, average), average.swapped(**which(average)):
        assert torch.equal(model.embed.weight, whole.embed.weight)
        if tie != "module":
            assert torch.equal(model.head.weight, whole.embed.weight)
        assert all_of(average) == held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", TIES)
def test_kept_once_under_the_first_name_and_found_under_both(tie: str, kind: str) -> None:
    average = KINDS[kind](Lang(tie))
    names = list(last(average))
    assert "embed.weight" in names
    assert OTHER_NAME[tie] not in names
    state = average.state_dict()
    for part in PARTS:
        assert all(list(tensors) == names for tensors in state.get(part, ()))
    average.load_state_dict(state)
    for shadow in average.shadows:
        assert torch.equal(shadow["embed.weight"], shadow[OTHER_NAME[tie]])
        with average.swapped(**which(average)):
            assert torch.equal(shadow["embed.weight"], shadow[OTHER_NAME[tie]])


MISMATCHED = [
    (("none", tie), call) for tie in TIES[:2] for call in ("update", "apply_shadow", "copy_to")
]
MISMATCHED += [((tie, "none"), call) for tie in TIES[:2] for call in ("update", "apply_shadow")]


@pytest.mark.parametrize("frozen", ["skip", "copy", "average"])
@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_trained_weight_that_shares_the_memory_of_a_frozen_one(
    frozen: str, frozen_first: bool
) -> None:
    """It trains, so it is averaged, whichever name comes first."""
    memory = torch.randn(70)
    model = nn.ParameterDict()
    for name in ("still", "live") if frozen_first else ("live", "still"):
        model[name] = nn.Parameter(memory, requires_grad=name == "live")
    model["other"] = nn.Parameter(torch.randn(3))
    ema = fastema.EMA(model, 0.5, frozen=frozen)
    old = memory.clone()
    memory.add_(1)
    ema.update()
    torch.testing.assert_close(ema.shadow["live"], old + 0.5)


def test_partly_shared_memory_is_refused_by_name() -> None:
    memory, square = torch.randn(10), torch.randn(3, 3)
    with pytest.raises(LayoutError, match=r"'?first'?(.|\n)*'?second'?"):
        fastema.EMA({"first": memory[:6], "second": memory[4:]})
    for weights in (
        [memory.view(2, 5), memory],
        [square, square.t()],
        [memory[0:4].view(torch.complex64), memory[0:4]],
    ):
        with pytest.raises(LayoutError, match="overlap"):
            fastema.EMA(weights)
