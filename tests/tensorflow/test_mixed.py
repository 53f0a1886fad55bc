"""TensorFlow beside the others: what may be written from what, and what stays as it was."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema.errors import LayoutError

from ..support.mixed import SHAPES, Arrays, bits, lerped, numbers, plain, to_torch

NEEDS = ("torch", "ml_dtypes")


pytestmark = pytest.mark.tensorflow

MAKE: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": np.array,
    "torch": to_torch,
    "jax": jnp.asarray,
    "variable": tf.Variable,
    "tensor": tf.constant,
}


def made(kind: str, arrays: Arrays) -> dict[str, Any]:
    return {name: MAKE[kind](one) for name, one in arrays.items()}


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
