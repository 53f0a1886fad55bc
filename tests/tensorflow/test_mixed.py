"""TensorFlow beside the others: what may be written from what, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema.errors import BridgeError, FastemaError, LayoutError

from ..shadow.truth import Loop
from ..support.mixed import PAIRS, SHAPES, Arrays, bits, lerped, numbers, plain, to_torch

NEEDS = ("torch", "ml_dtypes")


pytestmark = pytest.mark.tensorflow

MAKE: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": np.array,
    "torch": to_torch,
    "jax": jnp.asarray,
    "variable": tf.Variable,
    "tensor": tf.constant,
}
WRITABLE = ["numpy", "torch", "variable"]
WITH_VARIABLES = [(to, of) for to in WRITABLE for of in MAKE
                  if "variable" in (to, of) or of == "tensor"]  # fmt: skip


def made(kind: str, arrays: Arrays) -> dict[str, Any]:
    return {name: MAKE[kind](one) for name, one in arrays.items()}


@pytest.mark.parametrize("codes", PAIRS)
@pytest.mark.parametrize(("to", "of"), WITH_VARIABLES)
def test_a_container_is_averaged_into_another(to: str, of: str, codes: tuple[str, str]) -> None:
    avg, x = made(to, numbers(0, codes[0])), made(of, numbers(1, codes[1]))
    before = bits(x)
    held = [one.value() for one in avg.values()] if to == "variable" else []
    was = [plain(one).tobytes() for one in held]
    fastema.lerp_(avg, x, 0.25)
    assert bits(avg) == lerped(numbers(0, codes[0]), numbers(1, codes[1]), 0.25, codes)
    assert bits(x) == before
    assert [plain(one).tobytes() for one in held] == was


@pytest.mark.parametrize("other", WRITABLE)
def test_contents_change_places(other: str) -> None:
    rows = [np.random.default_rng(i).integers(0, 256, 400, np.uint8).view("f4") for i in range(2)]
    for first in (True, False):
        a, b = tf.Variable(rows[0]), MAKE[other](rows[1])
        held = a.value()
        fastema.swap_(*((([a], [b])) if first else ([b], [a])))
        assert plain(a).tobytes() == rows[1].tobytes()
        assert plain(b).tobytes() == rows[0].tobytes()
        assert plain(held).tobytes() == rows[0].tobytes()


def test_tensors_are_never_written() -> None:
    given_, variable = tf.constant([1.0, 2.0]), tf.Variable([3.0, 4.0])
    for call in (
        lambda: fastema.lerp_([given_], [variable], 0.5),
        lambda: fastema.copy_([given_], [np.ones(2, np.float32)]),
        lambda: fastema.swap_([variable], [given_]),
        lambda: fastema.EMA([variable], 0.5).copy_to([given_]),
    ):
        with pytest.raises(LayoutError, match=r"^0: .*read-only.*tensors of TensorFlow"):
            call()
    np.testing.assert_array_equal(given_, [1.0, 2.0])
    np.testing.assert_array_equal(variable, [3.0, 4.0])
    ema = fastema.EMA([given_], 0.5)
    ema.update([given_ + 2])
    with pytest.raises(LayoutError, match="swapped"):
        ema.apply_shadow()
    with ema.swapped() as tensors:
        np.testing.assert_array_equal(tensors[0], [2.0, 3.0])
    np.testing.assert_array_equal(given_, [1.0, 2.0])


@given(st.lists(st.sampled_from(["lerp", "assign x", "assign avg", "swap", "copy", "hold", "give"]),
                max_size=14))  # fmt: skip
def test_a_plan_between_variables(steps: list[str]) -> None:
    avg, x = made("variable", numbers(0)), made("variable", numbers(1))
    plan = fastema.Plan(avg, x)
    truth, new = numbers(0), numbers(1)
    held: list[tuple[Any, bytes]] = []
    for n, step in enumerate(steps):
        if step in ("lerp", "give"):
            if step == "give":
                x, new = made("variable", numbers(n + 50)), numbers(n + 50)
                plan.lerp_(0.25, x)
            else:
                plan.lerp_(0.25)
            raw = lerped(truth, new, 0.25, ("f32", "f32"))
            truth = {k: np.frombuffer(b, "f4").reshape(SHAPES[k]) for k, b in raw.items()}
        elif step == "assign x":
            new = numbers(n + 10)
            for name, one in x.items():
                one.assign(new[name])
        elif step == "assign avg":
            truth = numbers(n + 20)
            for name, one in avg.items():
                one.assign(truth[name])
        elif step == "swap":
            plan.swap_()
            truth, new = new, truth
        elif step == "copy":
            plan.copy_()
            truth = dict(new)
        else:
            held += [(one.value(), plain(one).tobytes()) for one in (*avg.values(), *x.values())]
        assert bits(avg) == {k: v.tobytes() for k, v in truth.items()}
        assert bits(x) == {k: v.tobytes() for k, v in new.items()}
        assert all(plain(one).tobytes() == was for one, was in held)


BAD: dict[str, Callable[[Any], Any]] = {
    "itself": lambda avg: [avg],
    "shape": lambda avg: [tf.Variable([1.0])],
    "text": lambda avg: [tf.constant("text")],
    "names": lambda avg: {"w": tf.Variable([1.0, 2.0])},
    "integer": lambda avg: [tf.Variable([1, 2])],
    "number": lambda avg: [3.0],
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("before", ["variable", "jax", "numpy", "tensor"])
def test_what_is_refused_is_forgotten(case: str, before: str) -> None:
    avg, x = tf.Variable([1.0, 2.0]), MAKE[before](np.float32([5.0, 6.0]))
    plan = fastema.Plan([avg], [x])
    plan.lerp_(0.5)
    for _ in range(2):
        for call in (plan.copy_, lambda bad: plan.lerp_(0.5, bad)):
            with pytest.raises(FastemaError):
                call(BAD[case](avg))
            np.testing.assert_array_equal(avg, [3.0, 4.0])
    if before in ("jax", "tensor"):
        with pytest.raises(FastemaError, match="no new arrays"):
            plan.lerp_(0.5)
        plan.lerp_(0.5, [x])
    else:
        plan.lerp_(0.5)
    np.testing.assert_array_equal(avg, [4.0, 5.0])


def test_variables_that_have_become_one() -> None:
    one, other = tf.Variable([1.0, 2.0]), tf.Variable([3.0, 4.0])
    avg = [np.zeros(2, np.float32), np.zeros(2, np.float32)]
    plan = fastema.Plan(avg, [one, other])
    plan.swap_()
    plan.swap_()
    plan.lerp_(1.0, [one, one])
    with pytest.raises(LayoutError, match=r"x 0 .* x 1 .* overlap"):
        plan.swap_()
    np.testing.assert_array_equal(avg, [[1.0, 2.0]] * 2)
    np.testing.assert_array_equal(one, [1.0, 2.0])
    plan.lerp_(1.0, [one, other])
    np.testing.assert_array_equal(avg[1], [3.0, 4.0])
    plan.swap_()
    with pytest.raises(LayoutError, match=r"avg 0 .* avg 1 .* overlap"):
        fastema.lerp_([one, one], [other, np.ones(2, np.float32)], 0.5)


def test_shared_tensors_come_apart() -> None:
    given_ = tf.constant([9.0, 9.0])
    avg = [tf.Variable(given_), tf.Variable(given_)]
    for one in avg:
        one.assign(given_)
    plan = fastema.Plan(avg, [np.float32([1.0, 2.0]), np.float32([3.0, 4.0])])
    for _ in range(4):
        for one in avg:
            one.assign(given_)
        plan.lerp_(1.0)
        np.testing.assert_array_equal(avg[0], [1.0, 2.0])
        np.testing.assert_array_equal(avg[1], [3.0, 4.0])
        np.testing.assert_array_equal(given_, [9.0, 9.0])


def test_inside_functions() -> None:
    avg, x = tf.Variable([1.0, 2.0]), tf.Variable([3.0, 4.0])
    plan = fastema.Plan([avg], [x])
    for call in (lambda: plan.lerp_(0.5), plan.swap_, plan.copy_,
                 lambda: fastema.lerp_([avg], [x], 0.5),
                 lambda: plan.lerp_(0.5, [x + 1.0])):  # fmt: skip
        with pytest.raises(BridgeError, match=r"inside tf\.function"):
            tf.function(call, autograph=False)()
    np.testing.assert_array_equal(avg, [1.0, 2.0])
    plan.lerp_(0.5)
    np.testing.assert_array_equal(avg, [2.0, 3.0])


@pytest.mark.parametrize("later", MAKE)
@pytest.mark.parametrize("first", ["variable", "tensor"])
def test_an_average_goes_on_with_weights_of_another_framework(first: str, later: str) -> None:
    ema = fastema.EMA(made(first, numbers(0)), 0.5)
    loops = {n: Loop(x, "f32", "f32") for n, x in numbers(0).items()}
    for seed in range(1, 5):
        ema.update(made(later if seed % 2 else first, numbers(seed)))
        for name, loop in loops.items():
            loop.step(numbers(seed)[name], 0.5)
    for name, loop in loops.items():
        loop.check(plain(ema.shadow[name]), name)
    for kind in WRITABLE:
        target = made(kind, numbers(9))
        ema.copy_to(target)
        assert bits(target) == bits({**ema.shadow})
