"""The drop-in for torch.optim.swa_utils: its bare functions, and reads of the count."""

import copy
from typing import Any

import pytest
import torch
from torch.optim import swa_utils as theirs

from fastema.compat import swa_utils as ours
from fastema.errors import LayoutError

from ..support.peers import SWA_KINDS, is_parameter, swa_weight
from ..support.peers import swa_arguments as function
from .network import Network, Truth, bits, make_generator, randomize

pytestmark = pytest.mark.torch


def weight(kind: str, n: int) -> float:
    return swa_weight(n, kind)


@pytest.mark.parametrize("integers", [False, True], ids=["tensor", "int"])
@pytest.mark.parametrize("kind", ["ema", "ema multi", "swa", "swa multi"])
def test_functions_average_without_an_averaged_model(kind: str, integers: bool) -> None:
    """Each call gets new lists of mixed dtypes, as in use without an AveragedModel."""
    model = Network(5, integers=False)
    averaged = copy.deepcopy(model)
    truth, generator = Truth(averaged, model, is_parameter), make_generator(6)
    (apply,) = function(ours, kind).values()
    for n in range(1, 12):
        randomize(model, generator)
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


def test_empty_lists_are_averaged_alone() -> None:
    apply = ours.get_ema_multi_avg_fn(0.5)
    assert apply([], [], 1) is None
    for averages, tensors in (([torch.ones(2)], []), ([], [torch.ones(2)])):
        words = f"{len(averages)} averages cannot follow {len(tensors)} tensors"
        with pytest.raises(LayoutError, match=words):
            apply(averages, tensors, 1)


def test_device_count_is_read_only_when_it_may_have_changed(device_reads: list[float]) -> None:
    model = Network(23)
    averaged = ours.AveragedModel(model)
    truth, generator = Truth(averaged.module, model, is_parameter), make_generator(24)

    def update(*counts: int) -> None:
        for n in counts:
            truth.train(model, generator, weight("swa", n), averaged.update_parameters)
        truth.check(averaged.module, model)

    update(0, 1, 2, 3)
    assert device_reads == [0]
    averaged.load_state_dict({**averaged.state_dict(), "n_averaged": torch.tensor(7)})
    update(7, 8)
    assert device_reads == [0, 7]
    averaged.n_averaged.fill_(2)
    update(2, 3)
    averaged.n_averaged = torch.tensor(11)
    update(11, 12)
    averaged.load_state_dict({**averaged.state_dict(), "n_averaged": torch.tensor(4)}, assign=True)
    averaged.module.head.weight = averaged.module.embed.weight
    update(4, 5)
    assert device_reads == [0, 7, 2, 11, 4]
    averaged = copy.deepcopy(averaged)
    update(6, 7)
    assert device_reads == [0, 7, 2, 11, 4, 6]


@pytest.mark.parametrize("use_buffers", [False, True], ids=["weights", "buffers"])
@pytest.mark.parametrize("kind", SWA_KINDS[1:])
def test_pytorchs_own_functions_run_bit_identically(kind: str, use_buffers: bool) -> None:
    model, generator = Network(43, integers=not use_buffers), make_generator(44)
    one, other = averages = [
        module.AveragedModel(model, use_buffers=use_buffers, **function(theirs, kind))
        for module in (ours, theirs)
    ]
    for _ in range(5):
        randomize(model, generator)
        for average in averages:
            average.update_parameters(model)
    assert bits(one) == bits(other)
    model.wide = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(LayoutError, match="wide"):
        one.update_parameters(model)
    assert bits(one) == bits(other)
