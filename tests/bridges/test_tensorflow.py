"""The TensorFlow bridge: tensors and variables where they lie, and writes that nobody else sees."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema.bridges import registry
from fastema.bridges import tensorflow as bridge
from fastema.bridges.moving import Locator
from fastema.errors import ArgumentError, BridgeError, DTypeError, LayoutError
from fastema.layout.dtypes import NAMES

from ..support.arrays import random_bits

pytestmark = pytest.mark.tensorflow

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0), (129,)]


def at(address: int, like: np.ndarray) -> bytes:
    """What lies at an address."""
    interface = {"version": 3, "typestr": "|u1", "shape": (like.nbytes,), "data": (address, True)}
    return np.asarray(type("Holder", (), {"__array_interface__": interface})()).tobytes()


def put(variable: Any, values: np.ndarray) -> None:
    """Write into a variable's own memory, through the kernels."""
    fastema.copy_([variable], [values])


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_is_read_where_it_lies(name: str) -> None:
    for i, shape in enumerate(SHAPES):
        values = random_bits(shape, name, i)
        variable, tensor = tf.Variable(values), tf.constant(values)
        for array, writable in ((variable, True), (tensor, False)):
            assert bridge.owns(array)
            spec = bridge.describe(array)
            assert (spec.dtype, spec.shape, spec.device) == (NAMES[name], shape, "cpu")
            assert spec.writable is writable
            assert spec.owner is array
            assert spec.dense or not values.size
            if values.size:
                assert at(spec.address, values) == values.tobytes()
            assert array.numpy().tobytes() == values.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_writes_are_seen_by_the_variable_alone(name: str) -> None:
    for i, shape in enumerate(SHAPES):
        old, new, newer = (random_bits(shape, name, 10 * i + j) for j in range(3))
        given_ = tf.constant(old)
        one, other = tf.Variable(given_), tf.Variable(given_)
        one.assign(given_)
        other.assign(given_)
        held = [one.value(), one.read_value(), tf.identity(one), one + 0 if name != "bool" else one]
        was = [tensor.numpy().tobytes() for tensor in held[:3]]
        put(one, new)
        assert one.numpy().tobytes() == new.tobytes()
        assert one.value().numpy().tobytes() == new.tobytes()
        later = one.value()
        put(one, newer)
        assert one.numpy().tobytes() == newer.tobytes()
        assert later.numpy().tobytes() == new.tobytes()
        assert [tensor.numpy().tobytes() for tensor in held[:3]] == was
        assert other.numpy().tobytes() == given_.numpy().tobytes() == old.tobytes()


def test_the_protocol_holds_in_this_version() -> None:
    assert bridge._can_be_written.__wrapped__()


def test_without_the_protocol_variables_are_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "_can_be_written", lambda: False)
    given_ = tf.constant([1.0, 2.0])
    variables = [tf.Variable(given_), tf.Variable(given_)]
    for one in variables:
        one.assign(given_)
    ema = fastema.EMA(variables, 0.5)
    assert len(ema.shadow) == 2
    variables[0].assign([3.0, 4.0])
    ema.update()
    np.testing.assert_array_equal(ema.shadow["0"], [2.0, 3.0])
    np.testing.assert_array_equal(ema.shadow["1"], [1.0, 2.0])
    with pytest.raises(LayoutError):
        ema.apply_shadow()
    with pytest.raises(LayoutError, match="read-only"):
        fastema.Plan(variables, [np.ones(2, np.float32)] * 2)


def test_tensors_which_never_change_are_averaged_once_unless_given_again() -> None:
    ema, plan = (kind([tf.constant([1.0, 2.0])]) for kind in (
        lambda x: fastema.EMA(x, 0.5), lambda x: fastema.Plan([np.zeros(2, np.float32)], x)
    ))  # fmt: skip
    plan.lerp_(0.5)
    for call in (ema.update, lambda: plan.lerp_(0.5)):
        with pytest.raises(ArgumentError, match="never change"):
            call()
    tensor = [tf.constant([3.0, 4.0])]
    ema.update(tensor)
    ema.update(tensor)
    assert ema.num_updates == 2
    np.testing.assert_array_equal(ema.shadow["0"], [2.5, 3.5])
    tensor[0] = tf.constant([4.5, 5.5])
    ema.update()
    np.testing.assert_array_equal(ema.shadow["0"], [3.5, 4.5])


def test_variables_may_be_averaged_as_they_are_again() -> None:
    for container in ([tf.Variable([3.0])], {"a": tf.Variable(3.0), "b": tf.constant(1.0)}):
        ema = fastema.EMA(container, 0.5)
        ema.update()
        ema.update()
        assert ema.num_updates == 2


