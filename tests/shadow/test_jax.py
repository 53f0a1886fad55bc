"""Averages of JAX pytrees: read where they lie, never written, never kept longer than a step."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema.errors import (
    ArgumentError,
    BridgeError,
    CheckpointError,
    LayoutError,
    NonFiniteError,
    StateError,
)

from ..support.jax_layouts import in_order
from ..support.peak import forget_peak, peak
from .frameworks import DTYPES, patterns, using, values
from .truth import Loop, Loops

NEEDS = ("ml_dtypes",)


DECAY = 0.9


@pytest.fixture
def all_widths() -> Iterator[None]:
    with using("jax"):
        yield


def params(seed: int, dtype: str = "float32") -> dict[str, Any]:
    """A nested tree of normal numbers, with what flax has: no zero among them."""
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


@pytest.mark.usefixtures("all_widths")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_that_are_handed_over_are_the_same(dtype: str, tmp_path: Path) -> None:
    values = patterns(dtype, 1)
    ema = fastema.EMA({"w": jnp.asarray(patterns(dtype, 0))}, DECAY, start_after=5)
    ema.update({"w": jnp.asarray(values)})
    assert bits({"w": ema.shadow["w"]})["w"] == values.tobytes()
    with ema.swapped() as held:
        assert np.asarray(held["w"]).tobytes() == values.tobytes()
        assert held["w"].dtype == dtype
    assert np.asarray(ema.averaged()["w"]).tobytes() == values.tobytes()
    state = ema.state_dict()
    assert type(state["shadow"][0]["w"]) is np.ndarray
    assert state["shadow"][0]["w"].tobytes() == values.tobytes()
    other = fastema.EMA({"w": jnp.asarray(patterns(dtype, 2))}, DECAY, start_after=5)
    state["num_updates"] = 7  # past the start: the average is its own
    other.load_state_dict(state)
    assert np.asarray(other.shadow["w"]).tobytes() == values.tobytes()
    assert np.asarray(other.averaged()["w"]).tobytes() == values.tobytes()
    target = {"w": np.empty(len(values), values.dtype)}
    other.copy_to(target)
    assert target["w"].tobytes() == values.tobytes()


STORED = [("float32", None), ("float32", "bfloat16"), ("float32", "bf16+16"), ("bfloat16", None),
          ("bfloat16", "float32"), ("bfloat16", "bf16+16"), ("float16", "float32")]  # fmt: skip


@pytest.mark.parametrize(("weights", "stored"), STORED)
def test_a_new_tree_holds_the_average_and_nothing_else_changes(
    weights: str, stored: str | None
) -> None:
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
        ema.update(held)  # it is not in the model: training may go on
    assert bits(tree) == raw
    assert ema.num_updates == 4


def test_what_cannot_be_written_is_not() -> None:
    ema = fastema.EMA(params(0), 0.5)
    tree = params(1)
    ema.update(tree)
    before = bits(tree)
    with pytest.raises(LayoutError, match=r"swapped\(\) as weights(.|\n)*'params\.Dense_0\.a'"):
        ema.apply_shadow()
    with pytest.raises(LayoutError, match="read-only"):
        ema.copy_to(tree)
    assert not ema.applied
    assert bits(tree) == before
    with pytest.raises(StateError):
        ema.restore()


def test_an_array_that_is_there_twice_is_averaged_twice() -> None:
    one = jnp.arange(1.0, 5.0)
    ema = fastema.EMA({"a": one, "b": one, "c": [one]}, 0.5)
    ema.update({"a": one * 3, "b": one * 5, "c": [one * 7]})
    for name, factor in {"a": 2, "b": 3, "c.0": 4}.items():
        np.testing.assert_array_equal(ema.shadow[name], factor * np.arange(1.0, 5.0))
    again = one * 9
    ema.update({"a": again, "b": again, "c": [again]})
    for name, factor in {"a": 5.5, "b": 6, "c.0": 6.5}.items():
        np.testing.assert_array_equal(ema.shadow[name], factor * np.arange(1.0, 5.0))


def test_layouts_may_change_from_step_to_step() -> None:
    values = np.random.default_rng(0).normal(size=(6, 4, 9, 5)).astype(np.float32)
    ema = fastema.EMA([in_order(values[0], (2, 0, 1))], 0.5)
    truth = Loop(values[0], "f32", "f32")
    for n, order in enumerate([(0, 1, 2), (0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)], 1):
        ema.update([in_order(values[n], order)])
        truth.step(values[n], 0.5)
        truth.check(np.asarray(ema.shadow["0"]), str(order))
    np.testing.assert_array_equal(ema.averaged()[0], ema.shadow["0"])


@given(st.lists(st.integers(0, 6), max_size=3), st.integers(0, 2**32), st.floats(0, 0.99))
def test_any_shape(shape: list[int], seed: int, decay: float) -> None:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(3, *shape)).astype(np.float32)
    ema = fastema.EMA([jnp.asarray(values[0])], decay)
    truth = Loop(values[0], "f32", "f32")
    for x in values[1:]:
        ema.update([jnp.asarray(x)])
        truth.step(x, 1 - decay)
    truth.check(np.asarray(ema.shadow["0"]))


# -- what is refused -------------------------------------------------------------------------------


def alias_of(ema: Any) -> Any:
    """A tree that borrows the average's memory; None where it does not lie as JAX wants it."""
    (name,) = ema.shadow
    memory = ema.state_dict(copy=False)["shadow"][0][name]
    borrowed = jax.device_put(memory)
    return [borrowed] if borrowed.unsafe_buffer_pointer() == memory.ctypes.data else None


