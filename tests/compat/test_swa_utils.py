"""Beside torch.optim.swa_utils: the same numbers and state, and where it is wrong, ours is not."""

import copy
from typing import Any

import pytest
import torch
from torch.optim import swa_utils as theirs

from fastema.compat import swa_utils as ours
from fastema.errors import LayoutError

from ..support.peers import SWA_KINDS, is_parameter, swa_weight
from ..support.peers import swa_arguments as function
from .network import Network, Truth, bits, numbers, trained

pytestmark = pytest.mark.torch


def weight(kind: str, n: int) -> float:
    return swa_weight(n, kind)


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


@pytest.mark.parametrize("use_buffers", [False, True], ids=["weights", "buffers"])
@pytest.mark.parametrize("kind", SWA_KINDS[1:])
def test_functions_of_pytorch_run_as_in_its_own_class(kind: str, use_buffers: bool) -> None:
    model, generator = Network(43, integers=not use_buffers), numbers(44)
    one, other = averages = [
        module.AveragedModel(model, use_buffers=use_buffers, **function(theirs, kind))
        for module in (ours, theirs)
    ]
    for _ in range(5):
        trained(model, generator)
        for average in averages:
            average.update_parameters(model)
    assert bits(one) == bits(other)
    model.wide = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(LayoutError, match="wide"):
        one.update_parameters(model)
    assert bits(one) == bits(other)
