"""Averages in tensors of the user's: one call, every kind of container, no weight lost."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from fastema.binding.binding import Binding
from fastema.compat.averager import ModelAverager
from fastema.errors import ArgumentError, LayoutError, StateError

nn = torch.nn

pytestmark = pytest.mark.torch


def network(seed: int, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 4))
    net[0].to(memory_format=torch.channels_last)
    for p in [*net.parameters(), net[1].running_mean]:
        p.data.normal_()
    net[1].num_batches_tracked.fill_(seed * 1000 + 7)
    return net.to(dtype)


def average_of(net: Any, dtype: Any = torch.float32) -> Any:
    average = copy.deepcopy(net).requires_grad_(False)
    for p in [*average.parameters(), average[1].running_mean]:
        p.data.normal_()
    return average.to(dtype)


def values(net: Any) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def assert_same(got: Any, want: dict[str, Any]) -> None:
    now = values(got) if isinstance(got, nn.Module) else got
    assert list(now) == list(want)
    for name, tensor in want.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor), name


def expected(old: dict[str, Any], x: dict[str, Any], weight: float) -> dict[str, Any]:
    found = {}
    for name, avg in old.items():
        if not avg.is_floating_point():
            found[name] = x[name]
            continue
        a, b = avg.double().numpy(), x[name].double().numpy()
        found[name] = torch.from_numpy(np.asarray(a + weight * (b - a)))
    return found


def assert_close(got: Any, want: dict[str, Any], rtol: float) -> None:
    for name, tensor in want.items():
        now = values(got)[name]
        if tensor.is_floating_point():
            torch.testing.assert_close(now.double(), tensor, rtol=rtol, atol=rtol)
        else:
            assert torch.equal(now, tensor), name


@pytest.fixture(params=["beside", "staged"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Averages with their weights, or as if they were on another device."""
    if request.param == "staged":
        monkeypatch.setattr(ModelAverager, "_is_apart", lambda averager, weights: True)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("where")
