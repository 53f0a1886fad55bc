"""Saving and loading: strict, all or nothing; resumed runs are equal to the bit."""

import copy
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastema
from fastema import rules
from fastema.errors import CheckpointError

from ..support.damage import places
from ..support.states import flat, nested
from .kinds import KINDS, Kind, assert_unchanged, build_trained, full_state, which
from .weights import (
    FLOATS,
    Net,
    assert_average,
    assert_bits,
    net,
    refresh_,
    snapshot,
    train_,
    values,
)

pytestmark = pytest.mark.torch

State = dict[str, Any]


def save_and_load(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: State = torch.load(file, weights_only=True)
    return loaded


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    """Turn every warning in the block into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def train_ema(updates: int = 3, dtype: torch.dtype | None = None, **options: Any) -> fastema.EMA:
    model = net(0, dtype)
    ema = fastema.EMA(model, options.pop("decay", 0.9), **options)
    train_(model, range(1, updates + 1), ema)
    return ema


def ema_builder(**given: Any) -> Kind:
    return lambda weights, **options: fastema.EMA(weights, **{**given, **options})


RUNS: dict[str, Kind] = {
    **KINDS,
    "warmup": ema_builder(decay=rules.warmup(0.99)),
    "inverse_gamma": ema_builder(decay=rules.inverse_gamma(0.99, 3.0, 0.75, 0.05)),
    "half_life": ema_builder(decay=rules.half_life(11)),
    "wide": ema_builder(decay=0.9, shadow_dtype=torch.float64),
    "policies": ema_builder(decay=0.9, buffers="average", frozen="average"),
}
TIMES = [{}, {"update_every": 3}, {"start_after": 9}, {"update_every": 2, "start_after": 3}]


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("cut", [0, 2, 7, 8])
@pytest.mark.parametrize("options", TIMES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("kind", RUNS)
def test_resumed_run_is_equal_to_the_bit(
    kind: str, dtype: torch.dtype, options: State, cut: int, applied: bool
) -> None:
    def build(**other: Any) -> tuple[Net, Any]:
        model = net(0, dtype)
        model.conv.requires_grad_(kind != "policies")
        return model, RUNS[kind](model, **{**options, **other})

    model, average = build(seed=5)
    train_(model, range(1, 15), average)

    first_model, first = build(seed=5)
    train_(first_model, range(1, cut + 1), first)
    raw = copy.deepcopy(first_model.state_dict())
    with first.swapped(**which(first)) if applied else nullcontext():
        saved = save_and_load(first.state_dict())

    # The second run has another history and another seed before it loads.
    second_model, second = build(seed=99, update_every=1)
    train_(second_model, range(20, 27), second)
    second_model.load_state_dict(raw)
    differs = second.schedule != first.schedule
    with pytest.warns(UserWarning, match="schedule") if differs else warnings_as_errors():
        second.load_state_dict(saved)
    assert (second.decay, second.schedule) == (first.decay, first.schedule)
    assert full_state(second) == full_state(first)
    train_(second_model, range(cut + 1, 15), second)
    assert full_state(second) == full_state(average)


SCHEDULES: dict[str, State] = {
    "decay": {"decay": 0.99},
    "rule": {"decay": rules.warmup(0.5)},
    "cadence": {"decay": 0.5, "update_every": 4},
    "start": {"decay": 0.5, "start_after": 3},
}


@pytest.mark.parametrize("what", SCHEDULES)
def test_different_saved_schedule_wins_with_a_warning_that_names_both(what: str) -> None:
    first = train_ema(5, **SCHEDULES[what])
    saved = save_and_load(first.state_dict())
    ema = fastema.EMA(net(4), 0.5)
    mine = ema.schedule
    with pytest.warns(UserWarning, match="schedule='mine'") as caught:
        ema.load_state_dict(saved)
    assert len(caught) == 1
    assert str(mine) in str(caught[0].message)
    assert str(first.schedule) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert ema.schedule == first.schedule
    assert ema.num_updates == 5


@pytest.mark.parametrize("what", SCHEDULES)
def test_schedule_mine_keeps_the_schedule_of_the_average(what: str) -> None:
    """Training continues with it, without a warning: the change is deliberate."""
    saved = save_and_load(train_ema(8, **SCHEDULES[what]).state_dict())
    model = net(4)
    ema = fastema.EMA(model, 0.25, update_every=3)
    mine = ema.schedule
    with warnings_as_errors():
        ema.load_state_dict(saved, schedule="mine")
    assert ema.schedule == mine
    assert ema.num_updates == 8
    before = values(dict(ema.shadow))
    refresh_(model, 5)
    ema.update()
    assert_average(ema, before, values(model), 1 - 0.25**3)


def test_state_holds_plain_tensors_alone_and_json_in_one() -> None:
    for average in (
        train_ema(3, decay=rules.inverse_gamma(0.99)),
        *(build_trained(kind) for kind in KINDS),
    ):
        state = average.state_dict()
        assert all(type(tensor) is torch.Tensor for tensor in state.values())
        assert all(tensor.is_contiguous() for tensor in state.values())
        assert json.loads(bytes(state["fastema"].tolist()))["version"] == 1


def test_loading_copies_in_place_and_leaves_the_model_alone() -> None:
    model = net(3)
    ema, state = fastema.EMA(model), save_and_load(train_ema(6).state_dict())
    before = snapshot(model)
    places = {name: tensor.data_ptr() for name, tensor in ema.shadow.items()}
    ema.load_state_dict(state)
    assert {name: tensor.data_ptr() for name, tensor in ema.shadow.items()} == places
    loaded = snapshot(dict(ema.shadow))
    refresh_(nested(state)["shadow"][0], 5)
    assert_bits(dict(ema.shadow), loaded)
    assert_bits(model, before)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module.module."])
def test_state_with_names_of_a_wrapped_model_loads(prefix: str) -> None:
    state = nested(train_ema(6).state_dict())
    wrapped = {prefix + name: tensor for name, tensor in state["shadow"][0].items()}
    ema = train_ema()
    ema.load_state_dict(flat({**state, "shadow": [wrapped]}))
    assert_bits(dict(ema.shadow), snapshot(state["shadow"][0]))


Change = Callable[[State], object]


def head(**changes: Any) -> Change:
    return lambda state: {**state, **changes}


def drop_entry(key: str) -> Change:
    return lambda state: {k: v for k, v in state.items() if k != key}


def with_header(text: bytes) -> Change:
    return lambda state: {**flat(state), "fastema": torch.tensor([*text], dtype=torch.uint8)}


def schedule(**changes: Any) -> Change:
    return lambda state: {**state, "schedule": {**state["schedule"], **changes}}


def rule(*given: Any) -> Change:
    return schedule(rules=[*given])


def part(name: str, change: Callable[[list[State]], object]) -> Change:
    return lambda state: {**state, name: change(state[name])}


def rename_scale(name: str, index: int = 0) -> Change:
    def change(averages: list[State]) -> list[State]:
        averages[index]["gain"] = averages[index].pop("scale")
        return averages

    return part(name, change)


def narrow_scale(name: str) -> Change:
    return part(name, lambda found: [{**found[0], "scale": found[0]["scale"].half()}])


def break_everything(state: State) -> State:
    (shadow,) = state["shadow"]
    del shadow["scale"], shadow["conv.bias"]
    shadow["gain"], shadow["norm.weight"] = torch.ones(1), 3.0
    shadow["hidden.weight"] = torch.ones(12, 7)
    shadow["hidden.bias"] = shadow["hidden.bias"].double()
    shadow["head.weight"] = shadow["head.weight"].to_sparse()
    state["schedule"]["rules"][0]["value"] = 1.5
    return state


NO_STATE = "not a fastema state"
WRONG: dict[str, tuple[Change, str]] = {
    "nothing": (lambda state: None, NO_STATE),
    "a list": (lambda state: [state], NO_STATE),
    "empty": (lambda state: {}, NO_STATE),
    "the weights": (lambda state: net().state_dict(), NO_STATE),
    "the average": (lambda state: state["shadow"][0], NO_STATE),
    "the averages": (lambda state: state["shadow"], NO_STATE),
    "version": (head(version=2), "version 2"),
    "no version": (drop_entry("version"), "version None"),
    "kind": (head(kind="SWA"), "'SWA'"),
    "negative": (head(num_updates=-1), "num_updates is -1"),
    "fraction": (head(num_updates=2.5), "num_updates is 2.5"),
    "truth": (head(num_updates=True), "num_updates is True"),
    "no count": (drop_entry("num_updates"), "num_updates is None"),
    "huge": (head(num_updates=2**63), f"num_updates is {2**63}"),
    "no skips": (drop_entry("num_skipped"), "num_skipped is None"),
    "no seed": (lambda s: flat(drop_entry("seed")(s)), "seed is None"),
    "an entry of its own": (lambda s: {**flat(s), "epoch": 3}, "'epoch' is unexpected"),
    "a header that is no JSON": (with_header(b"{"), "is not JSON"),
    "a header that is a list": (with_header(b"[1]"), "is not a JSON object"),
    "a header that is no tensor": (lambda s: {**flat(s), "fastema": 3}, "is not a tensor"),
    "no header": (lambda s: drop_entry("fastema")(flat(s)), "without the tensor 'fastema'"),
    "seed": (head(seed=-1), "seed is -1"),
    "huge seed": (head(seed=2**63), f"seed is {2**63}"),
    "no shadow": (lambda s: {"fastema": flat(s)["fastema"]}, "it has no 'shadow'"),
    "two averages": (part("shadow", lambda found: found * 2), "holds 2 averages, expected 1"),
    "residual": (lambda s: {**s, "residual": s["shadow"]}, "'residual' is unexpected"),
    "ring": (lambda s: {**s, "ring": s["shadow"]}, "'ring' is unexpected"),
    "two rules": (lambda s: rule(*s["schedule"]["rules"] * 2)(s), "2 averages, not 1"),
    "no schedule": (drop_entry("schedule"), "schedule"),
    "schedule text": (head(schedule="constant"), "schedule"),
    "schedule none": (head(schedule=None), "schedule"),
    "no rules": (rule(), "schedule"),
    "rules none": (schedule(rules=None), "schedule"),
    "rules bare": (schedule(rules={"rule": "Constant", "value": 0.5}), "schedule"),
    "rule text": (rule("constant"), "schedule"),
    "rule list": (rule(["Constant", 0.9]), "schedule"),
    "rule none": (rule(None), "schedule"),
    "rule number": (rule(0.9), "schedule"),
    "rule unknown": (rule({"rule": "Cosine"}), "Cosine"),
    "rule odd": (rule({"rule": ["Constant"]}), "schedule"),
    "rule parts": (rule({"rule": "Constant"}), "Constant"),
    "rule more": (rule({"rule": "Constant", "value": 0.5, "k": 1}), "Constant"),
    "rule value": (rule({"rule": "Constant", "value": "often"}), "often"),
    "rule of a window": (rule({"rule": "Window", "size": 3}), "Window"),
    "every": (schedule(update_every=0), "update_every=0"),
    "start": (schedule(start_after="x"), "start_after='x'"),
}
# By kind of average; each message must name everything that is wrong.
WRONG_PARTS: dict[str, tuple[str, Change, list[str]]] = {
    **{name: ("EMA", change, [message]) for name, (change, message) in WRONG.items()},
    "all of a head": (
        "EMA",
        head(version=9, kind="SWA", num_updates=-4),
        ["version 9", "'SWA'", "-4"],
    ),
    "another model": (
        "EMA",
        lambda state: nested(fastema.EMA(nn.Linear(3, 2)).state_dict()),
        ["'weight' is unexpected", "'bias' is unexpected", "'conv.weight' is missing"],
    ),
    "every mismatch": (
        "EMA",
        break_everything,
        [
            *("'scale' is missing", "'conv.bias' is missing", "'gain' is unexpected"),
            *("[12, 7]", "[12, 6]", "'hidden.bias' is f64, expected f32"),
            *("'head.weight'", "'norm.weight'", "schedule", "1.5"),
        ],
    ),
    "no residual": ("split", drop_entry("residual"), ["no 'residual'"]),
    "residual names": (
        "split",
        rename_scale("residual"),
        ["'scale' is missing in residual[0]", "'gain' is unex"],
    ),
    "residual dtype": (
        "split",
        narrow_scale("residual"),
        ["'scale' is f16, expected i16 in residual[0]"],
    ),
    "low of two": (
        "three split",
        part("residual", lambda found: found[:2]),
        ["'residual' holds 2 averages, expected 3"],
    ),
    "one of three": ("three", rename_scale("shadow", 1), ["'scale' is missing in shadow[1]"]),
    "no ring": ("SMA", drop_entry("ring"), ["no 'ring'"]),
    "ring dtype": ("SMA", narrow_scale("ring"), ["'scale' is f16, expected f32 in ring[0]"]),
    "no remainder": ("SMA", drop_entry("residual"), ["no 'residual'"]),
    "a shorter window": (
        "SMA",
        part("ring", lambda found: [{n: t[:2] for n, t in found[0].items()}]),
        ["'scale' is [2], expected [3] in ring[0]", "[2, 5, 12], expected [3, 5, 12]"],
    ),
    "a rule without a window": ("SMA", rule({"rule": "Constant", "value": 0.5}), ["Constant"]),
    "a rule of another window": ("SMA", rule({"rule": "Window", "size": 4}), ["4"]),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_mismatched_state_is_refused_and_changes_nothing(case: str) -> None:
    kind, change, messages = WRONG_PARTS[case]
    model = net()
    average = build_trained(kind, model)
    decay, schedule = average.decay, average.schedule
    state = change(nested(build_trained(kind, updates=7).state_dict()))
    if isinstance(state, dict) and "seed" in state:
        state = flat(state)
    with assert_unchanged(model, average), pytest.raises(CheckpointError) as caught:
        average.load_state_dict(state)
    assert [part for part in messages if part not in str(caught.value)] == []
    assert (average.decay, average.schedule) == (decay, schedule)
    average.update()


JUNK: list[Any] = [
    *(np.ones(2), np.array(1), np.array("fastema"), torch.ones(2), torch.tensor(1)),
    *(np.float64(3.0), None, {}, [], [np.ones(2)], {"a": torch.ones(2)}, {3: np.ones(3)}),
    *("x", -1, 2**64, math.nan, object()),
]


@pytest.mark.parametrize("value", JUNK, ids=lambda value: type(value).__name__)
def test_junk_anywhere_in_a_state_loads_or_raises_checkpoint_error(value: Any) -> None:
    weights = {"a": np.ones(3, np.float32), "b": np.ones((2, 2))}
    rules_ = (rules.warmup(0.9), rules.inverse_gamma(0.9))
    one = fastema.EMA(weights, rules_, zero_debias=True).state_dict()
    header = json.loads(one["fastema"].tobytes())
    count = len(one) + len(list(places(header)))
    for at in range(count):
        ema = fastema.EMA(weights, rules_, zero_debias=True)
        ema.update()
        state = ema.state_dict()
        if at < len(one):
            key = list(state)[at]
            state[key] = value
        else:
            header = json.loads(state["fastema"].tobytes())
            tree, key = list(places(header))[at - len(one)]
            tree[key] = value
            try:
                text = json.dumps(header).encode()
            except TypeError:  # no JSON can hold it
                continue
            state["fastema"] = np.frombuffer(text, np.uint8)
        try:
            ema.load_state_dict(state)
        except CheckpointError:
            assert ema.num_updates == 1, key
        else:
            ema.update()
