"""Drop-in classes that average lists of parameters."""

from typing import Any, NamedTuple

import pytest
import torch
import torch_ema
from diffusers import training_utils

from fastema.compat.diffusers import EMAModel
from fastema.compat.torch_ema import ExponentialMovingAverage
from fastema.errors import CheckpointError, LayoutError, StateError

from .network import assert_refused, make_generator
from .parameter_lists import are_equal, copies_of, parameters, perturb, write_into

pytestmark = pytest.mark.torch


class Case(NamedTuple):
    """A class, its peer, their attribute names, and whether restore keeps stored weights."""

    ours: Any
    theirs: Any
    update: str
    stored: str
    keeps: bool

    def build_updated(self, weights: Any) -> Any:
        """Return an average that was updated once."""
        ema = self.ours(weights, 0.9)
        perturb(weights, make_generator(1))
        getattr(ema, self.update)(weights)
        return ema


CASES = {
    "torch_ema": Case(
        ExponentialMovingAverage,
        torch_ema.ExponentialMovingAverage,
        "update",
        "collected_params",
        True,
    ),
    "diffusers": Case(EMAModel, training_utils.EMAModel, "step", "temp_stored_params", False),
}
LISTS = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


WRONG: dict[str, list[tuple[dict[str, Any], Any, str]]] = {
    "torch_ema": [
        ({"num_updates": "many"}, CheckpointError, "num_updates"),
        ({"shadow_params": None}, CheckpointError, "shadow_params"),
        ({"collected_params": 3}, CheckpointError, "collected_params"),
        ({"collected_params": []}, LayoutError, "collected_params"),
    ],
    "diffusers": [
        ({"decay": "high"}, CheckpointError, "decay"),
        ({"min_decay": -1.0}, CheckpointError, "min_decay"),
        ({"min_decay": None}, CheckpointError, "min_decay"),
        ({"optimization_step": 1.5}, CheckpointError, "optimization_step"),
        ({"update_after_step": "7"}, CheckpointError, "update_after_step"),
        ({"use_ema_warmup": 1}, CheckpointError, "use_ema_warmup"),
        ({"inv_gamma": "1"}, CheckpointError, "inv_gamma"),
        ({"power": []}, CheckpointError, "power"),
        ({"shadow_params": 3}, CheckpointError, "shadow_params"),
    ],
}
for each in WRONG.values():
    each += [
        ({"decay": 1.5}, CheckpointError, "decay"),
        ({"shadow_params": [1.0]}, CheckpointError, "shadow_params"),
        ({"shadow_params": []}, LayoutError, "0 tensors, expected 8"),
    ]


@pytest.mark.parametrize(
    ("cls", "change", "error", "words"),
    [(cls, *one) for cls, cases in WRONG.items() for one in cases],
)
def test_malformed_state_is_refused_and_changes_nothing(
    cls: str, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    case, weights = CASES[cls], parameters(31)
    ema = case.build_updated(weights)
    before = ema.state_dict()
    with assert_refused(error, words, ema.shadow_params):
        ema.load_state_dict({**case.ours(parameters(32), 0.5).state_dict(), **change})
    assert {**ema.state_dict(), "shadow_params": 0} == {**before, "shadow_params": 0}


@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16])
@LISTS
def test_store_copy_to_and_restore_match_the_peer(case: Case, narrow: torch.dtype | None) -> None:
    weights = parameters(33)
    pair = [cls(weights, 0.7) for cls in (case.ours, case.theirs)]
    perturb(weights, make_generator(34))
    raw, versions = copies_of(weights), [weight._version for weight in weights]
    held = []
    for ema in pair:
        if narrow is not None:
            ema.to(dtype=narrow)
        ema.store(iter(weights))
        assert are_equal(getattr(ema, case.stored), raw)
        ema.copy_to(iter(weights))
        held.append(copies_of(weights))
        ema.restore(iter(weights))
        assert are_equal(weights, raw)
        if case.keeps:
            assert are_equal(getattr(ema, case.stored), raw)
        else:
            assert getattr(ema, case.stored) is None
            with pytest.raises((StateError, RuntimeError), match="store"):
                ema.restore(weights)
    assert are_equal(*held)
    assert are_equal(held[0], [average.float() for average in pair[0].shadow_params])
    # As with theirs, autograd graphs that need the weights stay valid.
    assert [weight._version for weight in weights] == versions


@LISTS
def test_second_store_keeps_the_weights(case: Case) -> None:
    weights = parameters(35)
    ema, theirs = case.ours(weights, 0.9), case.theirs(weights, 0.9)
    perturb(weights, make_generator(36))
    raw = copies_of(weights)
    theirs.store(weights)
    theirs.copy_to(weights)
    theirs.store(weights)
    theirs.restore(weights)
    assert not are_equal(weights, raw)  # theirs lost the weights
    write_into(weights, raw)

    ema.store(weights)
    ema.store(weights)  # harmless: the same weights
    ema.copy_to(weights)
    for given in (weights, parameters(36)):
        with pytest.raises(StateError, match="restore"):
            ema.store(given)
    ema.restore(weights)
    assert are_equal(weights, raw)
    ema.store(weights)
    ema.restore(weights)
    ema.copy_to(weights)  # permanent: nothing is stored
    ema.store(weights)
