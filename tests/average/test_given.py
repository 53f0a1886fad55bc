"""Averages in tensors of the user's own: `into=`."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastema
from fastema.engine.threads import TEAM
from fastema.errors import (
    ArgumentError,
    CheckpointError,
    LayoutError,
    StateError,
)
from fastema.kernels.run_table import PARALLEL

from .truth import Loops, arithmetic_of
from .weights import (
    BUFFERS,
    FLOATS,
    assert_bits,
    assert_same,
    bits,
    layers,
    net,
    snapshot,
    train_,
    values,
)

pytestmark = pytest.mark.torch


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: one.double().numpy() for name, one in values(model).items()}


# -- updates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("weights", FLOATS)
def test_given_average_equals_a_float64_loop(weights: str, stored: str) -> None:
    model, target = layers(FLOATS[weights]), layers(FLOATS[stored], seed=1)
    raw = snapshot(target)
    ema = fastema.EMA(model, decay=0.75, into=target)
    assert_bits(target, raw)  # construction writes nothing
    loops = Loops(arrays(target), stored, arithmetic_of(weights, stored), stored in ("f16", "bf16"))
    for seed in range(2, 42):
        train_(model, [seed], ema)
        loops.step(arrays(model), 0.25)
        loops.check(arrays(target))
    assert ema.num_updates == 40
    assert_same({name: bits(one) for name, one in ema.shadow.items()}, snapshot(target))


@pytest.mark.parametrize(
    "make", [list, tuple, lambda one: dict(enumerate(one))], ids=["list", "tuple", "dict"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lists_and_dicts_of_arrays_hold_averages(make: Callable[[Any], Any], dtype: Any) -> None:
    random = np.random.default_rng(1)
    x, y = ([random.standard_normal((3, 7)).astype(dtype) for _ in range(2)] for _ in range(2))
    ema = fastema.EMA(make(x), decay=0.5, into=make(y))
    expected = [one + (other - one) / 2 for one, other in zip(y, x, strict=True)]
    ema.update()
    for one, wanted in zip(y, expected, strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-6)


def test_given_and_owned_averages_have_the_same_bits() -> None:
    model = layers(torch.bfloat16)
    target = copy.deepcopy(model)
    options: dict[str, Any] = {"decay": 0.9, "seed": 7, "update_every": 2}
    given, owned = fastema.EMA(model, into=target, **options), fastema.EMA(model, **options)
    train_(model, range(1, 50), given, owned)
    assert_same(snapshot(target), {name: bits(one) for name, one in owned.shadow.items()})


@pytest.mark.parametrize("buffers", ["copy", "average", "skip"])
def test_buffers_are_what_was_asked_for(buffers: Any) -> None:
    model, target = net(0), net(1)
    old = values(target)
    fastema.EMA(model, decay=0.5, into=target, buffers=buffers).update()
    new, now = values(model), values(target)
    for name in BUFFERS:
        if buffers == "skip":
            expected = old[name]
        elif buffers == "average" and new[name].is_floating_point():
            expected = (old[name] + new[name]) / 2
        else:
            expected = new[name]
        torch.testing.assert_close(now[name], expected)


def test_buffers_must_be_asked_for() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)'norm.running_mean'.*buffers='copy'.*'skip'"):
        fastema.EMA(net(0), into=net(1))
    fastema.EMA(layers(), into=layers())


def test_sync_copies_the_weights_and_counts_no_update() -> None:
    model, target = layers(), layers(torch.bfloat16, seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    before = ema.version
    ema.sync()
    assert_bits(target, snapshot(copy.deepcopy(model).bfloat16()))
    assert (ema.num_updates, ema.version) == (0, before + 1)


def test_followed_optimizer_updates_a_given_average() -> None:
    model, target = layers(), layers(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    ema.follow(optimizer)
    old = values(target)
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    for name, one in values(target).items():
        torch.testing.assert_close(one, (old[name] + values(model)[name]) / 2)


def test_every_write_counts_for_autograd() -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    count = [one._version for one in target.parameters()]
    calls: list[Callable[[], None]] = [ema.update, ema.update, ema.update, ema.sync]
    calls += [lambda: ema.load_state_dict(ema.state_dict()), ema.apply_shadow]
    before = [0]
    for call in calls:
        before = count
        call()
        now = [one._version for one in target.parameters()]
        assert all(new > old for new, old in zip(now, count, strict=True))
        count = now
    ema.restore()  # a graph recorded before the swap stays valid
    assert [one._version for one in target.parameters()] == before
    loss = target(torch.ones(1, 5)).sum()
    ema.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_means_overwrite_only_if_asked_to() -> None:
    model = layers()
    for build in (fastema.SWA, lambda *a, **o: fastema.PowerEMA(*a, 0.1, **o)):
        target = layers(seed=1)
        with pytest.raises(ArgumentError, match="overwrite=True"):
            build(model, into=target)
        build(model, into=target, overwrite=True).update()
        assert_bits(target, snapshot(model))
    for options in ({"zero_debias": True}, {"start_after": 3}):
        with pytest.raises(ArgumentError, match="overwrite=True"):
            fastema.EMA(model, into=layers(), **options)  # type: ignore[arg-type]


# -- swaps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("weights", FLOATS)
def test_swapped_model_holds_the_average_and_gets_its_weights_back(
    weights: str, stored: str
) -> None:
    model, target = layers(FLOATS[weights]), layers(FLOATS[stored], seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    train_(model, range(2, 5), ema)
    raw, average, held = snapshot(model), snapshot(target), values(target)
    with pytest.raises(ZeroDivisionError), ema.swapped():  # noqa: PT012
        for name, one in values(model).items():
            torch.testing.assert_close(
                one, held[name].to(one.dtype), atol=0, rtol=torch.finfo(one.dtype).eps
            )
        assert_same({name: bits(one) for name, one in ema.shadow.items()}, average)
        with pytest.raises(StateError, match="applied"):
            ema.update()
        raise ZeroDivisionError
    assert_bits(model, raw)
    assert_bits(target, average)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_weights_that_are_written_in_the_target_are_reported(dtype: torch.dtype) -> None:
    model, target = layers(dtype), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    for _ in range(2):
        with (
            pytest.raises(StateError, match=r"(?s)raw weights.*are lost.*'0\.bias'"),
            ema.swapped(),
            torch.no_grad(),
        ):
            target[0].bias.zero_()
        assert not ema.applied
        with ema.swapped():
            for one in target.parameters():
                one.data = one.data.clone()


def test_averages_that_hold_no_raw_weights_may_be_written_while_applied() -> None:
    model, target = layers(torch.float16), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    raw = snapshot(model)
    with ema.swapped(), torch.no_grad():
        target[0].bias.fill_(7)
    assert_bits(model, raw)
    assert (target[0].bias == 7).all()


def test_weights_replaced_in_the_block_are_restored() -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    raw, average = snapshot(model), snapshot(target)
    with ema.swapped():
        for module in (model, target):
            for one in module.parameters():
                one.data = one.data.clone()
    assert_bits(model, raw)
    assert_bits(target, average)


# -- tensors that move ---------------------------------------------------------------------------


def _assign(target: nn.Module) -> None:
    target.load_state_dict(values(target), assign=True)


def _replace(target: nn.Module) -> None:
    target[0].weight = nn.Parameter(target[0].weight.detach().clone())  # type: ignore[index]


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "cast": lambda target: target.double(),
    "data": lambda target: [setattr(p, "data", p.data.clone()) for p in target.parameters()],
    "assigned": _assign,
    "replaced": _replace,
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("updates", [0, 1, 5])
def test_moved_tensors_are_found_again(move: str, updates: int) -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    train_(model, range(2, 2 + updates), ema)
    MOVES[move](target)
    old = values(target)
    assert_same({name: bits(one) for name, one in ema.shadow.items()}, snapshot(target))
    assert list(ema.state_dict())[1:] == [f"shadow.0.{name}" for name in old]
    train_(model, [9], ema)
    for name, one in values(target).items():
        torch.testing.assert_close(one, (old[name] + values(model)[name].to(one.dtype)) / 2)


def test_tensors_replaced_and_put_back_are_read_and_loaded() -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    ema.update()
    old = target[0].weight
    target[0].weight = nn.Parameter(torch.zeros_like(old))
    assert not ema.shadow["0.weight"].any()
    target[0].weight = old
    assert ema.shadow["0.weight"].data_ptr() == old.data_ptr()
    state = ema.state_dict()
    assert_same(
        {k.removeprefix("shadow.0."): bits(v) for k, v in state.items() if k != "fastema"},
        snapshot(target),
    )
    state["shadow.0.0.weight"].fill_(7)
    ema.load_state_dict(state)
    assert (old == 7).all()


def test_tensors_that_a_refused_update_found_are_forgotten() -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    ema.update()
    old, trained = target[0].weight, model[1].weight
    target[0].weight = nn.Parameter(torch.zeros_like(old))
    model[1].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(LayoutError, match=r"1\.weight"):
        ema.update()
    target[0].weight, model[1].weight = old, trained
    assert ema.shadow["0.weight"].data_ptr() == old.data_ptr()


def test_every_reader_finds_moved_tensors() -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    ema.update()
    other = layers(seed=2)

    def copied() -> dict[str, torch.Tensor]:
        ema.copy_to(other)
        return values(other)

    readers: list[Callable[[], dict[str, torch.Tensor]]]
    readers = [copied, ema.model_state_dict, lambda: dict(ema.shadow)]
    for value, read in enumerate(readers):
        filled = {name: torch.full_like(one, value) for name, one in values(target).items()}
        target.load_state_dict(filled, assign=True)
        assert all((one == value).all() for one in read().values())
    x, y = [torch.zeros(3)], [torch.ones(3)]
    ema = fastema.EMA(x, decay=0.5, into=y)
    y[0] = torch.full((3,), 5.0)
    assert (ema.averaged()[0] == 5).all()


@pytest.mark.parametrize("weights", ["bf16", "f16", "f32"])
def test_average_whose_tensors_move_while_it_is_applied_can_be_read(weights: str) -> None:
    model, target = layers(FLOATS[weights]), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    ema.update()
    expected = {name: bits(one) for name, one in ema.shadow.items()}
    with ema.swapped():
        for one in target.parameters():
            old, one.data = one.data, one.data.clone()
            old.fill_(9)
        assert_same({name: bits(one) for name, one in ema.shadow.items()}, expected)


def test_state_is_not_loaded_into_the_model() -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    state, raw = ema.state_dict(), snapshot(model)
    target.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    with pytest.raises(LayoutError, match="overlap"):
        ema.load_state_dict(state)
    assert_bits(model, raw)


def test_steps_on_threads_of_our_own_count_for_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastema.engine.cpu.BYTES_PER_HELPER", 1)
    model, target = [torch.zeros(50_000) for _ in range(4)], [torch.ones(50_000) for _ in range(4)]
    ema = fastema.EMA(model, decay=0.5, into=target)
    threads = TEAM.copy()
    fastema.set_num_threads(2)
    TEAM[PARALLEL] = 0
    try:
        for _ in range(4):
            count = target[0]._version
            ema.update()
            assert target[0]._version > count
    finally:
        TEAM[:] = threads


def test_target_that_no_longer_fits_is_refused_and_nothing_written() -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, decay=0.5, into=target)
    ema.update()
    target[0].weight = nn.Parameter(torch.ones(2, 5))
    raw = snapshot(target)
    for call in (ema.update, ema.state_dict, lambda: ema.shadow["0.weight"]):
        with pytest.raises(LayoutError, match=r"(?s)into=.*'0\.weight' is \[2, 5\], was \[17, 5\]"):
            call()
    assert_bits(target, raw)
    del target[0].bias
    target[0].register_parameter("bias", None)
    with pytest.raises(LayoutError, match=r"'0\.bias' is missing"):
        ema.update()
    assert ema.num_updates == 1


# -- states --------------------------------------------------------------------------------------


def test_state_continues_to_the_bit_in_given_and_owned_memory() -> None:
    model = layers(torch.bfloat16)
    target = copy.deepcopy(model)
    ema = fastema.EMA(model, decay=0.9, seed=3, into=target)
    train_(model, range(1, 8), ema)
    state = ema.state_dict()
    raw = snapshot(model)
    train_(model, range(8, 20), ema)
    expected = snapshot(target)
    fresh = layers(torch.bfloat16, seed=5)
    for other in (
        fastema.EMA(model, decay=0.9, into=fresh),
        fastema.EMA(model, decay=0.9, rounding="nearest"),
    ):
        other.load_state_dict(state)
        assert other.num_updates == 7
        train_(model, range(8, 20), other)
        assert_same({name: bits(one) for name, one in other.shadow.items()}, expected)
    assert any(not torch.equal(raw[name], one) for name, one in snapshot(model).items())


@pytest.mark.parametrize("applied", [False, True])
def test_state_without_tensors_needs_the_same_target(applied: bool) -> None:
    model, target = layers(torch.bfloat16), layers(torch.bfloat16, seed=1)
    ema = fastema.EMA(model, decay=0.9, seed=3, into=target)
    train_(model, range(2, 8), ema)
    saved = copy.deepcopy(target.state_dict())
    if applied:
        with ema.swapped():
            state = ema.state_dict(tensors=False)
    else:
        state = ema.state_dict(tensors=False)
    assert list(state) == ["fastema"]
    train_(model, range(8, 12), ema)
    expected = snapshot(target)
    with pytest.raises(CheckpointError, match="other tensors than into= holds"):
        ema.load_state_dict(state)
    assert_bits(target, expected)
    fresh = layers(torch.bfloat16, seed=5)
    fresh.load_state_dict(saved)
    resumed = fastema.EMA(model, decay=0.9, into=fresh)
    resumed.load_state_dict(state)
    train_(model, range(8, 12), resumed)
    assert_bits(fresh, expected)
    assert resumed.num_updates == 10
    owned = fastema.EMA(model)
    with pytest.raises(CheckpointError, match="has no averages"):
        owned.load_state_dict(state)
    with pytest.raises(ArgumentError, match="tensors=False"):
        owned.state_dict(tensors=False)


def test_state_that_does_not_fit_changes_nothing() -> None:
    target = layers(seed=1)
    ema = fastema.EMA(layers(), into=target)
    raw = snapshot(target)
    with pytest.raises(CheckpointError):
        ema.load_state_dict(fastema.EMA([torch.ones(3)]).state_dict())
    assert_bits(target, raw)


def test_copies_of_a_given_average_are_new_tensors() -> None:
    model, target = layers(), layers(seed=1)
    ema = fastema.EMA(model, into=target)
    state = ema.model_state_dict()
    other = layers(seed=2)
    ema.copy_to(other)
    assert_bits(other, snapshot(target))
    for name, one in state.items():
        assert torch.equal(one, values(target)[name])
        assert one.data_ptr() != dict(target.named_parameters())[name].data_ptr()
    with pytest.raises(LayoutError, match="overlap"):
        ema.copy_to(target)
