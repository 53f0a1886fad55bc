"""optax's incremental_update, periodic_update and ema: the same numbers, trees and dtypes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastema.compat import optax as ours
from fastema.errors import ArgumentError

DTYPES = ("float32", "bfloat16", "float16")
BOUND = {"float64": 1e-14, "float32": 4e-7, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Bounds of one or two roundings, relative to the largest operand."""


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def tree(seed: int, dtype: str, numpy: bool = False) -> Any:
    draw = np.random.default_rng(seed)

    def leaf(*shape: int) -> Any:
        values = draw.normal(size=shape)
        return np.asarray(values, jnp.dtype(dtype)) if numpy else jnp.asarray(values, dtype)

    return {
        "dense": Layer(leaf(33, 7), leaf(7)),
        "left out": None,
        "list": [leaf(), leaf(0, 4), leaf(2, 3, 5).T],
    }


def as_float64(one: Any) -> np.ndarray:
    return np.asarray(one).astype(np.float64)


def assert_near(got: Any, want: Any, bound: float) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert isinstance(one, jax.Array) == isinstance(other, jax.Array)
        np.testing.assert_allclose(as_float64(one), as_float64(other), rtol=bound, atol=4 * bound)


@pytest.mark.parametrize("new_dtype", DTYPES)
@pytest.mark.parametrize("old_dtype", DTYPES)
@pytest.mark.parametrize("numpy", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_incremental_update_matches_optax(new_dtype: str, old_dtype: str, numpy: Any) -> None:
    if all(numpy) and {new_dtype, old_dtype} == {"bfloat16", "float16"}:
        new_dtype = old_dtype  # NumPy cannot promote these two
    new, old = tree(1, new_dtype, numpy[0]), tree(2, old_dtype, numpy[1])
    before = jax.tree.map(np.array, (new, old))
    for step_size in (0.01, 1, jnp.float32(0.3), np.float32(0.3)):
        got = ours.incremental_update(new, old, step_size)
        want = optax.incremental_update(new, old, step_size)
        assert_near(got, want, max(BOUND[new_dtype], BOUND[old_dtype]))
        for one, x, avg in zip(*map(jax.tree.leaves, (got, new, old)), strict=True):
            weight = float(step_size)
            exact = as_float64(avg) + weight * (as_float64(x) - as_float64(avg))
            rtol = BOUND[str(one.dtype)]
            np.testing.assert_allclose(as_float64(one), exact, rtol=rtol, atol=rtol)
    for one, other in zip(*map(jax.tree.leaves, ((new, old), before)), strict=True):
        assert np.array_equal(np.asarray(one), other)  # inputs unchanged


def test_unsupported_leaves_get_the_result_of_optax() -> None:
    new = {"i": jnp.arange(4), "b": jnp.ones((3, 2)), "n": 2.5, "w": jnp.array(2.0)}
    old = {"i": jnp.zeros(4, jnp.int32), "b": jnp.zeros(2), "n": 1.0, "w": jnp.asarray(1.5)}
    got, want = (one.incremental_update(new, old, 0.5) for one in (ours, optax))
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
        assert np.shape(got[name]) == np.shape(value)
    weak = jnp.asarray(2.0)
    assert weak.weak_type
    assert ours.incremental_update(weak, weak, 0.5).weak_type


def test_traced_update_matches_optax() -> None:
    new, old = tree(1, "float32"), tree(2, "float32")

    @jax.jit
    def inside(new: Any, old: Any, weight: Any) -> Any:
        constant = ours.incremental_update({"c": jnp.ones(3)}, {"c": jnp.zeros(3)}, 0.25)
        return ours.incremental_update(new, old, weight), constant

    found, constant = inside(new, old, 0.3)
    assert_near(found, optax.incremental_update(new, old, 0.3), 1e-6)
    np.testing.assert_array_equal(constant["c"], np.full(3, 0.25, np.float32))
    gradient = jax.grad(lambda x: ours.incremental_update(x, jnp.ones(3), 0.2).sum())(jnp.ones(3))
    np.testing.assert_allclose(gradient, 0.2, rtol=1e-6)
    with pytest.raises(ArgumentError, match="traced"):
        jax.jit(lambda x: ours.incremental_update(x, x, 0.2, step=3))(jnp.ones(3))


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("accumulator", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ema_matches_optax(debias: bool, accumulator: Any, dtype: str) -> None:
    mine, theirs = (one.ema(0.8, debias, accumulator) for one in (ours, optax))
    params = tree(0, dtype)
    state, their_state = mine.init(params), theirs.init(params)
    assert isinstance(state, optax.EmaState)
    narrow = "bfloat16" in (dtype, accumulator)
    for step in range(1, 8):
        updates = tree(step, dtype)
        got, state = mine.update(updates, state, params)
        want, their_state = theirs.update(updates, their_state, params)
        assert_near(got, want, 0.06 if narrow else 2e-6)
        assert_near(state.ema, their_state.ema, 0.06 if narrow else 2e-6)
        assert int(state.count) == step
        assert state.count.dtype == jnp.int32
        if not narrow:  # exchange the two states
            state, their_state = their_state, state
