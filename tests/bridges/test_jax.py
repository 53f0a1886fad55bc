"""The JAX bridge: where arrays lie, what cannot be read, and arrays that move."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastema.bridges import jax as bridge
from fastema.bridges import registry
from fastema.bridges.moving import Locator
from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import NAMES
from fastema.layout.spec import TensorSpec

from ..support.arrays import random_bits
from ..support.jax_layouts import in_order

CPU = jax.devices("cpu")[0]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0), (129,)]


@contextmanager
def all_widths() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def read(spec: TensorSpec, dtype: Any) -> np.ndarray:
    """What lies where a description says, by its address and strides alone."""
    size = np.dtype(dtype).itemsize
    interface = {
        "version": 3,
        "typestr": f"|V{size}",
        "shape": spec.shape,
        "strides": tuple(step * size for step in spec.strides),
        "data": (spec.address, True),
    }
    holder = type("Holder", (), {"__array_interface__": interface})()
    return np.asarray(holder).copy()


def assert_read(array: Any) -> TensorSpec:
    spec = bridge.describe(array)
    assert spec.shape == array.shape
    assert not spec.writable
    assert spec.owner is array
    assert spec.device == "cpu"
    assert spec.dtype == NAMES[array.dtype.name]
    if array.size:
        assert spec.address == array.unsafe_buffer_pointer()
        assert read(spec, array.dtype).tobytes() == np.asarray(array).tobytes()
    return spec


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_is_read_where_it_lies(name: str) -> None:
    with all_widths():
        for i, shape in enumerate(SHAPES):
            values = random_bits(shape, name, i)
            array = jnp.asarray(values)
            assert array.dtype.name == name
            assert bridge.owns(array)
            assert_read(array)
            assert np.asarray(array).tobytes() == values.tobytes()


ORDERS = [order for rank in (2, 3, 4) for order in permutations(range(rank))]


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "key": (lambda: jax.random.key(0), DTypeError, r"key<.*no kernel"),
    "keys": (lambda: jax.random.split(jax.random.key(1), 3), DTypeError, "no kernel"),
    "float8": (lambda: jnp.ones(3, jnp.float8_e4m3fn), DTypeError, "float8_e4m3fn"),
    "int4": (lambda: jnp.ones(3, jnp.int4), DTypeError, "int4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dtypes_without_kernels(case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=rf"^tree\.odd: .*{message}"):
        registry.leaves_of({"tree": {"even": jnp.ones(2), "odd": make()}})


def test_deleted_and_donated_arrays() -> None:
    deleted = jnp.ones(3)
    deleted.delete()
    donated = jnp.ones(5)
    jax.jit(lambda x: x * 2, donate_argnums=0)(donated).block_until_ready()
    assert donated.is_deleted()
    for gone in (deleted, donated):
        with pytest.raises(BridgeError, match=r"^w: .*donated.*update\(params\)"):
            registry.leaves_of({"w": gone})


def describing(seen: list[Any], given: Any) -> Callable[..., Any]:
    def function(x: Any) -> Any:
        try:
            seen.append(bridge.describe(x if given is None else given))
        except BridgeError as error:
            seen.append(str(error))
        return x * 2.0

    return function


TRACED: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    "jit": lambda f, x: jax.jit(f)(x),
    "grad": lambda f, x: jax.grad(lambda y: f(y).sum())(x),
    "value_and_grad of jit": lambda f, x: jax.value_and_grad(jax.jit(lambda y: f(y).sum()))(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "eval_shape": lambda f, x: jax.eval_shape(f, x),
    "make_jaxpr": lambda f, x: jax.make_jaxpr(f)(x),
    "scan": lambda f, x: jax.lax.scan(lambda carry, y: (carry, f(y)), 0, x),
    "cond": lambda f, x: jax.lax.cond(x[0] > 0, f, lambda y: y, x),
    "while_loop": lambda f, x: jax.lax.while_loop(lambda y: y[0] < 10, f, x),
    "checkpoint": lambda f, x: jax.grad(lambda y: jax.checkpoint(f)(y).sum())(x),
    "linearize": lambda f, x: jax.linearize(f, x),
}


@pytest.mark.parametrize("transformation", TRACED)
def test_traced_arrays_have_no_memory(transformation: str) -> None:
    seen: list[Any] = []
    TRACED[transformation](describing(seen, None), jnp.arange(1.0, 4.0))
    assert seen
    for message in seen:
        assert isinstance(message, str)
        assert "jit, grad and vmap" in message
        assert "optax.incremental_update" in message
    assert_read(jnp.ones(3))  # and outside all is well again


def test_callbacks_from_compiled_code_are_outside() -> None:
    seen: list[Any] = []
    weights = jnp.arange(3.0)

    def look(x: np.ndarray) -> np.ndarray:
        seen.append(bridge.describe(weights))
        return np.asarray(x)

    @jax.jit
    def step(x: Any) -> Any:
        return jax.pure_callback(look, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    step(jnp.ones(2)).block_until_ready()
    assert [spec.shape for spec in seen] == [(3,)]


def test_several_devices_are_refused_by_name(python: Callable[..., str]) -> None:
    out = python(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        import fastema
        from fastema.bridges import jax as bridge

        devices = jax.devices()
        assert len(devices) == 4
        mesh = Mesh(np.array(devices), ("x",))
        whole = jnp.arange(8.0)
        for spec in (P("x"), P()):
            tree = {"fine": whole, "spread": jax.device_put(whole, NamedSharding(mesh, spec))}
            for use in (
                lambda: fastema.EMA(tree, 0.5),
                lambda: fastema.lerp_([np.ones(8), np.ones(8)], list(tree.values()), 0.5),
            ):
                try:
                    use()
                except fastema.errors.BridgeError as error:
                    print(error)
        ema = fastema.EMA({"w": whole}, 0.5)
        ema.update({"w": jax.device_put(whole + 2, devices[3])})
        print(ema.shadow["w"].tolist())
        try:
            ema.update({"w": jax.device_put(whole, NamedSharding(mesh, P("x")))})
        except fastema.errors.BridgeError as error:
            print(error)
        print(ema.num_updates, ema.shadow["w"].tolist())
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_PLATFORMS="cpu",
    )
    *refused, again = [line for line in out.splitlines() if ": a JAX array on " in line]
    assert len(refused) == 4
    for i, line in enumerate(refused):
        assert line.startswith("1: " if i % 2 else "spread: ")
        assert line.partition(": only")[0].count(",") == 3
        assert "only arrays on one CPU device" in line
    assert again.startswith("w: ")
    averages = [line for line in out.splitlines() if line not in (*refused, again)]
    assert averages[0] == str((np.arange(8.0) + 1).tolist())
    assert averages[1] == f"1 {averages[0]}"


# -- trees -----------------------------------------------------------------------------------------

Point = namedtuple("Point", ["x", "y"])


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["kind"])
@dataclass
class Dense:
    kernel: Any
    bias: Any
    kind: str = "dense"


@jax.tree_util.register_pytree_node_class
class Bare:
    """A node that says nothing of its keys."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def tree_flatten(self) -> tuple[Any, None]:
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _: None, parts: Any) -> Bare:
        return cls(*parts)


