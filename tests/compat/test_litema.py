"""LitEma of latent diffusion: its numbers, its state, its checkpoints, and where ours differs."""

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

nn = torch.nn

pytestmark = pytest.mark.torch

TRAINED = {"0.weight": "0weight", "0.bias": "0bias", "1.weight": "1weight"}


def model_of(seed: int = 0, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(5, 4), nn.BatchNorm1d(4)).to(dtype)
    model[0].to(memory_format=torch.channels_last)
    model[1].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def trained(model: Any) -> None:
    """Another step of a run: every parameter and buffer changes."""
    with torch.no_grad():
        for one in [*model.parameters(), *model.buffers()]:
            one.copy_(torch.randn(one.shape) * 3 if one.is_floating_point() else one + 1)


def reals(tensor: Any) -> np.ndarray:
    return np.array(tensor.detach().double().numpy())


class Recursion:
    """What the peer computes, in float64: its buffers hold ``decay`` in float32."""

    def __init__(self, model: Any, decay: float, counted: bool = True) -> None:
        self.decay, self.n = float(np.float32(decay)), 0 if counted else -1
        self.shadow = {name: reals(dict(model.named_parameters())[name]) for name in TRAINED}

    def __call__(self, model: Any) -> None:
        decay = self.decay
        if self.n >= 0:
            self.n += 1
            decay = min(decay, (1 + self.n) / (10 + self.n))
        for name, avg in self.shadow.items():
            avg -= (1 - decay) * (avg - reals(dict(model.named_parameters())[name]))

    def check(self, ema: Any, rtol: float = 2e-6) -> None:
        for name, short in TRAINED.items():
            got = reals(ema.get_buffer(short))
            np.testing.assert_allclose(got, self.shadow[name], rtol=rtol, atol=3 * rtol)
        assert int(ema.num_updates) == self.n


def test_state_is_the_peers() -> None:
    ema = LitEma(model_of(), decay=0.99)
    state = ema.state_dict()
    assert list(state) == ["decay", "num_updates", *TRAINED.values()]
    assert state["decay"].dtype == torch.float32
    assert state["num_updates"].dtype == torch.int32
    assert state["decay"].shape == state["num_updates"].shape == ()
    assert ema.m_name2s_name == TRAINED
    assert ema.collected_params == []
    assert int(LitEma(model_of(), use_num_upates=False).num_updates) == -1
    assert float(LitEma(model_of()).decay) == float(np.float32(0.9999))


def test_interrupted_run_goes_on() -> None:
    model = model_of()
    ema, want = LitEma(model, 0.95), Recursion(model, 0.95)
    for _ in range(12):
        trained(model)
        ema(model)
        want(model)
    resumed = LitEma(model_of(7), 0.5)
    resumed.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()})
    for _ in range(9):
        trained(model)
        resumed(model)
        want(model)
    want.check(resumed)  # also the count and the decay, which were read once before


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "double", "assign"])
def test_average_that_moves_goes_on(way: str) -> None:
    model = model_of()
    ema, want = LitEma(model, 0.9), Recursion(model, 0.9)
    trained(model)
    ema(model)
    want(model)
    before = ema
    if way == "deepcopy":
        ema = copy.deepcopy(ema)
    elif way == "pickle":
        ema = pickle.loads(pickle.dumps(ema))
    elif way == "double":
        ema.double()
    else:
        ema.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()}, assign=True)
    kept = ema.get_buffer("0weight").clone()
    for _ in range(5):
        trained(model)
        ema(model)
        want(model)
    want.check(ema)
    if before is not ema:
        assert torch.equal(before.get_buffer("0weight"), kept)
        assert int(before.num_updates) == 1


def test_copy_to_store_and_restore() -> None:
    model = model_of()
    ema = LitEma(model, 0.8)
    trained(model)
    ema(model)
    raw = {name: one.clone() for name, one in model.state_dict().items()}
    ema.store(model.parameters())
    ema.copy_to(model)
    for name, short in TRAINED.items():
        assert torch.equal(dict(model.named_parameters())[name], ema.get_buffer(short))
        assert not torch.equal(raw[name], ema.get_buffer(short))
    for name in raw.keys() - TRAINED.keys():
        assert torch.equal(model.state_dict()[name], raw[name]), name
    with pytest.raises(StateError, match="restore"):
        ema.store(model.parameters())
    ema.restore(model.parameters())
    assert all(torch.equal(one, raw[name]) for name, one in model.state_dict().items())
    ema.store(model.parameters())  # and again, as every evaluation does
    ema.copy_to(model_of(3))  # another model: these weights are as they were
    ema.store(model.parameters())


def test_restore_refuses_what_was_not_stored() -> None:
    model = model_of()
    ema = LitEma(model)
    with pytest.raises(StateError, match="store"):
        ema.restore(model.parameters())
    ema.store(model.parameters())
    kept = [one.detach().clone() for one in model.parameters()]
    trained(model)
    now = [one.detach().clone() for one in model.parameters()]
    with pytest.raises(LayoutError):
        ema.restore(list(model.parameters())[:-1])
    assert all(map(torch.equal, now, model.parameters()))
    ema.restore(model.parameters())
    assert all(map(torch.equal, kept, model.parameters()))