def test_the_averages_own_memory_is_refused() -> None:
    kept = []
    for size in range(1000, 1200):
        ema = fastema.EMA([jnp.arange(1.0, size)], 0.5)
        borrowed = alias_of(ema)
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
        ema.update()  # the weights given last are still those of before
    ema.update([jnp.arange(1.0, size) + 2])
    np.testing.assert_array_equal(ema.shadow["0"], before + 1)
    with pytest.raises(LayoutError, match="overlap"):
        fastema.Plan(ema.state_dict(copy=False)["shadow"][0], {"0": borrowed[0]})


BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tracer": lambda t: jax.eval_shape(lambda: t),
    "text": lambda t: {**t, "params": {**t["params"], "scale": "text"}},
    "int": lambda t: {**t, "params": {**t["params"], "scale": 3}},
    "float8": lambda t: {
        **t, "params": {**t["params"], "scale": jnp.ones((), jnp.float8_e4m3fn)}
    },
    "key": lambda t: {**t, "params": {**t["params"], "scale": jax.random.key(0)}},
    "shape": lambda t: {**t, "params": {**t["params"], "scale": jnp.ones(2)}},
    "complex": lambda t: {**t, "params": {**t["params"], "scale": jnp.ones((), "complex64")}},
    "integer": lambda t: {**t, "params": {**t["params"], "scale": jnp.ones((), "int32")}},
    "missing": lambda t: {**t, "params": {"Dense_0": t["params"]["Dense_0"]}},
    "more": lambda t: {**t, "params": {**t["params"], "more": jnp.ones(2)}},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_tree_that_is_refused_changes_nothing(case: str) -> None:
    ema = fastema.EMA(params(0), 0.5)
    ema.update(params(1))
    before = {n: np.asarray(x).tobytes() for n, x in ema.shadow.items()}
    with pytest.raises(fastema.errors.FastemaError):
        ema.update(BAD[case](params(2)))
    assert ema.num_updates == 1
    assert {n: np.asarray(x).tobytes() for n, x in ema.shadow.items()} == before
    twin = fastema.EMA(params(0), 0.5)
    for n in (1, 3):
        twin.update(params(n))
    ema.update(params(3))
    assert bits({**ema.shadow}) == bits({**twin.shadow})


TRACED: dict[str, Callable[[Callable[[Any], Any], Any], Any]] = {
    "jit": lambda f, x: jax.jit(f)(x),
    "grad": lambda f, x: jax.grad(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), x)),
    "scan": lambda f, x: jax.lax.scan(lambda carry, _: (carry, f(carry)), x, None, length=2),
}


@pytest.mark.parametrize(
    ("transformation", "given_"),
    [(name, "traced") for name in TRACED]
    + [(name, given_) for name in ("jit", "scan") for given_ in ("whole", "nothing")],
)
def test_inside_traced_functions(transformation: str, given_: str) -> None:
    tree = {"w": jnp.arange(1.0, 5.0)}
    ema = fastema.EMA(tree, 0.5)

    def step(x: Any) -> Any:
        ema.update(*{"traced": [x], "whole": [tree], "nothing": []}[given_])
        return x["w"].sum()

    with pytest.raises(BridgeError, match="jit, grad and vmap"):
        TRACED[transformation](step, tree)
    assert ema.num_updates == 0
    ema.update({"w": jnp.arange(1.0, 5.0) + 2})
    np.testing.assert_array_equal(ema.shadow["w"], np.arange(1.0, 5.0) + 1)


# -- lifetimes -------------------------------------------------------------------------------------


