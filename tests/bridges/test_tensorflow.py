"""The TensorFlow bridge: tensors read in place, and writes that no other variable sees."""

import numpy as np
import pytest
import tensorflow as tf

import fastema
from fastema.bridges import registry
from fastema.bridges import tensorflow as bridge
from fastema.errors import ArgumentError, BridgeError, DTypeError
from fastema.layout.dtypes import NAMES

from ..support.arrays import draw_bits

pytestmark = pytest.mark.tensorflow

SHAPES = [(), (1,), (3, 5), (2, 3, 4), (4, 0), (129,)]


def read_bytes(address: int, like: np.ndarray) -> bytes:
    """Return the bytes at an address, as many as ``like`` has."""
    interface = {"version": 3, "typestr": "|u1", "shape": (like.nbytes,), "data": (address, True)}
    return np.asarray(type("Holder", (), {"__array_interface__": interface})()).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_is_read_in_place_and_returned_as_a_copy(name: str) -> None:
    for i, shape in enumerate(SHAPES):
        values = draw_bits(shape, name, i)
        before = values.tobytes()
        for array, writable in ((tf.Variable(values), True), (tf.constant(values), False)):
            spec = bridge.describe(array)
            assert (spec.dtype, spec.shape, spec.device) == (NAMES[name], shape, "cpu")
            assert spec.writable is writable
            assert spec.owner is array
            if values.size:
                assert read_bytes(spec.address, values) == before
            assert array.numpy().tobytes() == before
        shown = bridge.to_framework(values)
        assert (type(shown), shown.dtype.name) == (type(tf.constant(1)), name)
        values[...] = draw_bits(shape, name, i + 1)
        assert shown.numpy().tobytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_writes_change_only_the_variable_itself(name: str) -> None:
    for i, shape in enumerate(SHAPES):
        old, new, newer = (draw_bits(shape, name, 10 * i + j) for j in range(3))
        given = tf.constant(old)
        one, other = tf.Variable(given), tf.Variable(given)
        one.assign(given)
        other.assign(given)
        held = [one.value(), one.read_value(), tf.identity(one), other, given]
        fastema.copy_([one], [new])
        assert one.numpy().tobytes() == one.value().numpy().tobytes() == new.tobytes()
        later = one.value()
        fastema.copy_([one], [newer])
        assert one.numpy().tobytes() == newer.tobytes()
        assert later.numpy().tobytes() == new.tobytes()
        assert all(tensor.numpy().tobytes() == old.tobytes() for tensor in held)


def test_immutable_tensors_are_averaged_once_per_call_that_passes_them() -> None:
    ema = fastema.EMA([tf.constant([1.0, 2.0])], 0.5)
    plan = fastema.Plan([np.zeros(2, np.float32)], [tf.constant([1.0, 2.0])])
    plan.lerp_(0.5)
    for call in (ema.update, lambda: plan.lerp_(0.5)):
        with pytest.raises(ArgumentError, match="never change"):
            call()
    tensor = [tf.constant([3.0, 4.0])]
    ema.update(tensor)
    ema.update(tensor)
    assert ema.num_updates == 2
    tensor[0] = tf.constant([4.5, 5.5])
    ema.update()
    np.testing.assert_array_equal(ema.shadow["0"], [3.5, 4.5])
    with_variable = fastema.EMA({"a": tf.Variable(3.0), "b": tf.constant(1.0)}, 0.5)
    with_variable.update()
    with_variable.update()


def test_unsupported_tensors_are_refused_by_name() -> None:
    for odd, name in (
        (tf.Variable(["a"]), "string"),
        (tf.cast([1.0], tf.as_dtype("float8_e4m3fn")), "float8"),
        (tf.sparse.from_dense([1.0, 0.0]), "SparseTensor"),
        (tf.ragged.constant([[1.0], []]), "RaggedTensor"),
        (tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0])), "IndexedSlices"),
    ):
        with pytest.raises((BridgeError, DTypeError), match=rf"^odd: .*{name}"):
            registry.leaves_of({"even": tf.ones(2), "odd": odd})


class Layers(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = tf.Variable([1.0, 2.0, 3.0])
        self.a = tf.Variable([4.0, 5.0, 6.0])
        self.inner = [tf.Module(), {"x": tf.Variable(7.0)}]
        self.inner[0].w = tf.Variable([[8.0]], trainable=False)
        self.step = tf.Variable(3, trainable=False)
        self.tensor = tf.ones(2)


def test_variables_of_a_module_are_named_by_their_paths() -> None:
    module = Layers()
    found = {leaf.name: leaf for leaf in registry.leaves_of(module).items}
    assert set(found) == {"a", "b", "inner.0.w", "inner.1.x", "step"}
    assert found["inner.0.w"].spec.owner is module.inner[0].w
    assert found["inner.1.x"].spec.owner is module.inner[1]["x"]
    assert {n for n, one in found.items() if one.role == "buffer"} == {"inner.0.w", "step"}
