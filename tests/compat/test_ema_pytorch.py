"""EMA of ema_pytorch: their numbers, their checkpoints, and where they are wrong."""

import copy
import math
import signal
from typing import Any

import ema_pytorch as theirs
import pytest

from fastema.compat import ema_pytorch as ours
from fastema.errors import ArgumentError, LayoutError, StateError

from .ema_pytorch_case import Network, assert_close, floats, nn, pair, run, torch, train
from .network import refused

NEEDS = ("torch",)

pytestmark = pytest.mark.torch

SINGLE: dict[str, Any] = {"update_after_step": 0, "update_every": 1}

SETTINGS = [
    {"update_after_step": 0},
    {"update_after_step": 5, "beta": 0.9, "min_value": 0.3},
    {"update_after_step": 3, "inv_gamma": 4.0, "power": 0.75},
    {"update_after_step": 0, "power": 1.0, "beta": 0.99},
    {"update_after_step": -2, "min_value": 0.999, "beta": 0.9},
    {"update_after_step": 0, "beta": 0.0},
    {"update_after_step": 0, "beta": 1.0},
]


def loaded(ema: Any, other: Any) -> None:
    """Load one's state into another, and what is in no state."""
    ema.load_state_dict(copy.deepcopy(other.state_dict()))
    ema.model.hidden.copy_(other.model.hidden)
    ema.ema_model.hidden.copy_(other.ema_model.hidden)


def spread(ema: Any) -> float:
    pairs = zip(floats(ema.ema_model).values(), floats(ema.model).values(), strict=True)
    return max((abs(a - b).max().item() for a, b in pairs if a.numel()), default=0.0)


# -- their numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_numbers_with_peer_exact(settings: Any, every: int, foreach: bool) -> None:
    mine, yours = pair(**settings, update_every=every, use_foreach=foreach, peer_exact=True)
    for step in range(40):
        run([mine, yours], [step])
        assert mine.get_current_decay() == yours.get_current_decay()
        assert (int(mine.step), bool(mine.initted)) == (int(yours.step), bool(yours.initted))
        assert_close(mine.ema_model, yours.ema_model, atol=1e-13)
    assert spread(yours) > 0.1 or settings.get("beta") == 0.0


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
@pytest.mark.parametrize("interrupted", [1, 4, 17, 18])
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_goes_on_in_the_other_library(direction: str, interrupted: int, every: int) -> None:
    settings = {"update_after_step": 5, "update_every": every, "beta": 0.95, "peer_exact": True}
    mine, yours = pair(**settings)
    whole = pair(**settings)
    run(whole, range(36))
    run([mine, yours], range(interrupted))
    first, second = (mine, yours) if direction.startswith("ours") else (yours, mine)
    fresh = pair(seed=9, **settings)[second is yours]
    loaded(fresh, first)
    assert_close(fresh.model, first.model, atol=0.0)
    run([fresh], range(interrupted, 36))
    assert_close(fresh.ema_model, whole[1].ema_model, atol=1e-13)
    assert int(fresh.step) == 36


@pytest.mark.parametrize("assign", [False, True])
def test_a_lazy_average_loads(assign: bool) -> None:
    mine, yours = pair(**SINGLE, lazy_init_ema=True)
    assert mine.ema_model is None
    with pytest.raises(StateError, match="lazy_init_ema"):
        mine(torch.zeros(1, 4))
    with pytest.raises(ArgumentError, match="lazy_init_ema"):
        ours.EMA(Network(), lazy_init_ema=True, ema_model=Network)
    run([mine, yours], range(9))
    assert_close(mine.ema_model, yours.ema_model, atol=1e-5)
    fresh = ours.EMA(Network(3), **SINGLE, lazy_init_ema=True)
    fresh.load_state_dict(copy.deepcopy(yours.state_dict()), assign=assign)
    assert_close(fresh.ema_model.conv, yours.ema_model.conv, atol=0.0)
    run([fresh], range(9, 12))
    with pytest.raises(RuntimeError, match="ema_model"):
        theirs.EMA(Network(3), lazy_init_ema=True).load_state_dict(yours.state_dict())


# -- the other methods ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.7])
@pytest.mark.parametrize("every", [1, 4])
def test_the_model_follows_the_average(kept: float, every: int) -> None:
    mine, yours = pair(
        update_after_step=1,
        update_every=2,
        update_model_with_ema_every=every,
        update_model_with_ema_beta=kept,
        param_or_buffer_names_no_ema={"scale"},
        ignore_names={"table"},
        peer_exact=True,
    )
    for step in range(20):
        run([mine, yours], [step])
        assert_close(mine.ema_model, yours.ema_model, atol=1e-12)
        assert_close(mine.model, yours.model, atol=1e-12)
        assert int(mine.model.norm.num_batches_tracked) == step + 1
    mine.update_model_with_ema(0.25)
    yours.update_model_with_ema(0.25)
    assert_close(mine.model, yours.model, atol=1e-12)