def tree(one: Callable[[int], Any]) -> Any:
    return {
        "params": {"Dense_0": {"kernel": one(0), "bias": one(1)}, "scale": one(2)},
        "point": Point(one(3), [one(4), None]),
        "layer": Dense(one(5), (one(6),)),
        "bare": Bare(one(7), one(8)),
        "none": None,
        "empty": {},
    }


def test_two_leaves_of_one_name() -> None:
    with pytest.raises(BridgeError, match=r"'a\.b'"):
        registry.leaves_of({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}})


# -- arrays that move ------------------------------------------------------------------------------


def locator(container: Any) -> Locator:
    return Locator(registry.leaves_of(container), container)


def arrays_of(seed: int) -> dict[str, Any]:
    return {
        "a": jnp.asarray(random_bits((70,), "float32", seed)),
        "b": {
            "c": jnp.asarray(random_bits((3, 4), "bfloat16", seed)),
            "d": jnp.zeros((0, 2)) + seed,
        },
    }


OTHERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda t: {**t, "a": t["a"][:-1]},
    "rank": lambda t: {**t, "a": t["a"].reshape(10, 7)},
    "dtype": lambda t: {**t, "a": t["a"].astype(jnp.float16)},
    "missing": lambda t: {"a": t["a"]},
    "more": lambda t: {**t, "z": t["a"]},
    "names": lambda t: {"A": t["a"], "b": t["b"]},
    "nesting": lambda t: {"a": t["a"], "b": list(t["b"].values())},
    "numpy": lambda t: {**t, "a": np.asarray(t["a"])},
    "number": lambda t: {**t, "a": 3.0},
    "None": lambda t: {**t, "a": None},
    "order of axes": lambda t: {
        **t,
        "b": {
            **t["b"],
            "c": in_order(t["b"]["c"], (1, 0)),
        },
    },
}


def test_nothing_is_found_while_a_function_is_traced() -> None:
    whole = arrays_of(0)
    find = locator(whole)
    found = []
    jax.jit(lambda t: found.append((find.locate(t), find.locate(whole))))(arrays_of(1))
    assert found == [(None, None)]


def test_results_that_are_still_being_computed_are_waited_for() -> None:
    @jax.jit
    def slow(x: Any) -> Any:
        return jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ y), x) + 3.0

    find = locator([jnp.ones((300, 300))])
    x = jnp.full((300, 300), 0.01)
    for _ in range(3):
        later = slow(x)
        found = find.locate([later])
        assert found is not None
        spec = TensorSpec(found.addresses["0"], (300, 300), (300, 1), "f32", "cpu")
        seen = read(spec, np.float32).view(np.float32)
        np.testing.assert_array_equal(seen, np.asarray(later))
        assert (seen > 2).all()


# -- what is shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if "64" not in n and "128" not in n])
def test_what_is_shown_is_a_copy(name: str) -> None:
    for shape in ((), (64,), (4096,), (3, 0)):
        memory = random_bits(shape, name)
        before = memory.tobytes()
        to_framework = bridge.to_framework(memory)
        assert isinstance(to_framework, jax.Array)
        assert to_framework.dtype.name == name
        memory[...] = random_bits(shape, name, 1)
        assert np.asarray(to_framework).tobytes() == before


@pytest.mark.parametrize("name", ["float64", "int64", "uint64", "complex128"])
def test_wide_dtypes_are_shown_as_they_are(name: str) -> None:
    memory = random_bits((33,), name)
    before = memory.tobytes()
    to_framework = bridge.to_framework(memory)
    assert type(to_framework) is np.ndarray
    with all_widths():
        wide = bridge.to_framework(memory)
    assert isinstance(wide, jax.Array)
    memory[...] = 7
    assert to_framework.tobytes() == np.asarray(wide).tobytes() == before
