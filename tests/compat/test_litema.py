"""LitEma of latent diffusion: its state, its checkpoints, and where ours differs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from fastema.compat.litema import LitEma, ema_weights, with_ema_weights
from fastema.errors import ArgumentError, CheckpointError, LayoutError, StateError

from .network import Network, numbers, refused, trained
from .parameter_lists import same, values
from .runs import Run

nn = torch.nn

pytestmark = pytest.mark.torch


def short_names(model: Any) -> dict[str, str]:
    """Of the parameters that are trained: their names, and those of their averages."""
    named = model.named_parameters()
    return {name: name.replace(".", "") for name, one in named if one.requires_grad}


def averages_in(ema: LitEma) -> dict[str, torch.Tensor]:
    return {name: ema.get_buffer(short) for name, short in ema.m_name2s_name.items()}


def cloned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in state.items()}


def test_a_run_goes_on_with_the_count_and_the_decay_of_the_state() -> None:
    run = Run("litema", Network(1), {"decay": 0.95})
    run.train(12)
    state = cloned(run.average.state_dict())
    run.average = LitEma(Network(7), 0.5)
    run.average(Network(8))  # both were read before
    run.average.load_state_dict(state)
    run.train(9)
    run.check()
    assert int(run.average.num_updates) == 21


def test_reset_counts_anew() -> None:
    options = {"decay": 0.99, "use_num_upates": False}
    run = Run("litema", Network(1), options)
    run.train(3)
    run.average.reset_num_updates()
    run.options, run.n = {"decay": 0.99}, 0
    assert list(run.average.state_dict())[-1] == "num_updates"
    run.train(3)
    run.check()
    assert int(run.average.num_updates) == 3


# -- the average in the model ----------------------------------------------------------------------


def test_copy_to_store_and_restore() -> None:
    model = Network()
    ema = LitEma(model, 0.8)
    trained(model, numbers(2))
    ema(model)
    raw, averages = cloned(model.state_dict()), averages_in(ema)
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
    ema.store(model.parameters())  # and again, as every evaluation does
    ema.copy_to(Network(3))  # another model: these weights are as they were
    ema.store(model.parameters())


def test_store_and_restore_say_what_to_do() -> None:
    model = Network()
    ema, weights = LitEma(model), list(model.parameters())
    with pytest.raises(StateError, match="store"):
        ema.restore(weights)
    ema.store(weights)
    kept = values(weights)
    trained(model, numbers(2))
    with refused(LayoutError, r"given 10 parameters, store\(\) 11: give those", weights):
        ema.restore(weights[:-1])
    ema.restore(weights)
    assert same(weights, kept)
    for call in (ema.store, ema.restore):
        with pytest.raises(ArgumentError, match=r"model\.parameters\(\)"):
            call(model)


@pytest.mark.parametrize("other", [False, True])
def test_store_refuses_to_lose_weights_that_somebody_has(other: bool) -> None:
    model, ema = Network(), LitEma(Network(1))
    some = list(model.parameters())[:2]
    raw = values(some)
    ema.store(some)  # of a part, too
    ema.copy_to(model)
    with pytest.raises(StateError, match="collected_params"):
        ema.store((Network(2) if other else model).parameters())
    assert same(raw, ema.collected_params)
    ema.collected_params = []
    ema.store(model.parameters())


# -- models that do not fit ------------------------------------------------------------------------


def test_names_that_collide_and_a_decay_outside_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ab = nn.Linear(2, 2, bias=False)
            self.a = nn.Module()
            self.a.bweight = nn.Parameter(torch.ones(2))

    with pytest.raises(LayoutError, match=r"'abweight', as does 'ab\.weight'"):
        LitEma(Odd())
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        LitEma(Network(), decay=1.5)


def changed(name: str, part: Any) -> Any:
    model = Network()
    setattr(model, name, part)
    return model


OTHERS = {
    "unfrozen": lambda: Network().requires_grad_(True),
    "larger": lambda: changed("more", nn.Linear(2, 2)),
    "smaller": lambda: changed("wide", None),
    "reshaped": lambda: changed("wide", nn.Parameter(torch.ones(3))),
}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("unfrozen", "'frozen' is trained in the model, but has no average"),
        ("larger", r"'more\.weight' is trained in the model, but has no average"),
        ("smaller", "'wide' has an average, but the model has no such"),
        ("reshaped", r"'wide' is \[3\] in the model, its average \[257\]"),
    ],
)
def test_errors_say_what_is_the_model_and_what_to_do(other: str, message: str) -> None:
    ema = LitEma(Network())
    for call in (ema, ema.copy_to):
        with pytest.raises(LayoutError, match=message) as error:
            call(OTHERS[other]())
        assert "build a new LitEma" in str(error.value)
        assert "second" not in str(error.value)


def test_parameters_that_are_trained_since_are_named() -> None:
    model = Network()
    ema = LitEma(model)
    ema(model)
    model.frozen.requires_grad_(True)
    with pytest.raises(LayoutError, match="'frozen' is trained in the model"):
        ema(model)
    model.frozen.requires_grad_(False)
    ema(model)
    assert int(ema.num_updates) == 2
    with pytest.raises(LayoutError, match=r"head\.weight"):  # tied no more
        ema(Network(tied=False))


# -- checkpoints -----------------------------------------------------------------------------------


class Pipeline(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.first_stage_model = nn.Linear(2, 2)
        self.model_ema = LitEma(model, 0.9)


@pytest.mark.parametrize("whole", [True, False])
def test_averages_out_of_and_into_a_checkpoint(whole: bool) -> None:
    pipeline, other = Pipeline(Network()), Pipeline(Network(5))
    trained(pipeline.model, numbers(2))
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
        assert torch.equal(found[name], averages[name])  # as it was


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
