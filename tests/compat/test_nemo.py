"""NeMo's schedule, and states of its EMAOptimizer loaded into and exported from EMA."""

from typing import Any

import pytest

import fastema
from fastema.compat import nemo
from fastema.errors import ArgumentError

from .network import Network, assert_load_refused, make_generator, randomize, torch

pytestmark = pytest.mark.torch


class NemoEMA:
    """The averages and the state of NeMo's EMAOptimizer."""

    def __init__(self, optimizer: Any, decay: float, every: int) -> None:
        self.optimizer, self.decay, self.every, self.current_step = optimizer, decay, every, 0
        self.ema = tuple(one.detach().clone() for one in self.parameters())

    def parameters(self) -> list[Any]:
        return [one for group in self.optimizer.param_groups for one in group["params"]]

    def step(self) -> None:
        if self.current_step % self.every == 0:
            for avg, one in zip(self.ema, self.parameters(), strict=True):
                avg.mul_(self.decay).add_(one.detach(), alpha=1 - self.decay)
        self.current_step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "opt": self.optimizer.state_dict(),
            "ema": self.ema,
            "current_step": self.current_step,
            "decay": self.decay,
            "every_n_steps": self.every,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["opt"])
        self.ema, self.current_step = tuple(state["ema"]), state["current_step"]
        self.decay, self.every = state["decay"], state["every_n_steps"]


def optimizer_of(model: Any) -> Any:
    """Return an optimizer whose groups, as for weight decay, reorder the model's parameters."""
    named = dict(model.named_parameters())
    one_way = [one for name, one in named.items() if one.ndim < 2]
    other = [one for name, one in named.items() if one.ndim >= 2]
    return torch.optim.SGD([{"params": one_way}, {"params": other}], lr=0.1)


def average_of(model: Any, decay: float, every: int) -> fastema.EMA:
    return fastema.EMA(model, nemo.rule(decay, every), update_every=every, frozen="average")


def build_both(model: Any, decay: float, every: int) -> tuple[NemoEMA, fastema.EMA]:
    return NemoEMA(optimizer_of(model), decay, every), average_of(model, decay, every)


def assert_close(ema: fastema.EMA, peer: NemoEMA, model: Any) -> None:
    places = {id(one): place for place, one in enumerate(peer.parameters())}
    for name, one in model.named_parameters():
        want = peer.ema[places[id(one)]]
        torch.testing.assert_close(ema.shadow[name], want, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("every", [1, 4])
def test_rule_matches_nemos_schedule(every: int) -> None:
    assert nemo.rule(0.999, every).weight(every, every) == pytest.approx(0.001, rel=1e-9)
    with pytest.raises(ArgumentError):
        nemo.rule(1.0, every)
    with pytest.raises(ArgumentError):
        nemo.rule(0.9, 0)


def train(model: Any, generator: Any, steps: int, peer: NemoEMA, *averages: fastema.EMA) -> None:
    """Train with the peer, and compare these averages with its own after each step."""
    for _ in range(steps):
        randomize(model, generator)
        peer.step()
        for ema in averages:
            ema.update()
            assert_close(ema, peer, model)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("steps", [1, 5, 6, 7])
def test_state_moves_both_ways_at_any_step(every: int, steps: int) -> None:
    model, generator = Network(1), make_generator(2)
    peer, ema = build_both(model, 0.8, every)
    train(model, generator, steps, peer)
    state = peer.state_dict()
    nemo.load(ema, {"optimizer_states": [state], "state_dict": {}}, model, peer.optimizer)
    assert_close(ema, peer, model)
    train(model, generator, 7, peer, ema)  # continue their run with ours
    saved = nemo.export(ema, model, peer.optimizer)
    assert saved.keys() == state.keys()
    assert isinstance(saved["ema"], tuple)
    assert (saved["every_n_steps"], saved["current_step"]) == (every, peer.current_step)
    assert saved["decay"] == pytest.approx(0.8, rel=1e-12)
    back = NemoEMA(peer.optimizer, 0.1, 1)
    back.load_state_dict(saved)
    for _ in range(7):  # and ours with theirs
        randomize(model, generator)
        peer.step()
        back.step()
        torch.testing.assert_close(back.ema, peer.ema, rtol=1e-5, atol=1e-5)


def test_malformed_state_is_refused_and_changes_nothing() -> None:
    model = Network(1)
    ema, optimizer = average_of(model, 0.9, 1), optimizer_of(model)
    randomize(model, make_generator(1))
    state = NemoEMA(optimizer, 0.9, 1).state_dict()
    for given, order, message in (
        ({**state, "ema": state["ema"][:-1]}, optimizer, "averages, but there are"),
        (state, None, "pass the optimizer"),  # the order is unknown
        ({"optimizer_states": [optimizer.state_dict()]}, optimizer, "0 states"),
        ({"ema": state["ema"], "every_n_steps": 1}, optimizer, "lacks current_step"),
    ):
        with assert_load_refused(ema, message):
            nemo.load(ema, given, model, order)