def test_variables_that_share_a_tensor_are_two() -> None:
    for shape in (None, tf.TensorShape([None, None]), tf.TensorShape(None)):
        given_ = tf.constant(random_bits((6, 7), "int32"))
        one, other = (tf.Variable(given_, shape=shape) for _ in range(2))
        one.assign(given_)
        other.assign(given_)
        here, there = bridge.describe(one), bridge.describe(other)
        assert len({here.address, there.address, bridge.describe(given_).address}) == 3


@pytest.mark.parametrize("shape", [[None], [None, 5], [4, None], [None, None], None], ids=str)
def test_variables_of_unknown_shape(shape: Any) -> None:
    values = np.arange(1.0, 21.0, dtype=np.float32)
    values = values if shape == [None] else values.reshape(4, 5)
    variable = tf.Variable(values, shape=tf.TensorShape(shape))
    ema = fastema.EMA([variable], 0.5)
    for n in range(1, 6):
        variable.assign(values * (n + 1))
        ema.update()
    raw, held = variable.numpy(), variable.value()
    for _ in range(4):
        with ema.swapped():
            np.testing.assert_array_equal(variable.numpy(), ema.shadow["0"].numpy())
            assert not np.array_equal(variable.numpy(), raw)
        np.testing.assert_array_equal(variable.numpy(), raw)
        np.testing.assert_array_equal(held.numpy(), raw)
    variable.assign(np.ones((9,) + (5,) * (values.ndim - 1), np.float32)
                    if shape != [4, None] else np.ones((4, 9), np.float32))  # fmt: skip
    with pytest.raises(LayoutError, match=r"is now \["):
        ema.update()
    assert ema.num_updates == 5


def test_other_variables_that_were_refused_are_forgotten() -> None:
    free, fixed = tf.Variable([1.0, 2.0, 3.0], shape=[None]), tf.Variable([4.0])
    ema = fastema.EMA([free], 0.5)
    for _ in range(4):
        ema.update()
    with pytest.raises(LayoutError, match=r"'0' is now \[1\], was \[3\]"):
        ema.update([fixed])
    free.assign([1.0])  # less than was there: whoever reads as much as before reads beyond it
    with pytest.raises(LayoutError, match=r"'0' is now \[1\], was \[3\]"):
        ema.update()
    free.assign([3.0, 4.0, 5.0])
    ema.update()
    np.testing.assert_array_equal(ema.shadow["0"], [2.0, 3.0, 4.0])


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "string": (lambda: tf.constant(["a"]), DTypeError, "string"),
    "string variable": (lambda: tf.Variable(["a"]), DTypeError, "string"),
    "float8": (lambda: tf.cast([1.0], tf.as_dtype("float8_e4m3fn")), DTypeError, "float8"),
    "int4": (lambda: tf.cast([1], tf.as_dtype("int4")), DTypeError, "int4"),
    "quantised": (lambda: tf.cast([1], tf.qint8), DTypeError, "qint8"),
    "sparse": (lambda: tf.sparse.from_dense([1.0, 0.0]), BridgeError, "SparseTensor"),
    "ragged": (lambda: tf.ragged.constant([[1.0], []]), BridgeError, "RaggedTensor"),
    "slices": (
        lambda: tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0])), BridgeError, "IndexedSlices"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named(case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=rf"^odd: .*{message}"):
        registry.leaves_of({"even": tf.ones(2), "odd": make()})


def test_codes() -> None:
    for name, code in NAMES.items():
        assert bridge.code(tf.as_dtype(name)) == code
        assert registry.dtype_code(tf.as_dtype(name)) == code
    for odd in (np.dtype("f4"), "float32", None, tf.string):
        with pytest.raises(DTypeError):
            bridge.code(odd)


def inside_a_function(work: Callable[[], Any]) -> list[Any]:
    seen: list[Any] = []

    @tf.function
    def function(x: Any) -> Any:
        try:
            seen.append(work() if work.__code__.co_argcount == 0 else work(x))
        except BridgeError as error:
            seen.append(str(error))
        return x * 2

    function(tf.ones(3))
    return seen


def test_functions_are_traced_once() -> None:
    variable, whole = tf.Variable([1.0, 2.0]), tf.constant([1.0])
    for work in (lambda: bridge.describe(variable), lambda: bridge.describe(whole),
                 lambda x: bridge.describe(x)):  # fmt: skip
        for message in inside_a_function(work):
            assert isinstance(message, str)
            assert "inside tf.function this would run once" in message
    find = Locator(registry.leaves_of([variable]), [variable])
    assert inside_a_function(lambda: find.locate([variable])) == [None]
    assert find.locate([variable]) is not None


