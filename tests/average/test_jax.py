"""Averages of JAX pytrees: read in place, never written, never kept longer than a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastema
from fastema.errors import ArgumentError, BridgeError, LayoutError

from .frameworks import values
from .truth import Loop

NEEDS = ("ml_dtypes",)


DECAY = 0.9


def params(seed: int, dtype: str = "float32") -> dict[str, Any]:
    """Return a nested tree like those of flax, of nonzero normal numbers."""
    arrays = {name: jnp.asarray(array) for name, array in values(seed, dtype).items()}
    return {"params": {"Dense_0": {n: arrays[n] for n in "ab"}, "scale": arrays["c"]},
            "rest": (arrays["d"], [arrays["e"], None])}  # fmt: skip


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", None))) for k in path): np.asarray(leaf)
        for path, leaf in leaves
    }


def wide(tree: Any) -> dict[str, np.ndarray]:
    return {name: one.astype(np.float64) for name, one in flat(tree).items()}


def bits(tree: Any) -> dict[str, bytes]:
    return {name: one.tobytes() for name, one in flat(tree).items()}


STORED = [("float32", None), ("float32", "bfloat16"), ("float32", "bf16+16"), ("bfloat16", None),
          ("bfloat16", "float32"), ("bfloat16", "bf16+16"), ("float16", "float32")]  # fmt: skip


@pytest.mark.parametrize(("weights", "stored"), STORED)
def test_swapped_yields_a_new_tree_and_changes_no_other(weights: str, stored: str | None) -> None:
    tree = params(0, weights)
    ema = fastema.EMA(tree, 0.5, shadow_dtype=stored)
    for n in range(1, 4):
        tree = params(n, weights)
        ema.update(tree)
    raw, average = bits(tree), bits({**ema.shadow})
    with ema.swapped() as held:
        assert jax.tree.structure(held) == jax.tree.structure(tree)
        for (name, got), x in zip(flat(held).items(), wide(tree).values(), strict=True):
            assert got.dtype == weights
            shadow = np.asarray(ema.shadow[name]).astype(np.float64)
            coarse = "bf16" in str(stored) or "bfloat16" in (stored, weights)
            close = 2.0 ** (-7 if coarse else -10 if weights == "float16" else -23)
            np.testing.assert_allclose(got.astype(np.float64), shadow, rtol=close, atol=1e-6)
            assert not got.size or not np.array_equal(got.astype(np.float64), x)
        assert bits({**ema.shadow}) == average
        ema.update(held)  # the model still has its weights: training may go on
    assert bits(tree) == raw
    assert ema.num_updates == 4


def test_donated_arrays_are_refused() -> None:
    @jax.jit
    def fresh(n: Any) -> Any:
        return {"w": jnp.arange(70_000.0) + n, "v": jnp.ones(3) * n}

    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    tree = fresh(1.0)
    ema = fastema.EMA(tree, 0.5)
    truth = Loop(np.asarray(tree["w"]).copy(), "f32", "f32")
    for _ in range(5):
        given_last, tree = tree, step(tree)
        filled = [jnp.full(70_000, jnp.nan) for _ in range(5)]  # reuses freed memory
        with pytest.raises(BridgeError, match=r"donated.*update\(params\)"):
            ema.update()
        with pytest.raises(BridgeError, match="donated"):
            ema.update(given_last)
        ema.update(tree)
        truth.step(np.asarray(tree["w"]).copy(), 0.5)
        del filled
    truth.check(np.asarray(ema.shadow["w"]))
    assert ema.num_updates == 5
    tree["w"].delete()
    with pytest.raises(BridgeError, match="donated"):
        ema.update()
    truth.check(np.asarray(ema.shadow["w"]))  # needs no weights
    assert np.asarray(ema.averaged()["w"]).tobytes() == np.asarray(ema.shadow["w"]).tobytes()


KINDS: dict[str, Callable[[Any], Any]] = {
    "EMA": lambda tree: fastema.EMA(tree, DECAY),
    "delayed": lambda tree: fastema.EMA(tree, DECAY, start_after=2, update_every=3),
    "SWA": fastema.SWA,
    "SMA": lambda tree: fastema.SMA(tree, 3),
    "PowerEMA": fastema.PowerEMA,
}


@pytest.mark.parametrize("kind", KINDS)
def test_update_without_a_new_tree_is_refused_and_not_counted(kind: str) -> None:
    average = KINDS[kind](params(0))
    for n in range(1, 6):
        before = bits(average.averaged(**({"which": -1} if kind == "PowerEMA" else {})))
        with pytest.raises(ArgumentError, match=r"ema\.update\(params\)"):
            average.update()
        assert average.num_updates == n - 1
        now = average.averaged(**({"which": -1} if kind == "PowerEMA" else {}))
        assert bits(now) == before
        average.update(params(n))


class Network:
    """A model that holds its arrays in attributes, like models of NNX."""

    def __init__(self, seed: int) -> None:
        self.tree = params(seed)


def borrow_memory(ema: Any) -> Any:
    """Return a tree that borrows the average's memory; None if JAX copies it instead."""
    (name,) = ema.shadow
    memory = ema.state_dict(copy=False)[f"shadow.0.{name}"]
    borrowed = jax.device_put(memory)
    return [borrowed] if borrowed.unsafe_buffer_pointer() == memory.ctypes.data else None


def test_memory_of_the_average_is_refused_as_weights() -> None:
    kept = []
    for size in range(1000, 1200):
        ema = fastema.EMA([jnp.arange(1.0, size)], 0.5)
        borrowed = borrow_memory(ema)
        if borrowed is not None:
            break
        kept.append(ema)
    else:
        pytest.fail("no average lies where JAX borrows it")
    before = np.asarray(borrowed[0]).copy()
    for _ in range(2):
        with pytest.raises(LayoutError, match=r"average of 0 .* overlap"):
            ema.update(borrowed)
    assert ema.num_updates == 0
    with pytest.raises(ArgumentError):
        ema.update()  # the refused weights were not stored
    ema.update([jnp.arange(1.0, size) + 2])
    np.testing.assert_array_equal(ema.shadow["0"], before + 1)
    with pytest.raises(LayoutError, match="overlap"):
        fastema.Plan({"0": ema.state_dict(copy=False)["shadow.0.0"]}, {"0": borrowed[0]})


jax.tree_util.register_pytree_with_keys(
    Network,
    lambda one: ([(jax.tree_util.GetAttrKey("tree"), one.tree)], None),
    lambda _, children: vars(object.__new__(Network)).update(tree=children[0]),
)