def test_arrays_that_were_donated_are_not_read() -> None:
    @jax.jit
    def fresh(n: Any) -> Any:
        return {"w": jnp.arange(70_000.0) + n, "v": jnp.ones(3) * n}

    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    tree = fresh(1.0)
    ema = fastema.EMA(tree, 0.5)
    truth = Loop(np.asarray(tree["w"]).copy(), "f32", "f32")
    for _ in range(5):
        given_last, tree = tree, step(tree)
        filled = [jnp.full(70_000, jnp.nan) for _ in range(5)]  # what was freed is used again
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
    truth.check(np.asarray(ema.shadow["w"]))  # which needs no weights
    assert np.asarray(ema.averaged()["w"]).tobytes() == np.asarray(ema.shadow["w"]).tobytes()


# -- arrays that were used already ----------------------------------------------------------------

KINDS: dict[str, Callable[[Any], Any]] = {
    "EMA": lambda tree: fastema.EMA(tree, DECAY),
    "delayed": lambda tree: fastema.EMA(tree, DECAY, start_after=2, update_every=3),
    "SWA": fastema.SWA,
    "SMA": lambda tree: fastema.SMA(tree, 3),
    "PowerEMA": fastema.PowerEMA,
}


@pytest.mark.parametrize("kind", KINDS)
def test_update_without_the_new_tree_is_refused_and_counts_nothing(kind: str) -> None:
    average = KINDS[kind](params(0))
    for n in range(1, 6):
        before = bits(average.averaged(**({"which": -1} if kind == "PowerEMA" else {})))
        with pytest.raises(ArgumentError, match=r"ema\.update\(params\)"):
            average.update()
        assert average.num_updates == n - 1
        now = average.averaged(**({"which": -1} if kind == "PowerEMA" else {}))
        assert bits(now) == before
        average.update(params(n))


def test_a_tree_that_is_given_again_is_averaged_again() -> None:
    ema, tree = fastema.EMA(params(0), DECAY), params(1)
    loops = Loops(wide(params(0)), "f32", "f32")
    for _ in range(4):
        ema.update(tree)
        loops.step(wide(tree), 1 - DECAY)
    loops.check(ema.shadow)


class Network:
    """A model that holds its arrays in attributes, as those of NNX do."""

    def __init__(self, seed: int) -> None:
        self.tree = params(seed)


jax.tree_util.register_pytree_with_keys(
    Network,
    lambda one: ([(jax.tree_util.GetAttrKey("tree"), one.tree)], None),
    lambda _, children: vars(object.__new__(Network)).update(tree=children[0]),
)


@pytest.mark.parametrize("kind", ["dict", "one entry", "model", "list"])
def test_a_container_that_is_given_new_arrays_in_place_is_followed(kind: str) -> None:
    holder = {"dict": params(0), "one entry": params(0), "model": Network(0), "list": [params(0)]}
    container: Any = holder[kind]
    ema, twin = fastema.EMA(container, DECAY), fastema.EMA(params(0), DECAY)
    for n in range(1, 6):
        new = params(n)
        if kind == "one entry":
            new = {**params(0), "rest": new["rest"]}
        if kind == "model":
            container.tree = new
        elif kind == "list":
            container[0] = new
        else:
            container.update(new)
        ema.update()
        twin.update(new)
        with pytest.raises(ArgumentError):
            ema.update()
    assert ema.num_updates == 5
    got = {name.removeprefix("tree.").removeprefix("0."): x for name, x in ema.shadow.items()}
    assert bits(got) == bits(dict(twin.shadow))


def test_arrays_of_jax_beside_others_may_be_the_same_again() -> None:
    bias = np.arange(1.0, 5.0)
    ema = fastema.EMA({"w": jnp.ones(3), "b": bias}, 0.5)
    bias += 2.0
    ema.update()
    np.testing.assert_array_equal(ema.shadow["b"], np.arange(2.0, 6.0))


def test_a_tree_that_was_refused_is_not_used_up() -> None:
    ema = fastema.EMA(params(0), DECAY, on_nonfinite="raise")
    tree = params(1)
    tree["rest"][1][0] = tree["rest"][1][0].at[0].set(jnp.nan)
    with pytest.raises(NonFiniteError):
        ema.update(tree)
    with pytest.raises(NonFiniteError):
        ema.update()
    assert ema.num_updates == 0


def test_a_plan_uses_arrays_that_never_change_once() -> None:
    avg, x = np.ones(4), {"w": jnp.arange(4.0)}
    plan = fastema.Plan({"w": avg}, x)
    plan.lerp_(0.5)
    for call in (lambda: plan.lerp_(0.5), plan.copy_):
        with pytest.raises(ArgumentError, match=r"plan\.(lerp|copy)_\(x="):
            call()
    np.testing.assert_array_equal(avg, np.arange(4) / 2 + 0.5)
    assert plan.calls == 1
    plan.lerp_(0.5, x)  # asked for
    x["w"] = jnp.arange(4.0) + 8
    plan.lerp_(0.5)
    want = (np.arange(4) + 8 + (np.arange(4) + (np.arange(4) / 2 + 0.5)) / 2) / 2
    np.testing.assert_array_equal(avg, want)


