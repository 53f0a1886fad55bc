"""EMA of ema_pytorch: the same numbers, and runs resumed in either library."""

import copy
from typing import Any

import pytest

from .ema_pytorch_case import assert_close, floats, pair, run

NEEDS = ("torch",)

pytestmark = pytest.mark.torch


SETTINGS = [
    {"update_after_step": 0},
    {"update_after_step": 5, "beta": 0.9, "min_value": 0.3},
    {"update_after_step": 3, "inv_gamma": 4.0, "power": 0.75},
    {"update_after_step": 0, "power": 1.0, "beta": 0.99},
    {"update_after_step": -2, "min_value": 0.999, "beta": 0.9},
    {"update_after_step": 0, "beta": 0.0},
    {"update_after_step": 0, "beta": 1.0},
]


def load_state(ema: Any, other: Any) -> None:
    """Load another average's state, and copy the buffers that states omit."""
    ema.load_state_dict(copy.deepcopy(other.state_dict()))
    ema.model.hidden.copy_(other.model.hidden)
    ema.ema_model.hidden.copy_(other.ema_model.hidden)


def largest_gap(ema: Any) -> float:
    pairs = zip(floats(ema.ema_model).values(), floats(ema.model).values(), strict=True)
    return max((abs(a - b).max().item() for a, b in pairs if a.numel()), default=0.0)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_decay_is_per_update_as_in_ema_pytorch(settings: Any, every: int, foreach: bool) -> None:
    mine, yours = pair(**settings, update_every=every, use_foreach=foreach)
    for step in range(40):
        run([mine, yours], [step])
        assert mine.get_current_decay() == pytest.approx(yours.get_current_decay(), abs=1e-6)
        assert_close(mine.ema_model, yours.ema_model, atol=1e-5)
    assert largest_gap(mine) > 0.1 or settings.get("beta") == 0.0


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_peer_exact_matches_ema_pytorch(settings: Any, every: int, foreach: bool) -> None:
    mine, yours = pair(**settings, update_every=every, use_foreach=foreach, peer_exact=True)
    for step in range(40):
        run([mine, yours], [step])
        assert mine.get_current_decay() == yours.get_current_decay()
        assert (int(mine.step), bool(mine.initted)) == (int(yours.step), bool(yours.initted))
        assert_close(mine.ema_model, yours.ema_model, atol=1e-13)
    assert largest_gap(yours) > 0.1 or settings.get("beta") == 0.0


@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
@pytest.mark.parametrize("interrupted", [1, 4, 17, 18])
@pytest.mark.parametrize("every", [1, 3])
def test_run_resumes_in_the_other_library(direction: str, interrupted: int, every: int) -> None:
    settings = {"update_after_step": 5, "update_every": every, "beta": 0.95, "peer_exact": True}
    mine, yours = pair(**settings)
    whole = pair(**settings)
    run(whole, range(36))
    run([mine, yours], range(interrupted))
    first, second = (mine, yours) if direction.startswith("ours") else (yours, mine)
    fresh = pair(seed=9, **settings)[second is yours]
    load_state(fresh, first)
    assert_close(fresh.model, first.model, atol=0.0)
    run([fresh], range(interrupted, 36))
    assert_close(fresh.ema_model, whole[1].ema_model, atol=1e-13)
    assert int(fresh.step) == 36


@pytest.mark.parametrize("kept", [0.0, 0.7])
@pytest.mark.parametrize("every", [1, 4])
def test_model_follows_the_average_as_in_ema_pytorch(kept: float, every: int) -> None:
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