def test_reset_counts_anew() -> None:
    model = model_of()
    ema, want = LitEma(model, 0.99, use_num_upates=False), Recursion(model, 0.99, counted=False)
    for _ in range(3):
        trained(model)
        ema(model)
        want(model)
    ema.reset_num_updates()
    want.n = 0
    assert list(ema.state_dict()) == ["decay", *TRAINED.values(), "num_updates"]
    for _ in range(3):
        trained(model)
        ema(model)
        want(model)
    want.check(ema)


def larger() -> Any:
    return nn.Sequential(*model_of(), nn.Linear(2, 2))


def reshaped() -> Any:
    model = model_of()
    model[1] = nn.Linear(5, 6, bias=False)
    return model


def test_names_that_collide_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ab = nn.Linear(2, 2, bias=False)
            self.a = nn.Module()
            self.a.bweight = nn.Parameter(torch.ones(2))

    with pytest.raises(LayoutError, match=r"'abweight', as does 'ab\.weight'"):
        LitEma(Odd())
    with pytest.raises(ArgumentError, match="from 0 to 1"):
        LitEma(model_of(), decay=1.5)
    assert issubclass(ArgumentError, ValueError)


def test_tied_parameters_have_one_average() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    ema = LitEma(model, 0.5, use_num_upates=False)
    assert list(ema.m_name2s_name) == ["0.weight"]
    old = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    ema(model)
    torch.testing.assert_close(ema.get_buffer("0weight"), old + 0.5)
    ema.copy_to(model)
    assert model[1].weight is model[0].weight
    torch.testing.assert_close(model[0].weight.detach(), old + 0.5)
    model[1].weight = nn.Parameter(old.clone())
    with pytest.raises(LayoutError, match=r"1\.weight"):
        ema(model)


