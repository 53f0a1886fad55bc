"""LitEma of latent diffusion: its state, its checkpoints, and its differences here."""

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch

from fastema.compat.litema import LitEma, ema_weights, with_ema_weights
from fastema.errors import CheckpointError, StateError

from .network import Network, make_generator, randomize
from .runs import Run

nn = torch.nn

pytestmark = pytest.mark.torch


def short_names(model: Any) -> dict[str, str]:
    """Return the names of the trained parameters, with those of their averages."""
    named = model.named_parameters()
    return {name: name.replace(".", "") for name, one in named if one.requires_grad}


def averages_in(ema: LitEma) -> dict[str, torch.Tensor]:
    return {name: ema.get_buffer(short) for name, short in ema.m_name2s_name.items()}


def clone_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in state.items()}


def test_resumed_run_uses_the_count_and_decay_of_the_state() -> None:
    run = Run("litema", Network(1), {"decay": 0.95})
    run.train(12)
    state = clone_state(run.average.state_dict())
    run.average = LitEma(Network(7), 0.5)
    run.average(Network(8))  # makes it cache decay and count
    run.average.load_state_dict(state)
    run.train(9)
    run.check()
    assert int(run.average.num_updates) == 21


def test_store_copy_to_and_restore_round_trip() -> None:
    model = Network()
    ema = LitEma(model, 0.8)
    randomize(model, make_generator(2))
    ema(model)
    raw, averages = clone_state(model.state_dict()), averages_in(ema)
    ema.store(model.parameters())
    ema.copy_to(model)
    for name, one in model.state_dict().items():
        name = "embed.weight" if name == "head.weight" else name  # tied
        assert torch.equal(one, averages.get(name, raw[name])), name
    assert not torch.equal(raw["wide"], averages["wide"])
    with pytest.raises(StateError, match="restore"):
        ema.store(model.parameters())
    ema.restore(model.parameters())
    assert all(torch.equal(one, raw[name]) for name, one in model.state_dict().items())
    ema.store(model.parameters())  # again, as in every evaluation
    ema.copy_to(Network(3))  # leaves the stored model unchanged
    ema.store(model.parameters())


def network_with(name: str, part: Any) -> Any:
    model = Network()
    setattr(model, name, part)
    return model


OTHERS = {
    "unfrozen": lambda: Network().requires_grad_(True),
    "larger": lambda: network_with("more", nn.Linear(2, 2)),
    "smaller": lambda: network_with("wide", None),
    "reshaped": lambda: network_with("wide", nn.Parameter(torch.ones(3))),
}


class Pipeline(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.first_stage_model = nn.Linear(2, 2)
        self.model_ema = LitEma(model, 0.9)


@pytest.mark.parametrize("whole", [True, False])
def test_averages_are_read_from_and_written_to_a_checkpoint(whole: bool) -> None:
    pipeline, other = Pipeline(Network()), Pipeline(Network(5))
    randomize(pipeline.model, make_generator(2))
    pipeline.model_ema(pipeline.model)
    state, averages = pipeline.state_dict(), averages_in(pipeline.model_ema)
    checkpoint = OrderedDict(state_dict=state, global_step=3) if whole else state
    found = ema_weights(checkpoint, pipeline.model)
    assert list(found) == list(short_names(pipeline.model))
    assert all(torch.equal(found[name], one) for name, one in averages.items())

    mine = {name: torch.randn_like(one) for name, one in found.items()}
    changed = with_ema_weights(checkpoint, mine, decay=0.5, num_updates=12)
    assert changed.keys() == checkpoint.keys()
    other.load_state_dict(changed["state_dict"] if whole else changed)
    assert int(other.model_ema.num_updates) == 12
    assert float(other.model_ema.decay) == 0.5
    for name, one in averages_in(other.model_ema).items():
        assert torch.equal(one, mine[name])
        assert torch.equal(found[name], averages[name])  # unchanged


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("larger", r"model_ema\.moreweight' is missing"),
        ("smaller", "belongs to no parameter"),
        ("reshaped", r"\[257\], expected \[3\]"),
    ],
)
def test_checkpoint_of_another_model_is_refused(other: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ema_weights(Pipeline(Network()).state_dict(), OTHERS[other]())


@pytest.mark.parametrize("way", ["half", "double", "assign"])
def test_replaced_averages_continue_and_old_ones_are_freed(way: str) -> None:
    run = Run("litema", Network(1, torch.float32), {"decay": 0.9})
    run.train(1)
    gone = weakref.ref(run.average.get_buffer("wide"))
    if way == "assign":
        run.average.load_state_dict(clone_state(run.average.state_dict()), assign=True)
    else:
        getattr(run.average, way)()
    gc.collect()
    assert gone() is None
    run.restart_reference()
    run.train(5)
    run.check()
    assert int(run.average.num_updates) == 6