def test_hook_of_an_optimizer() -> None:
    model = nn.Linear(3, 2)
    ema = ours.EMA(model, **SINGLE, beta=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = ema.add_to_optimizer_post_step_hook(optimizer)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert int(ema.step) == 3
    handle.remove()
    optimizer.step()
    assert int(ema.step) == 3
    assert not torch.equal(ema.ema_model.weight, model.weight)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4).eval()

    def forward(self, x: Any) -> Any:
        return self.drop(self.norm(self.linear(x)))

    def sampled(self, x: Any) -> Any:
        return self.linear(x) + 1


def test_forward_eval_is_in_evaluation_mode() -> None:
    mine, yours = (module.EMA(Noisy()) for module in (ours, theirs))
    x = torch.randn(64, 4)
    assert not mine.forward_eval(x).requires_grad
    assert torch.equal(mine.forward_eval(x), mine.forward_eval(x))
    assert not torch.equal(yours.forward_eval(x), yours.forward_eval(x))  # dropout is at work
    assert [mine.ema_model.training, mine.ema_model.drop.training] == [True, True]
    assert not mine.ema_model.norm.training
    with pytest.raises(RuntimeError):
        mine.forward_eval(torch.randn(2, 3))
    assert mine.ema_model.training


# -- where they are wrong -------------------------------------------------------------------------


def test_a_failed_update_changes_nothing() -> None:
    mine, yours = pair(**SINGLE)
    run([mine, yours], range(5))
    for ema in (mine, yours):
        ema.model.conv.weight.data = torch.zeros(2, 2, dtype=torch.float64)
    with refused(LayoutError, r"conv\.weight", mine, mine.model):
        mine.update()
    with pytest.raises(RuntimeError):
        yours.update()
    assert (int(mine.step), int(yours.step)) == (5, 6)
    mine.model.conv.weight.data = torch.zeros(5, 3, 3, 3, dtype=torch.float64)
    mine.update()
    assert int(mine.step) == 6


def test_an_interrupted_step_is_taken_and_counted_or_neither(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, _ = pair(**SINGLE)
    run([mine], range(3))
    train([mine.model], 1, 3)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, refused(KeyboardInterrupt, None, mine, mine.model):
        patch.setattr(mine, "update_moving_average", interrupted)
        mine.update()

    own, before = mine.update_moving_average, mine.ema_model.conv.weight.clone()
    signalled: list[bool] = []

    def pressed(*models: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # Ctrl-C
        own(*models)
        signalled.append(True)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    try:
        with monkeypatch.context() as patch:
            patch.setattr(mine, "update_moving_average", pressed)
            with pytest.raises(KeyboardInterrupt):
                mine.update()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (signalled, int(mine.step)) == ([True], 4)
    assert not torch.equal(mine.ema_model.conv.weight, before)


WRONG: dict[str, tuple[Any, ...]] = {
    "update_every": (0, 1.5, True, "10"),
    "beta": (math.nan, "0.9"),
    "inv_gamma": (0.0, -1.0),
    "power": (math.nan, None),
    "min_value": (math.nan,),
    "update_model_with_ema_every": (0, 2.5),
    "update_model_with_ema_beta": (math.nan,),
}
VALUES = [(name, value) for name, several in WRONG.items() for value in several]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_later_values_are_checked_before_anything_is_written(name: str, value: Any) -> None:
    ema, _ = pair(**SINGLE, update_model_with_ema_every=1)
    run([ema], range(3))
    setattr(ema, name, value)
    train([ema.model], 1, 3)
    with refused(ArgumentError, name, ema, ema.model):
        ema.update()


# -- counters on accelerators ---------------------------------------------------------------------


def test_an_accelerator_is_not_waited_for(on_an_accelerator: list[float]) -> None:
    mine, yours = pair(update_after_step=2, update_every=3, peer_exact=True)
    run([mine, yours], range(9))
    assert len(on_an_accelerator) == 2  # both counters, before the first step
    mine.step.fill_(30)
    yours.step.fill_(30)
    run([mine, yours], range(9, 14))
    assert on_an_accelerator[2:] == [30]
    assert int(mine.step) == 35
    assert_close(mine.ema_model, yours.ema_model, atol=1e-13)
