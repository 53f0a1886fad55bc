"""Composer's compute_ema, its schedule, and its checkpoints to and from a fastema.EMA."""

from typing import Any

import pytest

import fastema
from fastema.compat import composer
from fastema.errors import CheckpointError

from ..support.peers import named_tensors
from .network import Network, assert_load_refused, make_generator, randomize, torch

nn = torch.nn

pytestmark = pytest.mark.torch


FACTOR = 2 ** (-1 / 10)
"""The decay per batch for a half-life of ten batches."""


class EMAParameters:
    """Composer's averages: copies of the trained parameters and of all buffers."""

    def __init__(self, model: Any) -> None:
        self.named_parameters_dict = {
            name: one.data.clone() for name, one in model.named_parameters() if one.requires_grad
        }
        self.named_buffers_dict = {name: one.data.clone() for name, one in model.named_buffers()}

    def all(self) -> dict[str, Any]:
        return {**self.named_parameters_dict, **self.named_buffers_dict}

    def step(self, model: Any, smoothing: float) -> None:
        current = named_tensors(model)
        for name, avg in self.all().items():
            avg.copy_(avg * smoothing + current[name].data * (1.0 - smoothing))


def test_compute_ema_matches_composer_except_for_integers() -> None:
    model, generator = Network(1, torch.float32), make_generator(2)
    ours, theirs = EMAParameters(model), EMAParameters(model)
    for step in range(10):
        randomize(model, generator)
        composer.compute_ema(nn.DataParallel(model) if step % 2 else model, ours, 0.8)
        theirs.step(model, 0.8)
        if step == 4:  # replaced as by loading a checkpoint
            ours.named_buffers_dict = {k: v.clone() for k, v in ours.named_buffers_dict.items()}
    for name, one in ours.all().items():
        if one.is_floating_point():
            torch.testing.assert_close(one, theirs.all()[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(one, named_tensors(model)[name])
            assert not torch.equal(one, theirs.all()[name]) or one.dtype == torch.bool
    assert "frozen" not in ours.all()


def average_of(model: Any, k: int = 1, start: int = 1, **times: Any) -> fastema.EMA:
    rule = composer.rule(**times) if times else composer.rule("10ba")
    return fastema.EMA(model, rule, update_every=k, buffers="average", start_after=start)


def state_of(peer: EMAParameters, active: bool = False) -> dict[str, Any]:
    flags = {"ema_weights_active": active, "ema_started": True}
    return {"repr": "EMA()", "ema_model": dict(vars(peer)), **flags}


def run_peer(model: Any, generator: Any, steps: int) -> EMAParameters:
    """Run the peer; like Composer, it restarts from the weights after the first batch."""
    peer = EMAParameters(model)
    for step in range(steps):
        randomize(model, generator)
        if not step:
            peer = EMAParameters(model)
        peer.step(model, FACTOR)
    return peer


def assert_close(ema: fastema.EMA, peer: EMAParameters) -> None:
    shadow, found = ({n: of[n] for n in ema.averaged_names} for of in (ema.shadow, peer.all()))
    torch.testing.assert_close(shadow, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [1, 7, 20])
@pytest.mark.parametrize(
    ("times", "k", "smoothing"),
    [
        ({"half_life": "25ba", "update_interval": "10ba"}, 10, 2 ** (-10 / 25)),
        ({"half_life": None, "smoothing": 0.9, "update_interval": "4ep"}, 4, 0.9),
        ({"half_life": "3ba"}, 1, 2 ** (-1 / 3)),
    ],
)
def test_updates_follow_the_same_batches_as_composer(
    times: dict[str, Any], k: int, smoothing: float, start: int
) -> None:
    """Composer starts from the weights after a batch, then updates at multiples of k."""
    model, generator = Network(1), make_generator(2)
    ema = average_of(model, k, start, **times)
    peer = resumed = None
    for batch in range(1, 46):
        randomize(model, generator)
        if batch == start:
            peer = EMAParameters(model)
        if peer is not None and batch % k == 0:
            peer.step(model, smoothing)
        ema.update()
        if peer is None:
            continue
        assert_close(ema, peer)
        if resumed is not None:
            resumed.update()
            assert_close(resumed, peer)
        if batch in (start + 1, 30):  # resume: the updates must stay in phase
            resumed = average_of(model, k, start, **times)
            composer.load(resumed, state_of(peer), num_updates=batch)


def test_state_loads_from_and_exports_to_composer() -> None:
    model, generator = Network(1), make_generator(2)
    ours = average_of(model)
    randomize(model, generator)
    ours.update()
    peer = EMAParameters(model)
    peer.step(model, FACTOR)
    for _ in range(6):
        randomize(model, generator)
        ours.update()
        peer.step(model, FACTOR)
    assert_close(ours, peer)

    resumed, back = average_of(Network(4)), EMAParameters(Network(5))
    composer.load(resumed, state_of(peer), num_updates=7)
    assert resumed.num_updates == 7
    saved = composer.export(ours, model)
    assert saved.keys() == state_of(peer).keys() - {"repr"}
    assert (saved["ema_weights_active"], saved["ema_started"]) == (False, True)
    for part, averages in vars(peer).items():
        assert saved["ema_model"][part].keys() == averages.keys()
        setattr(back, part, saved["ema_model"][part])
    for _ in range(5):
        randomize(model, generator)
        resumed.update(model)
        for one in (peer, back):
            one.step(model, FACTOR)
    assert_close(resumed, peer)
    for name in ours.averaged_names:
        torch.testing.assert_close(back.all()[name], peer.all()[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("active", [False, True])
def test_trainer_checkpoint_loads_whether_or_not_ema_is_active(active: bool) -> None:
    model = Network(1)
    peer = run_peer(model, make_generator(3), 6)
    raw = {name: one.detach().clone() for name, one in named_tensors(model).items()}
    averages = {name: one.clone() for name, one in peer.all().items()}
    state = {**raw, **averages} if active else raw
    if active:  # Composer saves weights and averages exchanged
        for name, one in peer.all().items():
            one.copy_(raw[name])
    checkpoint = {
        "state": {
            "model": {f"module.{name}": one for name, one in state.items()},
            "algorithms": [("Mixup", {}), ("EMA", state_of(peer, active))],
            "timestamp": {"Timestamp": {"batch": 6, "epoch": 1}},
        },
        "rng": [],
    }
    ema = average_of(Network(2))
    composer.load(ema, checkpoint)
    assert ema.num_updates == 6
    for name in ema.averaged_names:
        assert torch.equal(ema.shadow[name], averages[name]), name
    if active:
        with pytest.raises(CheckpointError, match="whole checkpoint"):
            composer.load(ema, state_of(peer, active))


def embed(state: Any, **others: Any) -> dict[str, Any]:
    """Return a trainer's checkpoint that holds this state of EMA."""
    return {"state": {"model": {}, "algorithms": [("EMA", state)], **others}}


def state_with(**parts: Any) -> dict[str, Any]:
    state = state_of(EMAParameters(Network(1)))
    return {**state, "ema_model": {**state["ema_model"], **parts}}


def with_weight(wide: Any) -> dict[str, Any]:
    """Return a state whose ``wide`` is this value; ``...`` leaves it out."""
    found = {**EMAParameters(Network(1)).named_parameters_dict, "wide": wide}
    return state_with(named_parameters_dict={k: one for k, one in found.items() if one is not ...})


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"state": {"algorithms": [("Mixup", {})]}}, "0 states"),
        (None, "the checkpoint is of type NoneType"),
        ([1], "the checkpoint is of type list"),
        ({"state": None}, "'state' of the checkpoint is of type NoneType"),
        ({"state": {"algorithms": None}}, "'algorithms' is None, expected a list of pairs"),
        ({"state": {"algorithms": ["EMA"]}}, r"'algorithms' is \['EMA'\], expected"),
        ({"state": {"algorithms": {}}}, "0 states"),
        (embed(None), "the state of Composer's EMA is of type NoneType"),
        (embed({}), "lacks 'ema_model'"),
        (embed({"ema_model": None}), "before its average began"),
        (embed({"ema_model": [1]}), "'ema_model' is of type list"),
        (state_with(named_parameters_dict=None), "'named_parameters_dict' of 'ema_model'"),
        (state_with(named_buffers_dict=[1]), "'named_buffers_dict' of 'ema_model'"),
        (with_weight(...), "'wide' is missing"),
        (with_weight(None), "'wide' is of type NoneType, expected a tensor"),
        (with_weight(2.0), "'wide' is of type float, expected a tensor"),
        (with_weight(torch.empty(257, device="meta")), "'wide' has no contents"),
        (embed(state_with(), timestamp=[]), "'timestamp' of the checkpoint is of type list"),
        (embed(state_with(), timestamp={"Timestamp": None}), "'Timestamp' of the checkpoint's"),
        (embed(state_with(), timestamp={"Timestamp": {"batch": "6"}}), "batch='6'"),
        (embed(state_with(), timestamp={"Timestamp": {"batch": -6}}), "batch=-6"),
        (embed({**state_with(), "ema_weights_active": True}, model=[1]), "'model' of the"),
    ],
)
def test_malformed_checkpoint_is_refused(checkpoint: Any, message: str) -> None:
    ema = average_of(Network(2))
    for count in (None, 3):
        with assert_load_refused(ema, message):
            composer.load(ema, checkpoint, num_updates=count)
