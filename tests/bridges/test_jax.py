"""The JAX bridge: addresses of arrays, unreadable arrays, and arrays that move."""

import re
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import layout

from fastema.bridges import jax as bridge
from fastema.bridges import registry
from fastema.bridges.moving import Locator
from fastema.errors import BridgeError
from fastema.layout.dtypes import NAMES
from fastema.layout.spec import TensorSpec

from ..support.arrays import draw_bits


@contextmanager
def all_widths() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def locator(container: Any) -> Locator:
    return Locator(registry.leaves_of(container), container)


def read(spec: TensorSpec, dtype: Any) -> np.ndarray:
    """Read the memory that a spec describes, by its address and strides alone."""
    size = np.dtype(dtype).itemsize
    strides = tuple(step * size for step in spec.strides)
    held = {"typestr": f"|V{size}", "shape": spec.shape, "strides": strides, "version": 3}
    held["data"] = spec.address, True
    return np.asarray(type("Holder", (), {"__array_interface__": held})()).copy()


def assert_read(array: Any) -> None:
    spec = bridge.describe(array)
    assert (spec.shape, spec.device) == (array.shape, "cpu")
    assert spec.dtype == NAMES[array.dtype.name]
    assert not spec.writable
    assert spec.owner is array
    if array.size:
        assert spec.address == array.unsafe_buffer_pointer()
        assert read(spec, array.dtype).tobytes() == np.asarray(array).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_is_read_in_place_and_returned_as_a_copy(name: str) -> None:
    narrowed = name in ("float64", "int64", "uint64", "complex128")  # by JAX without x64
    for i, shape in enumerate([(), (1,), (3, 5), (2, 3, 4), (0,), (4, 0), (129,), (4096,)]):
        values = draw_bits(shape, name, i)
        before = values.tobytes()
        narrow = bridge.to_framework(values)
        with all_widths():
            array, wide = jnp.asarray(values.copy()), bridge.to_framework(values)
            assert_read(array)
        values[...] = draw_bits(shape, name, i + 20)
        assert isinstance(narrow, np.ndarray if narrowed else jax.Array)
        assert isinstance(wide, jax.Array)
        for one in (array, narrow, wide):
            assert (one.dtype.name, np.asarray(one).tobytes()) == (name, before)


@pytest.mark.skipif(not hasattr(layout, "Format"), reason="JAX before 0.7 has other names")
@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (1, 2, 0)])
def test_arrays_with_another_order_of_axes_are_read_in_place(order: tuple[int, ...]) -> None:
    array = jnp.arange(24.0).reshape((4, 6) if len(order) == 2 else (2, 3, 4))
    form = layout.Format(layout.Layout(order), array.sharding)
    assert_read(jax.device_put(array, form))
    assert bridge.describe(jax.device_put(array, form)).strides != bridge.describe(array).strides


def test_deleted_and_donated_arrays_are_refused() -> None:
    deleted, donated = jnp.ones(5), jnp.ones(5)
    find = locator([jnp.ones(5)])
    deleted.delete()
    jax.jit(lambda x: x * 2, donate_argnums=0)(donated).block_until_ready()
    assert donated.is_deleted()
    for gone in (deleted, donated):
        assert find.locate([gone]) is None
        with pytest.raises(BridgeError, match=r"^w: .*donated.*update\(params\)"):
            registry.leaves_of({"w": gone})


TRACED: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    "jit": lambda f, x: jax.jit(f)(x),
    "grad": lambda f, x: jax.grad(lambda y: f(y).sum())(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "scan": lambda f, x: jax.lax.scan(lambda carry, y: (carry, f(y)), 0, x),
}


@pytest.mark.parametrize("transformation", TRACED)
def test_traced_arrays_have_no_memory(transformation: str) -> None:
    weights, seen = jnp.arange(1.0, 4.0), set()
    find = locator([weights])

    def function(x: Any) -> Any:
        with pytest.raises(BridgeError, match=r"jit, grad and vmap.*optax\.incremental_update"):
            bridge.describe(x)
        seen.add((find.locate([x]), find.locate([weights])))
        return x * 2.0

    TRACED[transformation](function, weights)
    assert seen == {(None, None)}
    assert_read(jnp.ones(3))  # concrete arrays still work afterwards


def test_arrays_on_several_devices_are_refused_by_name(python: Callable[..., str]) -> None:
    out = python(
        """
        import jax, jax.numpy as jnp, numpy as np, fastema
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

        mesh, whole = Mesh(np.array(jax.devices()), ("x",)), jnp.arange(8.0)
        parts, copies = (jax.device_put(whole, NamedSharding(mesh, P(*x))) for x in ("x", ""))
        ema = fastema.EMA({"w": whole}, 0.5)
        ema.update({"w": jax.device_put(whole + 2, jax.devices()[3])})
        for use, array in (fastema.EMA, parts), (fastema.EMA, copies), (ema.update, parts):
            try:
                use({"w": array})
            except fastema.errors.BridgeError as error:
                print(error)
        print(ema.num_updates, ema.shadow["w"].tolist())
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_PLATFORMS="cpu",
    )
    *refused, average = out.splitlines()
    assert len(refused) == 3
    assert all(re.match(r"w: a JAX array on (.*, ){3}.*: only arrays on", one) for one in refused)
    assert average == f"1 {(np.arange(8.0) + 1).tolist()}"


Point = namedtuple("Point", ["x", "y"])


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["kind"])
@dataclass
class Dense:
    kernel: Any
    bias: Any
    kind: str = "dense"


def test_leaves_are_named_by_their_path_in_the_tree() -> None:
    one = jnp.ones(2)
    tree = {
        "params": {"Dense_0": {"kernel": one, "bias": one}},
        "point": Point(one, [one, None]),
        "layer": Dense(one, (one,)),
        "empty": {},
    }
    names = "layer.kernel layer.bias.0 params.Dense_0.bias params.Dense_0.kernel point.x point.y.0"
    assert registry.leaves_of(tree).names == names.split()
    with pytest.raises(BridgeError, match=r"'a\.b'"):
        registry.leaves_of({"a.b": one, "a": {"b": one}})


def test_locating_waits_for_pending_computations() -> None:
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