def test_update_and_copy(dtype: Any, weights: Any) -> None:
    net = network(1, weights)
    average = average_of(net, dtype)
    averager = ModelAverager(average)
    for step, weight in enumerate((0.25, 0.1, 1.0, 0.5), 1):
        net = network(step + 1, weights) if step == 2 else net
        with torch.no_grad():
            for p in net.parameters():
                p += torch.randn_like(p)
        net[1].num_batches_tracked += 1
        want = expected(values(average), values(net), weight)
        before = values(net)
        averager.update(net, weight, step)
        assert_close(average, want, {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(dtype, 1e-6))
        assert_same(net, before)
    averager.copy(net)
    assert_same(average, {name: t.to(average.state_dict()[name]) for name, t in before.items()})


@pytest.mark.usefixtures("where")
def test_policy_by_the_role_in_the_model() -> None:
    net = network(2)
    net[2].bias.requires_grad_(False)
    average = average_of(net)
    asked: dict[str, str] = {}

    def policy(name: str, role: str) -> Any:
        asked.setdefault(name, role)  # what it would be otherwise is asked as well
        return {"weight": "average", "frozen": "skip", "buffer": "copy"}[role]

    old, x = values(average), values(net)
    ModelAverager(average, policy).update(net, 0.25, 1)
    assert asked["2.bias"] == "frozen"
    assert asked["1.running_mean"] == "buffer"
    now = values(average)
    assert torch.equal(now["2.bias"], old["2.bias"])
    assert torch.equal(now["1.running_mean"], x["1.running_mean"])
    assert torch.equal(now["1.num_batches_tracked"], x["1.num_batches_tracked"])
    torch.testing.assert_close(now["2.weight"], torch.lerp(old["2.weight"], x["2.weight"], 0.25))


@pytest.mark.usefixtures("where")
def test_parameters_that_are_frozen_and_trained_again() -> None:
    net = network(12)
    average = average_of(net)
    averager = ModelAverager(average, lambda name, role: "skip" if role == "frozen" else "average")
    bias = net[2].bias
    for trained in (True, False, False, True):
        bias.requires_grad_(trained)
        old = average[2].bias.clone()
        averager.update(net, 0.5, 1)
        want = torch.lerp(old, bias.detach(), 0.5) if trained else old
        torch.testing.assert_close(average[2].bias, want, rtol=1e-6, atol=1e-6)


def test_policy_is_asked_again_after_forget() -> None:
    average, x = [torch.randn(3), torch.randn(2)], [torch.randn(3), torch.randn(2)]
    copied: set[str] = set()
    averager = ModelAverager(average, lambda name, role: "copy" if name in copied else "average")
    averager.update(x, 0.5, 1)
    assert not torch.equal(average[1], x[1])
    copied.add("1")
    averager.forget()
    averager.update(x, 0.5, 2)
    assert torch.equal(average[1], x[1])
    assert not torch.equal(average[0], x[0])


def test_parameters_given_as_a_new_list_each_time_are_not_looked_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = network(3)
    average = [torch.randn_like(p) for p in net.parameters()]
    averager = ModelAverager(average)
    averager.update(net.parameters(), 0.5, 1)
    monkeypatch.setattr(Binding, "_bind", None)
    averager.update(net.parameters(), 0.5, 2)
    averager.update(list(net.parameters()), 1.0, 3)
    assert all(torch.equal(a, p) for a, p in zip(average, net.parameters(), strict=True))


def test_tensors_that_move_are_found() -> None:
    net = network(4)
    average = average_of(net)
    averager = ModelAverager(average)
    averager.update(net, 0.5, 1)
    net[2].weight.data = torch.randn(4, 7)
    average[2].bias.data = torch.randn(4)
    net[0].load_state_dict({n: t + 1 for n, t in net[0].state_dict().items()}, assign=True)
    want = expected(values(average), values(net), 0.5)
    averager.update(net, 0.5, 2)
    assert_close(average, want, 1e-6)
    average.double()
    want = expected(values(average), values(net), 0.5)
    averager.update(net, 0.5, 3)
    assert_close(average, want, 1e-15)


def test_another_model_is_refused_before_anything_is_written() -> None:
    net = network(5)
    average = average_of(net)
    averager = ModelAverager(average)
    averager.update(net, 0.5, 1)
    before = values(average)
    for other in (net[:2], nn.Sequential(*net, nn.Linear(1, 1)), network(6)[2:]):
        with pytest.raises(LayoutError, match="weight"):
            averager.update(other, 0.5, 2)
    wrong = network(7)
    wrong[2].weight = nn.Parameter(torch.randn(4, 8))
    with pytest.raises(LayoutError, match=r"2\.weight"):
        averager.update(wrong, 0.5, 2)
    assert_same(average, before)
    averager.update(net, 1.0, 2)  # and goes on
    assert_same(average, values(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("where")
def test_swapped_is_exact_and_shows_the_averages(dtype: Any, weights: Any) -> None:
    net = network(8, weights)
    average = average_of(net, dtype)
    averager = ModelAverager(average)
    raw, old = values(net), values(average)
    versions = [p._version for p in net.parameters()]

    def evaluate() -> None:
        for name, tensor in values(net).items():
            given = old[name].to(raw[name].dtype)
            torch.testing.assert_close(tensor, given, rtol=0.008, atol=1e-30)
        shown = {name: tensor.clone() for name, tensor in averager.averages().items()}
        assert set(shown) == set(old)
        for name, tensor in old.items():
            assert torch.equal(shown[name], tensor), name
        for call in (
            lambda: averager.update(net, 0.5, 1),
            lambda: averager.copy(net),
            lambda: averager.give(net),
            lambda: averager.swapped(net).__enter__(),
            lambda: copy.copy(averager),
        ):
            with pytest.raises(StateError, match="holds the average"):
                call()
        raise RuntimeError("evaluation went wrong")

    def evaluate_swapped() -> None:
        with averager.swapped(net):
            evaluate()

    with pytest.raises(RuntimeError, match="evaluation"):
        evaluate_swapped()
    assert_same(net, raw)
    assert_same(average, old)
    assert [p._version for p in net.parameters()] == versions  # a graph that needs them is right
    averager.update(net, 1.0, 1)


def _there_and_back(net: Any) -> None:
    dtype = net[0].bias.dtype
    net.half()
    net.to(dtype)


ACTIONS: dict[str, Any] = {
    "cast": lambda net: net.double(),
    "cast and back": _there_and_back,
    "pointed elsewhere": lambda net: setattr(net[2].weight, "data", net[2].weight.data.clone()),
    "assigned": lambda net: net.load_state_dict(
        {name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True
    ),
    "replaced": lambda net: setattr(net[2], "bias", nn.Parameter(torch.randn(4))),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("side", ["weights", "averages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("where")
def test_what_moves_inside_the_block_gets_its_own_contents(
    action: str, side: str, dtype: Any
) -> None:
    net = network(13, dtype)
    average = average_of(net)
    averager = ModelAverager(average)
    raw, old = values(net), values(average)
    with averager.swapped(net):
        ACTIONS[action](net if side == "weights" else average)
    for name, tensor in values(net).items():
        assert torch.equal(tensor.to(raw[name].dtype), raw[name]), name
    if (
        side == "averages"
        and averager._stage is not None
        and action in ("cast and back", "replaced")
    ):
        return  # they were not lent: what is done to them is done to them
    for name, tensor in values(average).items():
        assert torch.equal(tensor.to(old[name].dtype), old[name]), name


@pytest.mark.usefixtures("where")
def test_what_is_taken_away_inside_the_block_is_named_and_the_rest_comes_back() -> None:
    net = network(14)
    average = average_of(net)
    raw, old = values(net), values(average)

    def remove() -> None:
        with ModelAverager(average).swapped(net):
            del net[2].bias

    with pytest.raises(LayoutError, match=r"'2\.bias' is gone"):
        remove()
    del raw["2.bias"]
    assert_same(net, raw)
    assert_same(average, old)


@pytest.mark.usefixtures("where")
def test_blocks_are_checked_as_they_begin() -> None:
    net = network(15)
    average = average_of(net)
    averager = ModelAverager(average)
    one, two = averager.swapped(net), averager.swapped(net)
    with torch.no_grad():
        net[2].weight.mul_(3)
    raw, old = values(net), values(average)
    with one, pytest.raises(StateError, match="holds the average"):
        two.__enter__()
    assert_same(net, raw)
    assert_same(average, old)


@pytest.mark.usefixtures("where")
def test_tied_weights_of_a_model_elsewhere() -> None:
    net = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    net[1].weight = net[0].weight
    average = copy.deepcopy(net).requires_grad_(False)
    averager = ModelAverager(average)
    for step in range(1, 4):
        with torch.no_grad():
            net[0].weight.normal_()
        old = average[0].weight.clone()
        averager.update(net, 0.1, step)
        torch.testing.assert_close(average[1].weight, torch.lerp(old, net[0].weight.detach(), 0.1))
    raw, averaged = net[0].weight.detach().clone(), average[0].weight.clone()
    with averager.swapped(net):
        assert torch.equal(net[1].weight, averaged)
    assert torch.equal(net[1].weight, raw)
    net[1].weight = nn.Parameter(torch.randn(5, 5))  # tied no more
    with pytest.raises(LayoutError, match="overlap"):
        averager.update(net, 0.1, 4)


@pytest.mark.usefixtures("where")
def test_a_larger_model_is_refused_wherever_it_is() -> None:
    net = network(16)
    average = average_of(net)
    averager = ModelAverager(average)
    averager.update(net, 0.5, 1)
    before = values(average)
    net.register_parameter("more", nn.Parameter(torch.randn(2)))
    with pytest.raises(LayoutError, match="'more' is only in the model"):
        averager.update(net, 0.5, 2)
    assert_same(average, before)


@pytest.mark.usefixtures("where")
def test_check_writes_nothing_and_says_what_an_update_would() -> None:
    net = network(19)
    average = average_of(net)
    averager, before = ModelAverager(average), values(average)
    averager.check(net)
    assert_same(average, before)
    net.register_parameter("more", nn.Parameter(torch.randn(2)))
    with pytest.raises(LayoutError, match="'more' is only in the model"):
        averager.check(net)


@pytest.mark.usefixtures("where")
def test_a_model_is_not_kept_alive() -> None:
    net = network(17)
    average = average_of(net)
    averager = ModelAverager(average)
    averager.update(net, 0.5, 1)
    with averager.swapped(net):
        pass
    weight = weakref.ref(net[2].weight)
    del net
    gc.collect()
    assert weight() is None
    averager.update(network(18), 0.5, 2)


@pytest.mark.usefixtures("where")
def test_give() -> None:
    net = network(9, torch.bfloat16)
    average = average_of(net)
    average[1].num_batches_tracked.fill_(3)
    averager = ModelAverager(average, lambda name, role: "skip" if name == "2.bias" else "average")
    raw = values(net)
    averager.give(net)
    now = values(net)
    assert torch.equal(now.pop("2.bias"), raw["2.bias"])
    for name, tensor in now.items():
        assert torch.equal(tensor, average.state_dict()[name].to(tensor.dtype)), name


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_follows_with_averages_of_its_own(duplicate: Any) -> None:
    net = network(10)
    average = average_of(net)
    holder = {"average": average, "averager": ModelAverager(average)}
    holder["averager"].update(net, 0.5, 1)
    other = duplicate(holder)
    before = values(average)
    other["averager"].update(net, 1.0, 2)
    assert_same(average, before)
    assert_same(other["average"], values(net))


def test_random_bits_depend_on_the_step_alone() -> None:
    net = network(11, torch.bfloat16)
    averages = [average_of(net, torch.bfloat16)]
    averages += [copy.deepcopy(averages[0]) for _ in range(3)]
    followers = [
        ModelAverager(one, seed=seed) for one, seed in zip(averages, (1, 1, 1, 2), strict=True)
    ]
    followers[1].update(copy.deepcopy(averages[1]), 0.0, 5)  # a call more
    for averager, step in zip(followers, (9, 9, 10, 9), strict=True):
        averager.update(net, 0.01, step)
    assert_same(averages[1], values(averages[0]))
    for other in averages[2:]:
        assert not torch.equal(other[2].weight, averages[0][2].weight)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="rounding"):
        ModelAverager([], rounding="up")
    with pytest.raises(ArgumentError, match="seed"):
        ModelAverager([], seed=-1)
