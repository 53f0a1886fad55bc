"""Averages in tensors of the user's: one call, every kind of container, no weight lost."""

import copy
from typing import Any

import pytest
import torch

from fastema.compat.averager import ModelAverager
from fastema.errors import LayoutError, StateError

from ..support.peers import is_float, named_tensors
from .network import Network, Truth, bits, refused

nn = torch.nn

pytestmark = pytest.mark.torch


def made(
    seed: int, weights: Any = torch.float32, averages: Any = torch.float32, policy: Any = None
) -> tuple[Any, Any, Any]:
    """A model, an average of other values, and what updates it."""
    net: Any = Network(seed, weights)
    average: Any = Network(seed + 100, averages).requires_grad_(False)
    return net, average, ModelAverager(average, policy)


def copied(model: Any) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def assert_back(model: Any, before: dict[str, Any]) -> None:
    """The values of before, in whatever dtypes they are now."""
    now = named_tensors(model)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name].to(tensor.dtype), tensor), name


@pytest.fixture(params=["beside", "staged"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Averages with their weights, or as if they were on another device."""
    if request.param == "staged":
        monkeypatch.setattr(ModelAverager, "_devices_differ", lambda averager, weights: True)
    return str(request.param)


WHERE = pytest.mark.usefixtures("where")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16]
)
WEIGHTS = pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])


def test_tensors_that_move_are_found() -> None:
    net, average, averager = made(4)
    averager.update(net, 0.5, 1)
    net.wide.data = torch.randn(257)
    average.frozen.data = torch.randn(33)
    net.conv.load_state_dict({n: t + 1 for n, t in net.conv.state_dict().items()}, assign=True)
    for step, dtype in ((2, torch.float32), (3, torch.float64)):
        average.to(dtype)
        truth = Truth(average, net, is_float)
        truth.step(net, 0.5)
        averager.update(net, 0.5, step)
        truth.check(average, net)


def changed(name: str, part: Any) -> Any:
    net = Network(5, torch.float32)
    setattr(net, name, part)
    return net


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (changed("wide", None), "wide"),
        (changed("more", nn.Linear(1, 1)), "'more.weight' is only in the model"),
        (changed("wide", nn.Parameter(torch.randn(8))), "wide"),
        (nn.Linear(3, 2), "weight"),
    ],
)
@WHERE
def test_another_model_is_refused_before_anything_is_written(other: Any, words: str) -> None:
    net, average, averager = made(5)
    before = bits(average)
    averager.check(net)
    assert bits(average) == before
    with refused(LayoutError, words, average):
        averager.check(other)
    averager.update(net, 0.5, 1)
    with refused(LayoutError, words, average):
        averager.update(other, 0.5, 2)
    averager.update(net, 1.0, 2)  # and goes on
    assert bits(average) == bits(net)


@DTYPES
@WEIGHTS
@WHERE
def test_swapped_is_exact_and_shows_the_averages(dtype: Any, weights: Any) -> None:
    net, average, averager = made(8, weights, dtype)
    raw, old = bits(net), copied(average)
    versions = [p._version for p in net.parameters()]

    def evaluate() -> None:
        for name, tensor in named_tensors(net).items():
            given = old[name].to(tensor.dtype)
            torch.testing.assert_close(tensor.detach(), given, rtol=0.008, atol=1e-30)
        shown = averager.averages()
        assert shown.keys() == {*old, "head.weight"}
        assert bits({name: shown[name] for name in old}) == bits(old)
        for call in (
            lambda: averager.update(net, 0.5, 1),
            lambda: averager.copy(net),
            lambda: averager.write_to(net),
            lambda: averager.swapped(net).__enter__(),
            lambda: copy.copy(averager),
        ):
            with pytest.raises(StateError, match="holds the average"):
                call()
        raise RuntimeError("evaluation went wrong")

    with pytest.raises(RuntimeError, match="evaluation"), averager.swapped(net):
        evaluate()
    assert bits(net) == raw
    assert bits(average) == bits(old)
    assert [p._version for p in net.parameters()] == versions  # a graph that needs them is right
    averager.update(net, 1.0, 1)


def _there_and_back(net: Any) -> None:
    dtype = net.wide.dtype
    net.half()
    net.to(dtype)


ACTIONS: dict[str, Any] = {
    "cast": lambda net: net.double(),
    "cast and back": _there_and_back,
    "pointed elsewhere": lambda net: setattr(net.wide, "data", net.wide.data.clone()),
    "assigned": lambda net: net.load_state_dict(
        {name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True
    ),
    "replaced": lambda net: setattr(net, "frozen", nn.Parameter(torch.randn(33))),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("side", ["weights", "averages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@WHERE
def test_what_moves_inside_the_block_gets_its_own_contents(
    action: str, side: str, dtype: Any
) -> None:
    net, average = (
        Network(seed, of, tied=False) for seed, of in ((13, dtype), (14, torch.float32))
    )
    averager = ModelAverager(average)
    raw, old = copied(net), copied(average)
    with averager.swapped(net):
        ACTIONS[action](net if side == "weights" else average)
    assert_back(net, raw)
    if (
        side == "averages"
        and averager._stage is not None
        and action in ("cast and back", "replaced")
    ):
        return  # they were not lent: what is done to them is done to them
    assert_back(average, old)


@WHERE
def test_parameters_that_are_frozen_and_trained_again() -> None:
    net, average, averager = made(
        12, policy=lambda name, role: "skip" if role == "frozen" else "average"
    )
    for is_trained in (True, False, False, True):
        net.wide.requires_grad_(is_trained)
        old = average.wide.clone()
        averager.update(net, 0.5, 1)
        want = torch.lerp(old, net.wide.detach(), 0.5) if is_trained else old
        torch.testing.assert_close(average.wide, want, rtol=1e-6, atol=1e-6)
