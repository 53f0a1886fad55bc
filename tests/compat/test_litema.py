"""LitEma of latent diffusion: its state, its checkpoints, and where ours differs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
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


def test_state_is_the_peers() -> None:
    model = Network()
    ema = LitEma(model, decay=0.99)
    state = ema.state_dict()
    assert list(state) == ["decay", "num_updates", *short_names(model).values()]
    assert (state["decay"].dtype, state["num_updates"].dtype) == (torch.float32, torch.int32)
    assert state["decay"].shape == state["num_updates"].shape == ()
    assert ema.m_name2s_name == short_names(model)
    assert ema.collected_params == []
    assert int(LitEma(model, use_num_upates=False).num_updates) == -1
    assert float(LitEma(model).decay) == float(np.float32(0.9999))


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


@pytest.mark.parametrize("way", ["half", "double", "assign"])
def test_averages_that_are_replaced_go_on_and_are_not_kept_alive(way: str) -> None:
    run = Run("litema", Network(1, torch.float32), {"decay": 0.9})
    run.train(1)
    gone = weakref.ref(run.average.get_buffer("wide"))
    if way == "assign":
        run.average.load_state_dict(cloned(run.average.state_dict()), assign=True)
    else:
        getattr(run.average, way)()
    gc.collect()
    assert gone() is None
    run.refer()
    run.train(5)
    run.check()
    assert int(run.average.num_updates) == 6


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


def test_counters_are_read_once_and_after_others_wrote(on_an_accelerator: list[float]) -> None:
    model = Network()
    ema = LitEma(model, 0.9)
    for _ in range(5):
        ema(model)
    assert len(on_an_accelerator) == 2  # the count and the decay
    ema.num_updates.fill_(41)
    ema(model)
    assert on_an_accelerator[2:] == [41]
    assert int(ema.num_updates) == 42


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", ["to", "type"])
def test_counters_keep_their_dtypes(dtype: Any, call: str) -> None:
    pipeline = Pipeline(nn.Linear(5, 4))
    ema = pipeline.model_ema
    ema.decay.fill_(0.9999)
    getattr(pipeline, call)(dtype)
    assert (ema.decay.dtype, ema.num_updates.dtype) == (torch.float32, torch.int32)
    assert float(ema.decay) == float(np.float32(0.9999))
    assert ema.weight.dtype == dtype
    assert torch.tensor(0.9999).to(dtype) == 1  # which would be an average that stands still
    assert list(ema.state_dict()) == ["decay", "num_updates", "weight", "bias"]
    ema.num_updates.fill_(10**6)
    before = ema.weight.double()
    with torch.no_grad():
        pipeline.model.weight.add_(1000)
    ema(pipeline.model)
    assert (ema.weight.double() - before).mean().item() == pytest.approx(0.1, abs=0.03)


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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_lent_nothing(duplicate: Any) -> None:
    model = Network()
    ema = LitEma(model)
    ema.store(model.parameters())
    ema.copy_to(model)
    duplicate(ema).store(model.parameters())
    with pytest.raises(StateError):
        ema.store(model.parameters())


def test_another_model_may_be_stored_when_the_first_is_gone() -> None:
    ema = LitEma(Network())
    for seed in range(30):  # the memory of one often becomes that of the next
        model = Network(seed)
        ema.store(model.parameters())
        ema.copy_to(model)
        gone = [weakref.ref(one) for one in [model, *model.parameters()]]
        del model
        gc.collect()
        assert not any(reference() is not None for reference in gone)


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


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "of type NoneType, expected a tensor"),
        (1.5, "of type float, expected a tensor"),
        (torch.empty(257, device="meta"), "no contents"),
        (torch.zeros(257).to_sparse(), "sparse_coo, expected a dense"),
    ],
)
def test_averages_that_are_no_tensors_are_refused(found: Any, message: str) -> None:
    pipeline = Pipeline(Network())
    state = {**pipeline.state_dict(), "model_ema.wide": found}
    with pytest.raises(CheckpointError, match=message):
        ema_weights(state, pipeline.model)


@pytest.mark.parametrize("checkpoint", [None, [1], {"state_dict": None}, {3: torch.ones(1)}])
def test_checkpoints_that_are_no_mappings_are_refused(checkpoint: Any) -> None:
    for call in (ema_weights, with_ema_weights):
        with pytest.raises(CheckpointError, match="expected"):
            call(checkpoint, Network() if call is ema_weights else {})
