"""The low-level interface and averages between frameworks, in every direction."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema.errors import ArgumentError, DTypeError

from .average.truth import Loops
from .support import reference
from .support.mixed import (
    PAIRS,
    SHAPES,
    Arrays,
    bytes_by_name,
    draw_arrays,
    lerp_bytes,
    to_numpy,
    to_storage,
    to_torch,
)
from .support.states import nested

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


def make_arrays(kind: str, arrays: Arrays) -> dict[str, Any]:
    kinds = [*MAKE] if kind == "mixed" else [kind]
    return {n: MAKE[kinds[i % len(kinds)]](one) for i, (n, one) in enumerate(arrays.items())}


def arrays_of(raw: dict[str, bytes]) -> Arrays:
    return {n: np.frombuffer(one, "f4").reshape(SHAPES[n]) for n, one in raw.items()}


@pytest.mark.parametrize("codes", PAIRS)
@pytest.mark.parametrize("of", [*MAKE, "mixed"])
@pytest.mark.parametrize("to", ["numpy", "torch"])
def test_lerp_and_copy_equal_the_reference(to: str, of: str, codes: tuple[str, str]) -> None:
    new = draw_arrays(1, codes[1])
    avg, x = make_arrays(to, draw_arrays(0, codes[0])), make_arrays(of, new)
    fastema.lerp_(avg, x, 0.25)
    assert bytes_by_name(avg) == lerp_bytes(draw_arrays(0, codes[0]), new, 0.25, codes)
    fastema.copy_(avg, x)
    copied = {n: reference.cast(to_storage(one), codes[1], codes[0]) for n, one in new.items()}
    assert bytes_by_name(avg) == {n: one.tobytes() for n, one in copied.items()}
    assert bytes_by_name(x) == bytes_by_name(new)


@given(st.lists(st.tuples(st.sampled_from([*MAKE]), st.booleans()), max_size=12))
def test_plan_takes_arrays_of_any_framework_in_turn(steps: list[tuple[str, bool]]) -> None:
    avg, truth = draw_arrays(0), draw_arrays(0)
    plan = fastema.Plan(avg, make_arrays("jax", draw_arrays(1)))
    last, spent = draw_arrays(1), False
    for n, (kind, give) in enumerate(steps):
        if give:
            last, spent = draw_arrays(n + 10), kind == "jax"
            plan.lerp_(0.25, make_arrays(kind, last))
        elif spent:  # immutable arrays that were already used
            with pytest.raises(ArgumentError, match=r"plan\.lerp_\(x="):
                plan.lerp_(0.25)
            assert bytes_by_name(avg) == bytes_by_name(truth)
            continue
        else:
            plan.lerp_(0.25)
            spent = not any(given for _, given in steps[:n])
        truth = arrays_of(lerp_bytes(truth, last, 0.25, ("f32", "f32")))
        assert bytes_by_name(avg) == bytes_by_name(truth)


@pytest.mark.parametrize("later", MAKE)
@pytest.mark.parametrize("first", MAKE)
def test_average_and_state_continue_in_another_framework(first: str, later: str) -> None:
    ema = fastema.EMA(make_arrays(first, draw_arrays(0)), 0.5)
    loops = Loops(draw_arrays(0), "f32", "f32")
    for seed in range(1, 5):
        ema.update(make_arrays(later if seed % 2 else first, draw_arrays(seed)))
        loops.step(draw_arrays(seed), 0.5)
    loops.check({name: to_numpy(one) for name, one in ema.shadow.items()})
    target = make_arrays("torch", draw_arrays(9))
    ema.copy_to(target)
    assert bytes_by_name(target) == bytes_by_name({**ema.shadow})
    other = fastema.EMA(make_arrays(later, draw_arrays(5)), 0.5)
    state = ema.state_dict()
    for kind in MAKE:
        other.load_state_dict({n: MAKE[kind](to_numpy(one)) for n, one in state.items()})
        assert bytes_by_name({**other.shadow}) == bytes_by_name({**ema.shadow})
        other.update(make_arrays(later, draw_arrays(7)))
    assert bytes_by_name(nested(state)["shadow"][0]) == bytes_by_name({**ema.shadow})


def test_plan_of_integers_copies_but_does_not_average() -> None:
    avg = [np.arange(5)]
    plan = fastema.Plan(avg, [np.arange(5) * 2])
    for x in (None, [np.arange(5) * 3]):
        with pytest.raises(DTypeError, match="'0' is i64"):
            plan.lerp_(0.5, x)
    plan.copy_()
    np.testing.assert_array_equal(avg[0], np.arange(5) * 2)
    plan.copy_([torch.arange(5) * 4])
    np.testing.assert_array_equal(avg[0], np.arange(5) * 4)