class Pipeline(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.first_stage_model = nn.Linear(2, 2)
        self.model_ema = LitEma(model, 0.9)


@pytest.mark.parametrize("whole", [True, False])
def test_averages_out_of_and_into_a_checkpoint(whole: bool) -> None:
    pipeline = Pipeline(model_of())
    trained(pipeline.model)
    pipeline.model_ema(pipeline.model)
    state = pipeline.state_dict()
    checkpoint = OrderedDict(state_dict=state, global_step=3) if whole else state
    found = ema_weights(checkpoint, pipeline.model)
    assert list(found) == list(TRAINED)
    for name, short in TRAINED.items():
        assert torch.equal(found[name], pipeline.model_ema.get_buffer(short))

    mine = {name: torch.randn(one.shape) for name, one in found.items()}
    changed = with_ema_weights(checkpoint, mine, decay=0.5, num_updates=12)
    assert "0weight" not in str(changed.keys() - checkpoint.keys())
    other = Pipeline(model_of(5))
    other.load_state_dict(changed["state_dict"] if whole else changed)
    assert int(other.model_ema.num_updates) == 12
    assert float(other.model_ema.decay) == 0.5
    for name, short in TRAINED.items():
        assert torch.equal(other.model_ema.get_buffer(short), mine[name])
        assert torch.equal(found[name], pipeline.model_ema.get_buffer(short))  # as it was
    assert whole == ("global_step" in changed)


def test_checkpoint_of_another_model_is_refused() -> None:
    pipeline = Pipeline(model_of())
    state = pipeline.state_dict()
    with pytest.raises(CheckpointError, match=r"model_ema\.3weight' is missing"):
        ema_weights(state, larger())
    with pytest.raises(CheckpointError, match="belongs to no parameter"):
        ema_weights(state, model_of()[:1])
    with pytest.raises(CheckpointError, match=r"\[4, 5\], expected \[6, 5\]"):
        ema_weights(state, reshaped())


def test_counters_are_read_once_and_after_others_wrote(on_an_accelerator: list[float]) -> None:
    model = model_of()
    ema = LitEma(model, 0.9)
    for _ in range(5):
        ema(model)
    assert len(on_an_accelerator) == 2  # the count and the decay
    ema.num_updates.fill_(41)
    ema(model)
    assert on_an_accelerator[2:] == [41]
    assert int(ema.num_updates) == 42


def test_another_model_may_be_stored_when_the_first_is_gone() -> None:
    ema = LitEma(model_of())
    for seed in range(30):  # the memory of one often becomes that of the next
        model = model_of(seed)
        ema.store(model.parameters())
        ema.copy_to(model)
        del model
        gc.collect()


@pytest.mark.parametrize("other", [False, True])
def test_store_refuses_to_lose_weights_that_somebody_has(other: bool) -> None:
    model, ema = model_of(), LitEma(model_of(1))
    some = list(model.parameters())[:2]
    raw = [one.detach().clone() for one in some]
    ema.store(some)  # of a part, too
    ema.copy_to(model)
    with pytest.raises(StateError, match="collected_params"):
        ema.store((model_of(2) if other else model).parameters())
    assert all(map(torch.equal, raw, ema.collected_params))
    ema.collected_params = []
    ema.store(model.parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_lent_nothing(way: str) -> None:
    model = model_of()
    ema = LitEma(model)
    ema.store(model.parameters())
    ema.copy_to(model)
    other = copy.deepcopy(ema) if way == "deepcopy" else pickle.loads(pickle.dumps(ema))
    other.store(model.parameters())
    with pytest.raises(StateError):
        ema.store(model.parameters())


@pytest.mark.parametrize("wrap", [False, True])
def test_the_model_is_not_kept_alive(wrap: bool) -> None:
    model = model_of()
    ema = LitEma(model)
    given = nn.DataParallel(model) if wrap else model
    ema.store(model.parameters())
    for _ in range(2):
        ema(given)
        ema.copy_to(given)
    gone = [weakref.ref(one) for one in [model, *model.parameters()]]
    del model, given
    gc.collect()
    assert not any(reference() is not None for reference in gone)


@pytest.mark.parametrize("way", ["half", "double", "assign"])
def test_averages_that_were_replaced_are_not_kept_alive(way: str) -> None:
    model = model_of()
    ema = LitEma(model)
    ema(model)
    gone = weakref.ref(ema.get_buffer("0weight"))
    if way == "assign":
        state = {name: one.clone() for name, one in ema.state_dict().items()}
        ema.load_state_dict(state, assign=True)
    else:
        getattr(ema, way)()
    gc.collect()
    assert gone() is None
    ema(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", ["to", "type"])
def test_counters_keep_their_dtypes(dtype: Any, call: str) -> None:
    pipeline = Pipeline(model_of())
    ema = pipeline.model_ema
    ema.decay.fill_(0.9999)
    getattr(pipeline, call)(dtype)
    assert (ema.decay.dtype, ema.num_updates.dtype) == (torch.float32, torch.int32)
    assert float(ema.decay) == float(np.float32(0.9999))
    assert ema.get_buffer("0weight").dtype == dtype
    assert torch.tensor(0.9999).to(dtype) == 1  # which would be an average that stands still
    assert list(ema.state_dict()) == ["decay", "num_updates", *TRAINED.values()]
    ema.num_updates.fill_(10**6)
    before = reals(ema.get_buffer("1weight"))
    with torch.no_grad():
        pipeline.model[1].weight.add_(1000)
    ema(pipeline.model)
    moved = (reals(ema.get_buffer("1weight")) - before).mean()
    assert moved == pytest.approx(0.1, abs=0.03)


def unfrozen() -> Any:
    return model_of().requires_grad_(True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (unfrozen, r"'1\.bias' is trained in the model, but has no average"),
        (larger, r"'3\.weight' is trained in the model, but has no average"),
        (lambda: model_of()[:1], r"'1\.weight' has an average, but the model has no such"),
        (reshaped, r"'1\.weight' is \[6, 5\] in the model, its average \[4, 5\]"),
    ],
)
def test_errors_say_what_is_the_model_and_what_to_do(other: Any, message: str) -> None:
    ema = LitEma(model_of())
    for call in (ema, ema.copy_to):
        with pytest.raises(LayoutError, match=message) as error:
            call(other())
        assert "build a new LitEma" in str(error.value)
        assert "second" not in str(error.value)


def test_parameters_that_are_trained_since_are_named() -> None:
    model = model_of()
    ema = LitEma(model)
    ema(model)
    model[1].bias.requires_grad_(True)
    with pytest.raises(LayoutError, match=r"'1\.bias' is trained in the model"):
        ema(model)
    model[1].bias.requires_grad_(False)
    ema(model)
    assert int(ema.num_updates) == 2


def test_errors_of_store_and_restore_say_what_to_do() -> None:
    model = model_of()
    ema = LitEma(model)
    for call in (ema.store, ema.restore):
        ema.collected_params = [torch.ones(1)]
        with pytest.raises(ArgumentError, match=r"model\.parameters\(\)"):
            call(model)
    ema.store(model.parameters())
    raw = [one.detach().clone() for one in larger().parameters()]
    with pytest.raises(LayoutError, match=r"given 8 parameters, store\(\) 6: give those"):
        ema.restore(raw)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "of type NoneType, expected a tensor"),
        (1.5, "of type float, expected a tensor"),
        (torch.empty(3, 2, 3, 3, device="meta"), "no contents"),
        (torch.zeros(3, 2, 3, 3).to_sparse(), "sparse_coo, expected a dense"),
    ],
)
def test_averages_that_are_no_tensors_are_refused(found: Any, message: str) -> None:
    pipeline = Pipeline(model_of())
    state = pipeline.state_dict()
    state["model_ema.0weight"] = found
    with pytest.raises(CheckpointError, match=message):
        ema_weights(state, pipeline.model)


@pytest.mark.parametrize("checkpoint", [None, [1], {"state_dict": None}, {3: torch.ones(1)}])
def test_checkpoints_that_are_no_mappings_are_refused(checkpoint: Any) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        ema_weights(checkpoint, model_of())
    with pytest.raises(CheckpointError, match="expected"):
        with_ema_weights(checkpoint, {})