def test_data_pipelines_are_traced_too() -> None:
    variable = tf.Variable([1.0, 2.0])
    ema = fastema.EMA([variable], 0.5)

    def look(x: Any) -> Any:
        ema.update()
        return x

    # AutoGraph makes an error of its own of what user code raises.
    with pytest.raises(Exception, match=r"BridgeError: 0: inside tf\.function this would run once"):
        tf.data.Dataset.range(3).map(look)
    assert ema.num_updates == 0


def test_graphs_of_version_one() -> None:
    with tf.Graph().as_default():
        symbolic = tf.constant([1.0])
        with pytest.raises(BridgeError, match=r"tf\.function"):
            bridge.describe(symbolic)


# -- modules ---------------------------------------------------------------------------------------


class Layers(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = tf.Variable([1.0, 2.0, 3.0])
        self.a = tf.Variable([4.0, 5.0, 6.0])
        self.inner = [tf.Module(), {"x": tf.Variable(7.0)}]
        self.inner[0].w = tf.Variable([[8.0]], trainable=False)
        self.step = tf.Variable(3, trainable=False)
        self.tensor = tf.ones(2)


def test_variables_of_a_module_by_their_paths() -> None:
    module = Layers()
    leaves = registry.leaves_of(module)
    owners = {leaf.name: leaf.spec.owner for leaf in leaves.items}
    assert set(owners) == {"a", "b", "inner.0.w", "inner.1.x", "step"}
    assert owners["a"] is module.a
    assert owners["inner.0.w"] is module.inner[0].w
    assert owners["inner.1.x"] is module.inner[1]["x"]
    roles = {leaf.name: leaf.role for leaf in leaves.items}
    assert {name for name, role in roles.items() if role == "buffer"} == {"inner.0.w", "step"}


CHANGES: dict[str, Callable[[Any], None]] = {
    "new": lambda m: setattr(m, "c", tf.Variable([9.0, 9.0, 9.0])),
    "gone": lambda m: delattr(m, "a"),
    "renamed": lambda m: (setattr(m, "z", m.a), delattr(m, "a"))[0],
    "another in its place": lambda m: (setattr(m, "z", tf.Variable(m.b)), delattr(m, "a"))[0],
    "reshaped": lambda m: setattr(m, "a", tf.Variable([1.0, 2.0])),
    "dtype": lambda m: setattr(m, "a", tf.Variable([1, 2, 3])),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("updates", [0, 4])
def test_modules_that_are_built_in_another_way(case: str, updates: int) -> None:
    module = Layers()
    ema = fastema.EMA(module, 0.5)
    for _ in range(updates):
        ema.update()
    CHANGES[case](module)
    for call in (ema.update, ema.apply_shadow):
        with pytest.raises((LayoutError, DTypeError)):
            call()
    assert ema.num_updates == updates
    np.testing.assert_array_equal(ema.shadow["a"], [4.0, 5.0, 6.0])


def test_what_is_no_module() -> None:
    module = Layers()
    ema = fastema.EMA(module, 0.5)
    for _ in range(4):
        for odd in ([module.a, module.b], {}, module.a, [np.ones(3)]):
            for call in (ema.update, ema.apply_shadow):
                with pytest.raises(LayoutError, match=r"'inner\.0\.w' is gone"):
                    call(odd)
        with pytest.raises(BridgeError):
            ema.update(3)
    assert ema.num_updates == 0
    ema.update()
    assert ema.num_updates == 1


def test_a_variable_that_is_made_again_is_found() -> None:
    module = Layers()
    ema = fastema.EMA(module, 0.5)
    for n in range(5):
        module.a = tf.Variable([8.0, 9.0, 10.0])
        module.inner[1]["x"] = tf.Variable(9.0)
        gc.collect()
        poison = [tf.fill([3], np.float32(np.nan)) for _ in range(50)]
        ema.update()
        del poison
        want = np.array([8.0, 9.0, 10.0]) - 4 * 0.5 ** (n + 1)
        np.testing.assert_allclose(ema.shadow["a"], want, rtol=1e-6)
    with ema.swapped():
        np.testing.assert_allclose(module.a, want, rtol=1e-6)
    np.testing.assert_array_equal(module.a, [8.0, 9.0, 10.0])


# -- tensors that move -----------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["assign", "add", "share", "hold", "drop", "scatter"]),
                max_size=12), st.booleans())  # fmt: skip
