"""Attacks on the host side of CUDA launches: graph captures and their replays."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import StateError
from fastema.rules import constant, power, warmup

from ..support.states import nested
from ..support.stub_gpu import assert_equal, change_weights, gpu, shadow
from .late_device import SIDE, LateGpu, late

__all__ = ["gpu", "late"]


@pytest.mark.parametrize("warm", [True, False], ids=["warmed up there", "fresh stream"])
def test_a_graph_keeps_the_tables_it_was_captured_with(late: LateGpu, warm: bool) -> None:
    """The model moves and is updated eagerly; the graph still averages the old weights."""
    model = torch.nn.ParameterList([late.random(300)])
    ema = fastema.EMA(model, 0.5, capturable=True)
    with late.on(900 if warm else SIDE):
        ema.update()
    with late.capture(900) as graph:
        ema.update()
    old = model[0].data
    model[0].data = late.random(300)
    ema.update()
    gc.collect()
    average = shadow(ema)["0"]
    late.replay(graph)
    assert late.driver.violations == []
    torch.testing.assert_close(ema.shadow["0"], average.lerp(old, 0.5))
    assert ema.num_updates == 3


def test_replays_skip_nonfinite_updates_as_the_cpu_does(late: LateGpu) -> None:
    options = {"decay": [warmup(0.9), *(0.9,) * 9], "start_after": 2, "update_every": 2}
    weights = [late.random(300), late.random(7).bfloat16()]
    mask = late.tensor(torch.tensor([float("-inf"), 1.0]), "a mask")
    model = torch.nn.ParameterList(weights)
    model.register_buffer("mask", mask)
    ema = fastema.EMA(model, capturable=True, on_nonfinite="skip", **options)
    late.stub.place = lambda tensor: None
    there = copy.deepcopy(model)
    want = fastema.EMA(there, on_nonfinite="skip", **options)
    late.stub.place = lambda tensor: 0
    ema.update()
    want.update()
    with late.capture() as graph:
        ema.update()
    late.context.calls.clear()
    generator = np.random.default_rng(4)
    for _ in range(40):
        change_weights(model.parameters())
        if generator.random() < 0.6:
            model[int(generator.integers(2))].data.view(-1)[3] = generator.choice([np.nan, np.inf])
        there.load_state_dict(model.state_dict())
        late.replay(graph)
        late.stub.place = lambda tensor: None
        want.update()
        late.stub.place = lambda tensor: 0
        for parameter in model.parameters():
            parameter.data.nan_to_num_(0.5, 0.5, 0.5)
    assert not late.context.calls  # replays need no call and no wait on the host
    assert (ema.num_updates, ema.num_skipped) == (want.num_updates, want.num_skipped)
    assert ema.num_skipped > 3
    for got, expected in zip(ema.shadows, want.shadows, strict=True):
        assert_equal(dict(got), dict(expected))
    state = ema.state_dict()
    assert nested(state)["num_skipped"] == want.num_skipped
    resumed = fastema.EMA(model, capturable=True, on_nonfinite="skip", **options)
    resumed.load_state_dict(state)
    assert resumed.num_skipped == want.num_skipped
    assert resumed.to(dtype="float64").num_skipped == want.num_skipped


def test_a_capture_after_a_move_is_refused_until_an_eager_update(late: LateGpu) -> None:
    model = torch.nn.ParameterList([late.random(300)])
    ema = fastema.EMA(model, 0.5, capturable=True)
    model[0].data = late.random(300)
    before = shadow(ema)
    with late.capture() as graph, pytest.raises(StateError, match="before this stream was capt"):
        ema.update()
    assert graph == []
    assert ema.num_updates == 0
    assert_equal(before, shadow(ema))
    ema.update()
    with late.capture() as graph:
        ema.update()
    assert len(graph) == 2
    assert ema.num_updates == 1


@pytest.mark.parametrize(
    "call", [lambda ema: ema.shadow["0"], fastema.EMA.apply_shadow], ids=["shadow", "apply"]
)
def test_reads_and_swaps_before_the_start_are_refused_in_a_capture(
    late: LateGpu, call: Callable[[fastema.EMA], object]
) -> None:
    """Every replay would copy the weights over the average, even after the start."""
    weights = [late.random(30)]
    ema = fastema.EMA(weights, 0.5, start_after=2)
    ema.update()
    with ema.swapped():
        pass
    with late.capture() as graph, pytest.raises(StateError):
        call(ema)
    assert graph == []


REPLAYED: list[dict[str, Any]] = [
    {"decay": warmup(0.999), "start_after": 3, "update_every": 2},
    {"decay": warmup(0.9), "start_after": 3, "shadow_dtype": "bfloat16"},
    {"decay": (constant(0.9), power(0.1)), "start_after": 5, "update_every": 2},
    {"start_after": 2, "shadow_dtype": "bfloat16", "rounding": "nearest"},
    {"decay": warmup(0.9), "start_after": 1, "shadow_dtype": "bf16+16", "update_every": 3},
]


@pytest.mark.parametrize(
    "options",
    [*REPLAYED[:3], *(pytest.param(one, marks=pytest.mark.slow) for one in REPLAYED[3:])],
    ids=str,
)
def test_replays_equal_cpu_updates_to_the_bit(late: LateGpu, options: dict[str, Any]) -> None:
    """Before the start, at the start, and long after it, where weights come from polynomials."""
    weights = [late.random(500)]
    others = [weights[0].clone()]
    ema = fastema.EMA(weights, seed=2**62 + 3, capturable=True, **options)
    late.stub.place = lambda tensor: None
    twin = fastema.EMA(others, seed=2**62 + 3, **options)
    late.stub.place = lambda tensor: 0
    with late.capture() as graph:
        ema.update()
    for step in range(1, 201):
        change_weights(weights)
        others[0].copy_(weights[0])
        late.replay(graph)
        late.stub.place = lambda tensor: None
        twin.update()
        want = [dict(one) for one in twin.shadows] if step < 20 or step % 20 == 0 else []
        late.stub.place = lambda tensor: 0
        for found, one in zip(ema.shadows, want, strict=False):
            assert_equal(found, one)
        assert not want or ema.num_updates == step
