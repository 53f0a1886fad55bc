"""Beside torch.optim.swa_utils: the same numbers and state, and where it is wrong, ours is not."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import swa_utils as theirs

from fastema.compat import swa_utils as ours
from fastema.errors import ArgumentError, LayoutError
from fastema.torch import update_bn

from ..support.peers import SWA_KINDS as FUNCTIONS
from ..support.peers import is_parameter, swa_weight, tensors
from ..support.peers import swa_function as function
from .network import Network, Truth, array, bits, numbers, repointed, trained

pytestmark = pytest.mark.torch

DECAY = 0.9
NARROW = [torch.bfloat16, torch.float16]


def weight(kind: str, n: int) -> float:
    return swa_weight(n, kind)


def snapshot(averaged: nn.Module) -> tuple[dict[str, bytes], int]:
    return bits(averaged), int(averaged.n_averaged)


# -- the same interface ----------------------------------------------------------------------------


def test_it_is_one_of_theirs_with_the_same_state() -> None:
    model = Network()
    one, other = ours.AveragedModel(model), theirs.AveragedModel(model)
    assert isinstance(one, theirs.AveragedModel)
    one.update_parameters(model)
    other.update_parameters(model)
    assert snapshot(one) == snapshot(other)
    assert (one.avg_fn, one.multi_avg_fn, one.use_buffers) == (None, None, False)
    tokens = torch.randint(7, (3, 2), generator=numbers(1))
    assert torch.equal(one(tokens), model(tokens))


@pytest.mark.parametrize("module", [ours, theirs])
@pytest.mark.parametrize("name", ["get_ema_multi_avg_fn", "get_ema_avg_fn"])
@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_a_decay_outside_is_a_value_error(module: Any, name: str, decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        getattr(module, name)(decay)


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("get_ema_multi_avg_fn", {"decay": float("nan")}),
        ("get_swa_multi_avg_fn", {"rounding": "up"}),
        ("get_ema_avg_fn", {"seed": -1}),
    ],
)
def test_arguments_that_have_no_meaning(function: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))}="):
        getattr(ours, function)(**wrong)


def test_functions_say_what_they_are() -> None:
    assert "0.25" in repr(ours.get_ema_multi_avg_fn(0.25))
    assert "swa" in repr(ours.get_swa_avg_fn())


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


@pytest.mark.parametrize("container", [ours, theirs])
@pytest.mark.parametrize("kind", ["ema multi", "ema"])
@pytest.mark.parametrize("narrow", NARROW)
def test_a_narrow_average_that_is_rounded_to_nearest_stands_still(
    narrow: torch.dtype, kind: str, container: Any
) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(4096, dtype=narrow))
    chosen = function(ours, kind, 0.9998, rounding="nearest")
    averaged = container.AveragedModel(model, **chosen)
    for value in [1.0] + 60 * [1.5]:
        with torch.no_grad():
            model.weight.fill_(value)
        averaged.update_parameters(model)
    assert torch.all(averaged.module.weight == 1)


def test_the_seed_changes_the_random_bits() -> None:
    model, generator = Network(21, torch.bfloat16), numbers(22)
    averages = [
        ours.AveragedModel(model, **function(ours, "ema multi", seed=seed)) for seed in (0, 0, 1)
    ]
    for _ in range(3):
        trained(model, generator)
        for averaged in averages:
            averaged.update_parameters(model)
    same, again, other = map(bits, averages)
    assert same == again
    assert same != other


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


def test_a_function_reads_no_count_that_it_does_not_need(on_an_accelerator: list[float]) -> None:
    model = Network(25, torch.bfloat16)
    averaged = theirs.AveragedModel(model, **function(ours, "ema multi"))
    for _ in range(5):
        averaged.update_parameters(model)
    assert on_an_accelerator == [1]
    averaged = theirs.AveragedModel(model, **function(ours, "swa multi"))
    for _ in range(4):
        averaged.update_parameters(model)
    assert on_an_accelerator == [1, 1, 2, 3]


@pytest.mark.parametrize("name", ["get_ema_multi_avg_fn", "get_swa_multi_avg_fn"])
def test_the_random_bits_of_an_accelerator_are_the_same(
    name: str, on_an_accelerator: list[float]
) -> None:
    """Whether the count is given as a number, or in a tensor that is not read."""
    one, other = torch.zeros(2, 500, dtype=torch.bfloat16)
    generator = numbers(51)
    pairs = [(getattr(ours, name)(seed=7), *each) for each in ((one, int), (other, torch.tensor))]
    for n in range(1, 6):
        weights = torch.randn(500, generator=generator).bfloat16()
        for apply, average, counted in pairs:
            apply([average], [weights], counted(n))
    assert torch.equal(one, other)


# -- models that change ----------------------------------------------------------------------------


def test_buffers_from_now_on() -> None:
    model = Network(30)
    averaged = ours.AveragedModel(model)
    truth, generator = Truth(averaged.module, model), numbers(31)
    for n in range(8):
        averaged.use_buffers = n >= 4
        trained(model, generator)
        for name, loop in truth.loops.items():
            copied = n < 4 and not isinstance(tensors(model)[name], nn.Parameter)
            loop.step(array(tensors(model)[name]), 1.0 if copied else 1 / (n + 1))
        averaged.update_parameters(model)
    truth.check(averaged.module, model)


# -- functions and memory --------------------------------------------------------------------------


def test_one_function_for_several_models() -> None:
    shared = function(ours, "ema multi")
    models = [Network(34), Network(35), nn.Linear(2, 2)]
    averages = [theirs.AveragedModel(model, **shared) for model in models]
    truths = [Truth(a.module, m, is_parameter) for a, m in zip(averages, models, strict=True)]
    generator, counts = numbers(36), [0, 0, 0]
    for n in range(60):
        for at in range(3):
            if n % (1, 7, 20)[at]:
                continue
            share = weight("ema", counts[at])
            truths[at].train(models[at], generator, share, averages[at].update_parameters)
            counts[at] += 1
    for averaged, model, truth in zip(averages, models, truths, strict=True):
        truth.check(averaged.module, model)


@pytest.mark.parametrize("side", ["model", "average"])
def test_memory_that_is_no_longer_averaged_is_let_go(side: str) -> None:
    model = Network(37)
    averaged = theirs.AveragedModel(model, **function(ours, "ema multi"))
    for _ in range(3):
        averaged.update_parameters(model)
    changed = model if side == "model" else averaged.module
    old = [StorageWeakRef(one.untyped_storage()) for one in changed.parameters() if one.numel()]
    repointed(changed)
    for _ in range(30):
        averaged.update_parameters(model)
    gc.collect()
    assert [one.expired() for one in old] == [True] * len(old)


def test_copies_for_one_step_are_not_kept() -> None:
    averages = [torch.randn(5, 3, generator=numbers(38)), torch.ones(7)]
    expected = [one.double() for one in averages]
    apply, generator = ours.get_ema_multi_avg_fn(DECAY), numbers(39)
    copies = []
    for n in range(10):
        new = [torch.randn(one.shape, generator=generator) for one in averages]
        copies.append([StorageWeakRef(one.untyped_storage()) for one in new])
        expected = [a + (1 - DECAY) * (x.double() - a) for a, x in zip(expected, new, strict=True)]
        apply(averages, new, n)
        del new
    gc.collect()
    assert all(one.expired() for step in copies for one in step)
    torch.testing.assert_close(averages, [one.float() for one in expected])


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


def test_lists_that_do_not_match() -> None:
    apply = ours.get_ema_multi_avg_fn(0.5)
    apply([], [], 1)
    average = [torch.zeros(3), torch.zeros(2)]
    for wrong in ([torch.ones(3)], [], [torch.ones(3), torch.ones(4)]):
        for _ in range(2):
            with pytest.raises(LayoutError):
                apply(average, wrong, 1)
    assert not any(one.any() for one in average)
    apply(average, [torch.ones(3), torch.ones(2)], 1)
    assert all(torch.all(one == 0.5) for one in average)


def test_integers_and_mixed_dtypes_of_one_tensor() -> None:
    apply = ours.get_ema_avg_fn(0.5)
    places = torch.tensor([2**53 + 1, -3])
    copied = apply(torch.zeros(2, dtype=torch.int64), places, 1)
    assert torch.equal(copied, places)
    assert copied.data_ptr() != places.data_ptr()
    narrow = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    mixed = apply(torch.zeros(2), narrow, torch.tensor(4))
    assert torch.equal(mixed, torch.tensor([0.5, 1.5]))


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


def test_from_ours_to_a_function_of_the_user_and_back() -> None:
    model = Network(45)
    averaged = ours.AveragedModel(model)
    truth, generator = Truth(averaged.module, model, is_parameter), numbers(46)
    for n in range(9):
        averaged.avg_fn = theirs.get_swa_avg_fn() if 3 <= n < 6 else None
        truth.train(model, generator, weight("swa", n), averaged.update_parameters)
    truth.check(averaged.module, model)


def test_the_rest_of_the_module() -> None:
    assert ours.SWALR is theirs.SWALR
    assert ours.update_bn is update_bn
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    loader = [torch.randn(8, 3, generator=numbers(n)) for n in range(3)]
    pair = [module.AveragedModel(model) for module in (ours, theirs)]
    for module, averaged in zip((ours, theirs), pair, strict=True):
        averaged.update_parameters(model)
        module.update_bn(loader, averaged)
    assert snapshot(pair[0]) == snapshot(pair[1])
    assert pair[0].module[1].num_batches_tracked == 3
