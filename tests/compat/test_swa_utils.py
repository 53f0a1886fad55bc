"""Beside torch.optim.swa_utils: the same numbers and state, and where it is wrong, ours is not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils as theirs

from fastema.compat import swa_utils as ours
from fastema.errors import LayoutError

from ..support.peers import SWA_KINDS as FUNCTIONS
from ..support.peers import is_parameter, swa_weight
from ..support.peers import swa_function as function
from .network import Network, Truth, bits, numbers, trained

pytestmark = pytest.mark.torch


def weight(kind: str, n: int) -> float:
    return swa_weight(n, kind)


def snapshot(averaged: nn.Module) -> tuple[dict[str, bytes], int]:
    return bits(averaged), int(averaged.n_averaged)


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("integers", [False, True], ids=["tensor", "int"])
@pytest.mark.parametrize("kind", ["ema", "ema multi", "swa", "swa multi"])
def test_functions_alone(kind: str, integers: bool) -> None:
    """Mixed lists, new ones at each call, as somebody would use them without an AveragedModel."""
    model = Network(5, integers=False)
    averaged = copy.deepcopy(model)
    truth, generator = Truth(averaged, model, is_parameter), numbers(6)
    (apply,) = function(ours, kind).values()
    for n in range(1, 12):
        trained(model, generator)
        truth.step(model, weight(kind, n))
        count: Any = n if integers else torch.tensor(n)
        if kind.endswith("multi"):
            assert apply(list(averaged.parameters()), tuple(model.parameters()), count) is None
            continue
        for average, new in zip(averaged.parameters(), model.parameters(), strict=True):
            before = average.detach().clone()
            result = apply(average, new, count)
            assert torch.equal(average, before)
            assert not result.requires_grad
            with torch.no_grad():
                average.copy_(result)
    for buffer, new in zip(averaged.buffers(), model.buffers(), strict=True):
        buffer.copy_(new)
    truth.check(averaged, model)


# -- random bits -----------------------------------------------------------------------------------


def test_the_count_is_read_only_when_it_may_have_changed(on_an_accelerator: list[float]) -> None:
    model = Network(23)
    averaged = ours.AveragedModel(model)
    truth, generator = Truth(averaged.module, model, is_parameter), numbers(24)

    def update(*counts: int) -> None:
        for n in counts:
            truth.train(model, generator, weight("swa", n), averaged.update_parameters)
        truth.check(averaged.module, model)

    update(0, 1, 2, 3)
    assert on_an_accelerator == [0]
    averaged.load_state_dict({**averaged.state_dict(), "n_averaged": torch.tensor(7)})
    update(7, 8)
    assert on_an_accelerator == [0, 7]
    averaged.n_averaged.fill_(2)
    update(2, 3)
    averaged.n_averaged = torch.tensor(11)
    update(11, 12)
    averaged.load_state_dict({**averaged.state_dict(), "n_averaged": torch.tensor(4)}, assign=True)
    averaged.module.head.weight = averaged.module.embed.weight
    update(4, 5)
    assert on_an_accelerator == [0, 7, 2, 11, 4]
    averaged = copy.deepcopy(averaged)
    update(6, 7)
    assert on_an_accelerator == [0, 7, 2, 11, 4, 6]


# -- functions and memory --------------------------------------------------------------------------


def test_the_same_place_is_not_the_same_tensor() -> None:
    """Another shape, other strides and another dtype in the memory of the call before."""
    memory = torch.randn(4, 4, generator=numbers(40))
    apply = ours.get_ema_multi_avg_fn(0.5)
    for new in (memory, memory.t(), memory.view(2, 8), memory.view(torch.float64)):
        average = torch.zeros(new.shape, dtype=new.dtype)
        for _ in range(2):
            apply([average], [new], 1)
        torch.testing.assert_close(average, 0.75 * new, equal_nan=True)
    average, wide, halves = torch.zeros(4, 4), torch.zeros(4, 8), memory.view(torch.int16)
    for written, new in (
        (average, memory),
        (average, memory.t()),
        (wide, halves.view(torch.bfloat16)),
        (wide, halves.view(torch.float16)),
        (average, memory),
        (average.t(), memory),
        (average, memory),
    ):
        written.zero_()
        apply([written], [new], 1)
        torch.testing.assert_close(written, 0.5 * new.float(), equal_nan=True)


# -- what a user brings ----------------------------------------------------------------------------


def single(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    return averaged + (current - averaged) / (count + 3)


def several(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
    for one, new in zip(averaged, current, strict=True):
        one.copy_(single(one, new, count))


@pytest.mark.parametrize("use_buffers", [False, True], ids=["weights", "buffers"])
@pytest.mark.parametrize(
    "arguments",
    [{"avg_fn": single}, {"multi_avg_fn": several}, *(function(theirs, k) for k in FUNCTIONS[1:])],
    ids=["single", "several", *FUNCTIONS[1:]],
)
def test_functions_from_elsewhere_run_as_in_theirs(
    arguments: dict[str, Any], use_buffers: bool
) -> None:
    model, generator = Network(43, integers=not use_buffers), numbers(44)
    one, other = (
        module.AveragedModel(model, use_buffers=use_buffers, **arguments)
        for module in (ours, theirs)
    )
    for _ in range(5):
        trained(model, generator)
        one.update_parameters(model)
        other.update_parameters(model)
    assert snapshot(one) == snapshot(other)
    assert torch.equal(one.module.cache, model.cache) is not use_buffers
    model.wide = nn.Parameter(torch.zeros(3))
    with pytest.raises(LayoutError, match="wide"):
        one.update_parameters(model)
    assert snapshot(one) == snapshot(other)