def test_variables_are_found_whatever_was_done_to_them(steps: list[str], write: bool) -> None:
    variables = [tf.Variable(random_bits((5, 3), "int32", i)) for i in range(3)]
    find = Locator(registry.leaves_of(variables), variables)
    held: list[tuple[Any, bytes]] = []
    for n, step in enumerate(steps):
        one, other = variables[n % 3], variables[(n + 1) % 3]
        if step == "assign":
            one.assign(random_bits((5, 3), "int32", n))
        elif step == "add":
            one.assign_add(tf.ones_like(one))
        elif step == "share":
            one.assign(other.value())
        elif step == "scatter":
            one.scatter_nd_update([[0]], [tf.constant([n, n, n])])
        elif step == "hold":
            held.append((one.value(), one.numpy().tobytes()))
        else:
            held.clear()
        found = find.locate(variables, write=write)
        assert found is not None
        values = [one.numpy() for one in variables]
        for name, array in zip("012", values, strict=True):
            assert at(found.addresses[name], array) == array.tobytes()
        if write:
            assert len(set(found.addresses.values())) == 3
            theirs = {bridge.describe(tensor).address for tensor, _ in held}
            assert not theirs & set(found.addresses.values())
        del found
        assert all(tensor.numpy().tobytes() == was for tensor, was in held)


def test_one_variable_twice_is_one_place() -> None:
    variable, other = tf.Variable([1.0, 2.0, 3.0]), tf.Variable([4.0, 5.0, 6.0])
    container = {"a": variable, "b": other, "c": variable}
    find = Locator(registry.leaves_of(container), container)
    for _ in range(5):
        for write in (False, True):
            found = find.locate(container, write=write)
            assert found is not None
            assert found.addresses["a"] == found.addresses["c"] != found.addresses["b"]
    assert find.locate({"a": variable, "b": other, "c": other}) is None
    assert find.locate({"a": variable, "b": variable, "c": variable}, write=True) is None
    assert find.locate(container) is not None


def test_tensors_and_variables_together() -> None:
    variable = tf.Variable([1.0, 2.0])
    container = [tf.constant([3.0]), variable, tf.zeros([0, 2])]
    find = Locator(registry.leaves_of(container), container)
    for n in range(4):
        variable.assign([float(n), 5.0])
        now = [tf.constant([float(n)]), variable, tf.zeros([0, 2])]
        found = find.locate(now)
        assert found is not None
        assert at(found.addresses["0"], now[0].numpy()) == now[0].numpy().tobytes()
        assert at(found.addresses["1"], variable.numpy()) == variable.numpy().tobytes()
    for other in (
        [tf.constant([3.0]), variable],
        [tf.constant([3.0]), tf.constant([3.0]), tf.zeros([0, 2])],
        [tf.constant([3]), variable, tf.zeros([0, 2])],
        [np.ones(1, np.float32), variable, tf.zeros([0, 2])],
        [None, variable, tf.zeros([0, 2])],
    ):
        found = find.locate(other)
        assert found is None or (
            isinstance(other[1], tf.Tensor)
            and at(found.addresses["1"], other[1].numpy()) == other[1].numpy().tobytes()
        )


# -- what is shown ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_is_a_copy(name: str) -> None:
    for shape in ((), (64,), (4096,), (3, 0)):
        memory = random_bits(shape, name)
        before = memory.tobytes()
        to_framework = bridge.to_framework(memory)
        assert isinstance(to_framework, tf.Tensor)
        assert to_framework.dtype.name == name
        memory[...] = random_bits(shape, name, 1)
        assert to_framework.numpy().tobytes() == before


# -- numbers ---------------------------------------------------------------------------------------


def test_numbers() -> None:
    for value in (tf.constant(2.5), tf.Variable([2.5]), tf.constant([[2.5]], tf.bfloat16)):
        assert registry.scalar(value) == 2.5
    with pytest.raises(BridgeError, match=r"shape \(3,\)"):
        registry.scalar(tf.ones(3))

    @tf.function(autograph=False)
    def traced(x: tf.Tensor) -> tf.Tensor:
        registry.scalar(x)
        return x

    with pytest.raises(BridgeError, match="traced"):
        traced(tf.constant(1.0))


def test_numbers_on_a_gpu_are_kept_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfGpu:
        device = "/job:localhost/replica:0/task:0/device:GPU:0"

        def __init__(self, value: tf.Tensor) -> None:
            self.value, self.read = value, False

        def numpy(self) -> np.ndarray:
            self.read = True
            return self.value.numpy()

    on_gpu = OfGpu(tf.constant(4.0))
    monkeypatch.setattr(bridge.tf, "convert_to_tensor", lambda value: on_gpu)
    later = bridge.scalar(tf.constant(4.0))
    assert not on_gpu.read
    assert callable(later)
    assert later() == 4.0
