"""The low-level interface and averages between frameworks, in every direction there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema.errors import ArgumentError

from .shadow.truth import Loops
from .support.mixed import SHAPES, Arrays, bits, lerped, numbers, plain, to_torch

NEEDS = ("ml_dtypes",)


pytestmark = pytest.mark.torch


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


MAKE: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": np.array,
    "torch": to_torch,
    "jax": jnp.asarray,
    "read-only": read_only,
}
WRITABLE = ["numpy", "torch"]


def made(kind: str, arrays: Arrays) -> dict[str, Any]:
    return {name: MAKE[kind](one) for name, one in arrays.items()}


def test_one_tree_of_several_frameworks() -> None:
    kinds = dict(zip(SHAPES, ["jax", "torch", "read-only", "numpy", "jax"], strict=True))

    def mixed(seed: int) -> dict[str, Any]:
        return {n: MAKE[kinds[n]](one) for n, one in numbers(seed).items()}

    avg = made("numpy", numbers(0))
    plan = fastema.Plan(avg, mixed(1))
    want = numbers(0)
    for seed in range(1, 6):
        plan.lerp_(0.25, mixed(seed))
        new = lerped(want, numbers(seed), 0.25, ("f32", "f32"))
        want = {n: np.frombuffer(raw, "f4").reshape(SHAPES[n]) for n, raw in new.items()}
        assert bits(avg) == new
    plan.lerp_(0.5)
    assert bits(avg) == lerped(want, numbers(5), 0.5, ("f32", "f32"))


@given(st.lists(st.tuples(st.sampled_from(sorted(MAKE)), st.booleans()), max_size=12))
def test_a_plan_follows_whatever_it_is_given(steps: list[tuple[str, bool]]) -> None:
    avg, truth = numbers(0), numbers(0)
    plan = fastema.Plan(avg, made("jax", numbers(1)))
    last, spent = numbers(1), False
    for n, (kind, give) in enumerate(steps):
        if give:
            last, spent = numbers(n + 10), kind == "jax"
            plan.lerp_(0.25, made(kind, last))
        elif spent:  # arrays that never change, and that were used
            with pytest.raises(ArgumentError, match=r"plan\.lerp_\(x="):
                plan.lerp_(0.25)
            assert bits(avg) == bits(truth)
            continue
        else:
            plan.lerp_(0.25)
            spent = not any(given for _, given in steps[:n])
        new = lerped(truth, last, 0.25, ("f32", "f32"))
        truth = {n: np.frombuffer(raw, "f4").reshape(SHAPES[n]) for n, raw in new.items()}
        assert bits(avg) == new


def borrowed() -> tuple[np.ndarray, Any]:
    """Memory of NumPy, and a JAX array that is the same."""
    whole = np.arange(1.0, 501.0, dtype=np.float32)
    start = -whole.ctypes.data % 64 // 4
    mine = whole[start : start + 70]
    array = jax.device_put(mine)
    assert array.unsafe_buffer_pointer() == mine.ctypes.data
    return mine, array


BAD: dict[str, Callable[[np.ndarray, Any], Any]] = {
    "overlap": lambda mine, same: [same],
    "itself": lambda mine, same: [mine],
    "shape": lambda mine, same: [np.ones(3, np.float32)],
    "shape of jax": lambda mine, same: [jnp.ones(3)],
    "dtype": lambda mine, same: [np.ones(70, np.int32)],
    "complex": lambda mine, same: [jnp.ones(70, "complex64")],
    "names": lambda mine, same: {"w": jnp.ones(70)},
    "more": lambda mine, same: [jnp.ones(70), jnp.ones(70)],
    "number": lambda mine, same: [3.0],
    "mixed": lambda mine, same: [torch.ones(71)],
    "float8": lambda mine, same: [jnp.ones(70, jnp.float8_e4m3fn)],
    "meta": lambda mine, same: [torch.ones(70, device="meta")],
}


# -- averages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", MAKE)
@pytest.mark.parametrize("first", MAKE)
def test_an_average_goes_on_with_weights_of_another_framework(first: str, later: str) -> None:
    ema = fastema.EMA(made(first, numbers(0)), 0.5)
    loops = Loops(numbers(0), "f32", "f32")
    for seed in range(1, 5):
        ema.update(made(later if seed % 2 else first, numbers(seed)))
        loops.step(numbers(seed), 0.5)
    loops.check({name: plain(one) for name, one in ema.shadow.items()})
    target = made("torch", numbers(9))
    ema.copy_to(target)
    assert bits(target) == bits({**ema.shadow})


@pytest.mark.parametrize("to", [*MAKE])
@pytest.mark.parametrize("of", [*MAKE])
def test_a_state_is_loaded_by_another_framework(of: str, to: str) -> None:
    ema = fastema.EMA(made(of, numbers(0)), 0.9)
    ema.update(made(of, numbers(1)))
    other = fastema.EMA(made(to, numbers(5)), 0.5)
    state = ema.state_dict()
    for kind in MAKE:
        held = {n: MAKE[kind](plain(one)) for n, one in state["shadow"][0].items()}
        other.load_state_dict({**state, "shadow": [held]})
        assert bits({**other.shadow}) == bits({**ema.shadow})
        other.update(made(to, numbers(7)))
    assert bits(state["shadow"][0]) == bits({**ema.shadow})
