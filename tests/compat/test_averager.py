"""ModelAverager: averages kept in the user's own tensors, without losing a weight."""

import copy
from typing import Any

import pytest
import torch

from fastema.compat.averager import ModelAverager
from fastema.errors import LayoutError, StateError

from ..support.peers import is_float, named_tensors
from .network import Network, Truth, assert_refused, bits

nn = torch.nn

pytestmark = pytest.mark.torch


def build(
    seed: int, weights: Any = torch.float32, averages: Any = torch.float32, policy: Any = None
) -> tuple[Any, Any, Any]:
    """Build a model, an average with other values, and its averager."""
    net: Any = Network(seed, weights)
    average: Any = Network(seed + 100, averages).requires_grad_(False)
    return net, average, ModelAverager(average, policy)


def clone_tensors(model: Any) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def assert_values(model: Any, before: dict[str, Any]) -> None:
    """Assert that a model holds these values, in whatever dtypes it now has."""
    now = named_tensors(model)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name].to(tensor.dtype), tensor), name


@pytest.fixture(params=["beside", "staged"])
def placement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Place averages beside their weights, or stage them as if on another device."""
    if request.param == "staged":
        monkeypatch.setattr(ModelAverager, "_devices_differ", lambda averager, weights: True)
    return str(request.param)


PLACEMENTS = pytest.mark.usefixtures("placement")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16]
)
WEIGHTS = pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])


def test_moved_tensors_are_located_again() -> None:
    net, average, averager = build(4)
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


def network_with(name: str, part: Any) -> Any:
    net = Network(5, torch.float32)
    setattr(net, name, part)
    return net


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (network_with("wide", None), "wide"),
        (network_with("more", nn.Linear(1, 1)), "'more.weight' is only in the model"),
        (network_with("wide", nn.Parameter(torch.randn(8))), "wide"),
        (nn.Linear(3, 2), "weight"),
    ],
)
@PLACEMENTS
def test_mismatched_model_is_refused_before_any_write(other: Any, words: str) -> None:
    net, average, averager = build(5)
    before = bits(average)
    averager.check(net)
    assert bits(average) == before
    with assert_refused(LayoutError, words, average):
        averager.check(other)
    averager.update(net, 0.5, 1)
    with assert_refused(LayoutError, words, average):
        averager.update(other, 0.5, 2)
    averager.update(net, 1.0, 2)  # still works
    assert bits(average) == bits(net)


@DTYPES
@WEIGHTS
@PLACEMENTS
def test_swapped_shows_averages_and_restores_every_bit(dtype: Any, weights: Any) -> None:
    net, average, averager = build(8, weights, dtype)
    raw, old = bits(net), clone_tensors(average)
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
    assert [p._version for p in net.parameters()] == versions  # autograd graphs stay valid
    averager.update(net, 1.0, 1)


def _cast_and_back(net: Any) -> None:
    dtype = net.wide.dtype
    net.half()
    net.to(dtype)


ACTIONS: dict[str, Any] = {
    "cast": lambda net: net.double(),
    "cast and back": _cast_and_back,
    "pointed elsewhere": lambda net: setattr(net.wide, "data", net.wide.data.clone()),
    "assigned": lambda net: net.load_state_dict(
        {name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True
    ),
    "replaced": lambda net: setattr(net, "frozen", nn.Parameter(torch.randn(33))),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("side", ["weights", "averages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@PLACEMENTS
def test_tensors_moved_inside_swapped_get_their_contents_back(
    action: str, side: str, dtype: Any
) -> None:
    net, average = (
        Network(seed, of, tied=False) for seed, of in ((13, dtype), (14, torch.float32))
    )
    averager = ModelAverager(average)
    raw, old = clone_tensors(net), clone_tensors(average)
    with averager.swapped(net):
        ACTIONS[action](net if side == "weights" else average)
    assert_values(net, raw)
    if (
        side == "averages"
        and averager._stage is not None
        and action in ("cast and back", "replaced")
    ):
        return  # staged averages are not swapped, so they keep this change
    assert_values(average, old)


@PLACEMENTS
def test_frozen_parameters_are_averaged_again_when_unfrozen() -> None:
    net, average, averager = build(
        12, policy=lambda name, role: "skip" if role == "frozen" else "average"
    )
    for is_trained in (True, False, False, True):
        net.wide.requires_grad_(is_trained)
        old = average.wide.clone()
        averager.update(net, 0.5, 1)
        want = torch.lerp(old, net.wide.detach(), 0.5) if is_trained else old
        torch.testing.assert_close(average.wide, want, rtol=1e-6, atol=1e-6)