def alive(size: int) -> int:
    gc.collect()
    # By their memory: older JAX has several objects of one array.
    return len({one.unsafe_buffer_pointer() for one in jax.live_arrays() if one.size == size})


def test_only_the_tree_that_came_last_is_kept() -> None:
    size = 12_347
    ema = fastema.EMA({"w": jnp.arange(float(size))}, DECAY)
    assert alive(size) == 1
    watched = []
    for n in range(3):
        tree = {"w": jnp.arange(float(size)) + n}
        watched.append(weakref.ref(tree["w"]))
        ema.update(tree)
        del tree
        assert alive(size) == 1
        assert [one() is None for one in watched] == [True] * n + [False]
    with ema.swapped() as held:
        assert alive(size) == 2
    del held
    assert alive(size) == 1
    del ema
    assert alive(size) == 0


def test_a_plan_keeps_no_tree_but_the_last() -> None:
    size = 12_348
    avg = [np.ones(size, np.float32)]
    plan = fastema.Plan(avg, [jnp.arange(float(size))])
    for n in range(2):
        plan.lerp_(0.5, [jnp.arange(float(size)) + n])
        assert alive(size) == 1
    del plan
    assert alive(size) == 0


def test_updates_keep_no_memory() -> None:
    trees = [{f"w{i}": jnp.arange(50.0) + n for i in range(20)} for n in range(4)]
    ema = fastema.EMA(trees[0], DECAY)
    for n in range(50):
        ema.update(trees[n % 4])
    tracemalloc.start()
    try:
        held = []
        for _ in range(4):
            for n in range(250):
                ema.update(trees[n % 4])
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert min(np.diff(held)) < 2500


def test_weights_are_not_copied() -> None:
    big = 8_000_000  # 32 MB each: a copy of either side would show
    tree = {"w": jnp.ones(big), "v": jnp.ones(big)}
    ema = fastema.EMA(tree, DECAY)
    later = {"w": jnp.full(big, 3.0), "v": jnp.full(big, 2.0)}
    jax.block_until_ready(later)
    ema.update(later)
    before = forget_peak()
    for _ in range(3):
        ema.update(later)
    rise = peak() - before
    now = np.asarray(ema.state_dict(copy=False)["shadow"][0]["w"][::99_991])
    np.testing.assert_allclose(now, 3 - 2 * DECAY**4, rtol=1e-6)
    assert rise < 10e6


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_state_may_hold_arrays_of_jax() -> None:
    ema = fastema.EMA(params(0), 0.5)
    ema.update(params(1))
    state = ema.state_dict()
    state["shadow"] = [{n: jnp.asarray(x) for n, x in state["shadow"][0].items()}]
    other = fastema.EMA(params(2), 0.5)
    other.load_state_dict(state)
    assert bits({**other.shadow}) == bits({**ema.shadow})
    state["shadow"][0]["params.scale"].delete()
    before = bits({**other.shadow})
    with pytest.raises(CheckpointError, match=r"'params\.scale'.*donated"):
        other.load_state_dict(state)
    assert bits({**other.shadow}) == before


def test_a_copy_is_a_copy_and_the_other_is_not() -> None:
    ema = fastema.EMA({"w": jnp.arange(64.0)}, 0.5)
    own, copy = ema.state_dict(copy=False), ema.state_dict()
    ema.update({"w": jnp.arange(64.0) + 2})
    np.testing.assert_array_equal(own["shadow"][0]["w"], np.arange(64.0) + 1)
    np.testing.assert_array_equal(copy["shadow"][0]["w"], np.arange(64.0))


def test_drift_and_report() -> None:
    ema = fastema.EMA({"w": jnp.zeros(100) + 1}, 0.5, drift=True)
    ema.update({"w": jnp.zeros(100) + 3})
    assert ema.drift.distance == pytest.approx(10.0)
    assert ema.drift.still == 0.0
    assert "100 weights" in repr(ema)


def test_a_given_average_is_not_that_of_later() -> None:
    """JAX copies NumPy memory when it comes to it, unless it is given memory of its own."""
    weights = [jnp.full((2048, 2048), 2.0), jnp.arange(3.0)]
    ema = fastema.EMA(weights, 0.5)
    for n in range(5):
        before = [np.asarray(one).copy() for one in ema.state_dict()["shadow"][0].values()]
        given, shown = ema.averaged(), ema.shadow["0"]
        ema.update([one + n for one in weights])
        for one, expected in zip([*given, shown], [*before, before[0]], strict=True):
            np.testing.assert_array_equal(np.asarray(one), expected)
        assert not np.array_equal(np.asarray(ema.shadow["0"]), before[0]) or n == 0
