"""MMEngine's averaged models: numbers at intervals, and checkpoints of its EMAHook."""

from collections.abc import Callable
from typing import Any

import pytest

from fastema.compat.mmengine import (
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
    export,
    load,
)
from fastema.errors import CheckpointError

from ..support.peers import is_parameter, is_saved_float, named_tensors
from .network import Network, Truth, assert_refused, bits, make_generator, randomize, torch

pytestmark = pytest.mark.torch

AVERAGED = {False: is_parameter, True: is_saved_float}
"""Which tensors are averaged, by ``update_buffers``."""

Weight = Callable[[int, int], float]

KINDS: dict[str, tuple[Callable[..., Any], Weight]] = {
    "swa": (StochasticWeightAverage, lambda n, k: 1 / (n // k + 1)),
    "ema": (lambda model, **o: ExponentialMovingAverage(model, 0.1, **o), lambda n, k: 0.1),
    "annealing": (
        lambda model, **o: MomentumAnnealingEMA(model, 0.1, 3, **o),
        lambda n, k: max(0.1, 3 / (3 + n)),
    ),
}
"""Each class, with MMEngine's weight of the new value by updates so far and interval."""


def peer_exact(kind: str) -> dict[str, bool]:
    return {} if kind == "swa" else {"peer_exact": True}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_averages_at_intervals_match_mmengine(kind: str, update_buffers: bool, dtype: Any) -> None:
    make, weight = KINDS[kind]
    model, generator = Network(1, dtype), make_generator(2)
    average = make(model, interval=3, update_buffers=update_buffers, **peer_exact(kind))
    randomize(model, generator)
    average.update_parameters(model)
    for name, one in named_tensors(average.module).items():
        assert name == "cache" or torch.equal(one, named_tensors(model)[name]), name  # copied first
    truth = Truth(average.module, model, AVERAGED[update_buffers])
    for n in range(1, 20):
        randomize(model, generator)
        average.update_parameters(model)
        if n % 3 == 0:
            truth.step(model, weight(n, 3))
        # Buffers are copied at each update; with update_buffers, averaged at each interval.
        if not update_buffers or n % 3 == 0:
            truth.check(average.module, model)
    assert int(average.steps) == 20
    assert not update_buffers or not torch.equal(average.module.cache, model.cache)


def save_with_hook(average: Any, model: Any) -> dict[str, Any]:
    """Return a checkpoint as the peer's EMAHook saves it, with the two states exchanged."""
    state, ema_state = model.state_dict(), average.state_dict()
    for name in list(ema_state):
        if name.startswith("module."):
            inner = name[len("module.") :]
            ema_state[name], state[inner] = state[inner], ema_state[name]
    copied = {name: one.clone() for name, one in state.items()}
    return {"state_dict": copied, "ema_state_dict": {k: v.clone() for k, v in ema_state.items()}}


def test_ema_hook_checkpoint_round_trips() -> None:
    model, generator = Network(1), make_generator(3)
    average = ExponentialMovingAverage(model, 0.3)
    for _ in range(4):
        randomize(model, generator)
        average.update_parameters(model)
    checkpoint, ours = save_with_hook(average, model), export(average, model)
    assert ours.keys() == checkpoint.keys()
    for part, tensors_of in checkpoint.items():
        assert ours[part].keys() == tensors_of.keys()
        assert all(torch.equal(ours[part][name], one) for name, one in tensors_of.items())
    assert torch.equal(ours["state_dict"]["wide"], average.module.wide)
    assert torch.equal(ours["ema_state_dict"]["module.wide"], model.wide)

    other, raw = ExponentialMovingAverage(Network(5), 0.3), Network(6)
    load(other, checkpoint, raw)
    without = {name: one for name, one in bits(average.module).items() if name != "cache"}
    assert {name: one for name, one in bits(other.module).items() if name != "cache"} == without
    assert all(torch.equal(one, model.state_dict()[k]) for k, one in raw.state_dict().items())
    assert int(other.steps) == 4
    randomize(model, generator)
    for one in (average, other):
        one.update_parameters(model)
    assert torch.equal(average.module.wide, other.module.wide)


def damage(whole: dict[str, Any], part: str | None, name: str | None, one: Any) -> Any:
    """Replace a checkpoint, a part of it or an entry by ``one``; ``...`` removes it."""
    if part is None:
        return one
    inside = {**whole[part], name: one} if name else one
    found = {**whole, part: inside}
    if one is ...:
        del (inside if name else found)[name or part]
    return found


META = torch.empty(257, device="meta")


@pytest.mark.parametrize(
    ("part", "name", "found", "message"),
    [
        (None, None, None, "expected"),
        (None, None, [1], "expected"),
        ("state_dict", None, [1], "expected"),
        ("ema_state_dict", None, torch.ones(2), "expected"),
        ("ema_state_dict", None, {3: torch.ones(2)}, "expected"),
        ("ema_state_dict", None, ..., "EMAHook"),
        ("state_dict", "wide", ..., r"module\.wide"),
        ("ema_state_dict", "steps", 5, "'steps' is of type int, expected a tensor"),
        ("state_dict", "wide", None, r"'module\.wide' is of type NoneType"),
        ("ema_state_dict", "module.wide", None, "'wide' is of type NoneType"),
        ("state_dict", "wide", META, "has no contents"),
    ],
)
def test_malformed_checkpoint_is_refused(
    part: str | None, name: str | None, found: Any, message: str
) -> None:
    model = Network(1)
    average = ExponentialMovingAverage(model, 0.3)
    checkpoint = damage(save_with_hook(average, Network(2)), part, name, found)
    with assert_refused(CheckpointError, message, average, model):
        load(average, checkpoint, model)
