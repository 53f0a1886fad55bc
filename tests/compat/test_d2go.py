"""D2Go's schedule, and its checkpoints loaded into and exported from fastema.EMA."""

from typing import Any

import pytest

import fastema
from fastema.compat import d2go
from fastema.errors import ArgumentError
from fastema.rules import rule_from_dict

from ..support.peers import named_tensors
from .network import Network, assert_load_refused, make_generator, randomize, torch

pytestmark = pytest.mark.torch


def average_of(model: Any, rule: Any = 0.9, **options: Any) -> fastema.EMA:
    return fastema.EMA(model, rule, **{"frozen": "average", "buffers": "average", **options})


class EMAState:
    """D2Go's EMAState: a dict of parameters and buffers by name, all averaged."""

    def __init__(self, model: Any, decay: float, factor: float) -> None:
        self.decay, self.factor, self.n = decay, factor, 0
        self.state = {name: one.detach().clone() for name, one in named_tensors(model).items()}

    def update(self, model: Any) -> None:
        decay = self.decay
        if self.factor >= 0:
            self.n += 1
            decay = min(decay, (1 + self.n) / (self.factor + self.n))
        for name, one in named_tensors(model).items():
            avg = self.state[name]
            avg.copy_(avg * decay + one * (1 - decay))  # truncates integers

    def check(self, ema: fastema.EMA, rtol: float = 1e-5) -> None:
        for name in ema.averaged_names:
            torch.testing.assert_close(ema.shadow[name], self.state[name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("factor", [-1, 0, 1, 10, 25.5])
def test_rule_matches_d2gos_schedule(factor: float) -> None:
    rule = d2go.rule(0.99, factor)
    for n in (1, 2, 30, 10_000):
        want = 0.99 if factor < 0 else min(0.99, (1 + n) / (factor + n))
        assert rule.decay(n) == want
    assert rule_from_dict(rule.to_dict()) == rule
    with pytest.raises(ArgumentError):
        d2go.rule(1.5, factor)


@pytest.mark.parametrize("factor", [-1, 10])
def test_averages_match_and_state_moves_both_ways(factor: float) -> None:
    model, generator = Network(1), make_generator(2)
    peer, ema = EMAState(model, 0.9, factor), average_of(model, d2go.rule(0.9, factor))
    for _ in range(8):
        randomize(model, generator)
        peer.update(model)
        ema.update()
    peer.check(ema)
    assert torch.equal(ema.shadow["places"], model.places)
    assert not torch.equal(peer.state["places"], model.places)  # truncated

    other = average_of(Network(5), d2go.rule(0.9, factor))  # continue their run with ours
    d2go.load(other, {"ema_state": peer.state, "model": {}}, num_updates=8)
    assert other.num_updates == 8
    held = peer.state.keys() - {"cache"}  # not in the state dict
    assert all(torch.equal(other.shadow[name], peer.state[name]) for name in held)
    assert d2go.export(ema)["ema_state"].keys() == held
    saved = d2go.export(ema, model)["ema_state"]  # continue our run with theirs
    assert saved.keys() == peer.state.keys()
    assert torch.equal(saved["cache"], model.cache)
    assert saved["cache"].data_ptr() != model.cache.data_ptr()
    back = EMAState(model, 0.9, factor)
    back.state, back.n = saved, peer.n
    for _ in range(5):
        randomize(model, generator)
        peer.update(model)
        back.update(model)
        other.update(model)
    for one in (peer, back):
        one.check(other)


def state_with(**others: Any) -> dict[str, Any]:
    state = {name: one.detach().clone() for name, one in named_tensors(Network(1)).items()}
    state |= others
    return {name: one for name, one in state.items() if one is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (state_with(wide=None), r"'wide' is missing"),
        (state_with(more=torch.ones(2)), r"'more' is unexpected"),
        (state_with(wide=torch.ones(3)), r"'wide' is \[3\], expected \[257\]"),
        (state_with(wide=torch.ones(257, dtype=torch.int64)), r"'wide' is i64, expected f64"),
        ({"ema_state": [1, 2]}, "mapping of names"),
        ({"ema_state": None}, "mapping of names"),
        (None, "the checkpoint is of type NoneType"),
        ([1], "the checkpoint is of type list"),
        ({3: torch.ones(1)}, "the key 3"),
        ({**state_with(), "wide": None}, "'wide' is of type NoneType, expected a tensor"),
        (state_with(wide=torch.empty(257, device="meta")), "'wide' has no contents"),
        (state_with(wide=torch.ones(257).to_sparse()), "expected a dense tensor"),
    ],
)
def test_malformed_state_is_refused_and_changes_nothing(state: Any, message: str) -> None:
    ema = average_of(Network(2))
    with assert_load_refused(ema, message):
        d2go.load(ema, state, num_updates=7)
