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
from fastema.errors import ArgumentError, BridgeError, DTypeError, FastemaError, LayoutError

from .shadow.truth import Loops
from .support import reference
from .support.mixed import PAIRS, SHAPES, Arrays, bits, lerped, numbers, plain, stored, to_torch

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
FIXED = ["jax", "read-only"]


def made(kind: str, arrays: Arrays) -> dict[str, Any]:
    return {name: MAKE[kind](one) for name, one in arrays.items()}


@pytest.mark.parametrize("codes", PAIRS)
@pytest.mark.parametrize("of", MAKE)
@pytest.mark.parametrize("to", WRITABLE)
def test_a_container_is_averaged_into_another(to: str, of: str, codes: tuple[str, str]) -> None:
    avg, x = made(to, numbers(0, codes[0])), made(of, numbers(1, codes[1]))
    before = bits(x)
    fastema.lerp_(avg, x, 0.25)
    assert bits(avg) == lerped(numbers(0, codes[0]), numbers(1, codes[1]), 0.25, codes)
    assert bits(x) == before
    fastema.copy_(avg, x)
    for name, one in avg.items():
        want = stored(numbers(1, codes[1])[name])
        assert plain(one).tobytes() == reference.cast(want, codes[1], codes[0]).tobytes()
    assert bits(x) == before


@pytest.mark.parametrize("of", WRITABLE)
@pytest.mark.parametrize("to", WRITABLE)
def test_contents_change_places(to: str, of: str) -> None:
    rows = [np.random.default_rng(i).integers(0, 256, 400, np.uint8).view("f4") for i in range(2)]
    a, b = {"w": MAKE[to](rows[0])}, {"w": MAKE[of](rows[1])}
    fastema.swap_(a, b)
    assert (bits(a)["w"], bits(b)["w"]) == (rows[1].tobytes(), rows[0].tobytes())


@pytest.mark.parametrize("of", WRITABLE)
@pytest.mark.parametrize("fixed", FIXED)
def test_what_never_changes_is_never_written(fixed: str, of: str) -> None:
    x, other = made(fixed, numbers(0)), made(of, numbers(1))
    before = bits(x), bits(other)
    for call in (
        lambda: fastema.lerp_(x, other, 0.5),
        lambda: fastema.copy_(x, other),
        lambda: fastema.swap_(x, other),
        lambda: fastema.swap_(other, x),
        lambda: fastema.Plan(x, other),
        lambda: fastema.EMA(other, 0.5).copy_to(x),
    ):
        with pytest.raises(LayoutError, match=r"^a: .*is read-only.*pass a writable copy"):
            call()
    assert (bits(x), bits(other)) == before


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


@pytest.mark.parametrize("before", ["jax", "numpy", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_forgotten(case: str, before: str) -> None:
    mine, same = borrowed()
    old = np.random.default_rng(3).normal(size=70).astype(np.float32)
    x = [MAKE[before](old)]
    plan = fastema.Plan([mine], x)
    if before != "jax":  # those would be used up
        plan.lerp_(0.5)
    kept = mine.copy()
    for call in (plan.copy_, lambda bad: plan.lerp_(0.5, bad)):
        for _ in range(2):
            with pytest.raises(FastemaError):
                call(BAD[case](mine, same))
        np.testing.assert_array_equal(mine, kept)
    plan.lerp_(0.5)  # with those of before
    want = reference.lerp(kept, old, 0.5, "f32", "f32")
    np.testing.assert_array_equal(mine, want)
    if before != "jax":  # and what they hold now, where they are now
        x[0] = MAKE[before](old * 3)
        plan.lerp_(1.0)
        np.testing.assert_array_equal(mine, old * 3)


def test_integers_in_a_plan_are_copied_but_not_averaged() -> None:
    avg = [np.arange(5)]
    plan = fastema.Plan(avg, [np.arange(5) * 2])
    for x in (None, [np.arange(5) * 3]):
        with pytest.raises(DTypeError, match="'0' is i64"):
            plan.lerp_(0.5, x)
    plan.copy_()
    np.testing.assert_array_equal(avg[0], np.arange(5) * 2)
    context = jax if hasattr(jax, "enable_x64") else jax.experimental  # before JAX 0.8
    with context.enable_x64(True):
        plan.copy_([jnp.arange(5) * 4])
    np.testing.assert_array_equal(avg[0], np.arange(5) * 4)


def test_one_average_of_two_sources() -> None:
    avg, one = np.full(5, 4.0, np.float32), jnp.full(5, 8.0)
    plan = fastema.Plan({"a": avg, "b": avg}, {"a": one, "b": one})
    plan.lerp_(0.5)
    np.testing.assert_array_equal(avg, 6)
    with pytest.raises(LayoutError, match=r"avg a .* avg b .* overlap"):
        plan.lerp_(0.5, {"a": one, "b": one + 1})
    np.testing.assert_array_equal(avg, 6)


def test_traced_arrays_are_refused() -> None:
    avg = [np.ones(3, np.float32)]
    plan = fastema.Plan(avg, [jnp.ones(3)])
    for call in (lambda x: plan.lerp_(0.5, [x]), lambda x: fastema.lerp_(avg, [x], 0.5),
                 lambda x: plan.lerp_(0.5)):  # fmt: skip
        with pytest.raises(BridgeError, match="jit, grad and vmap"):
            jax.jit(call)(jnp.zeros(3))
    np.testing.assert_array_equal(avg[0], 1)
    plan.lerp_(0.5, [jnp.full(3, 3.0)])
    np.testing.assert_array_equal(avg[0], 2)


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


def test_the_mean_of_a_stretch_of_jax_trees() -> None:
    def mean(stop: int) -> Arrays:
        return {
            n: np.asarray(np.mean([numbers(s)[n] for s in range(stop)], axis=0, dtype=np.float64))
            .astype(np.float32)
            for n in SHAPES
        }  # fmt: skip

    found = fastema.mean_between(made("jax", mean(8)), 8, made("torch", mean(3)), 3)
    for name, one in found.items():
        want = np.mean([numbers(s)[name].astype(np.float64) for s in range(3, 8)], axis=0)
        np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-6)
        assert one.dtype == np.float64
