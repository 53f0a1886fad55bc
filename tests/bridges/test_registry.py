"""Containers and arrays of any framework: names, specs, scalars and refusals."""

from collections import OrderedDict, UserDict
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.bridges import dlpack
from fastema.bridges import numpy as numpy_bridge
from fastema.bridges.names import plain_names
from fastema.bridges.registry import bridge_of, describe, leaves_of, scalar
from fastema.errors import BridgeError, DTypeError, LayoutError

ONE, TWO, THREE = np.ones(2), np.ones(3, np.float32), np.array(2.5)


class Current:
    """An array of an unknown framework that implements version 1 of DLPack."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


class Old(Current):
    def __dlpack__(self) -> Any:
        return self.array.__dlpack__()


class Copying(Old):
    def __dlpack__(self) -> Any:
        return self.array.copy().__dlpack__()


def test_names_of_containers_follow_their_order() -> None:
    for container, names in (
        (ONE, "array"),
        ((ONE, [TWO, THREE]), "0 1.0 1.1"),
        ({"a": ONE, "b": {"c": TWO}}, "a b.c"),
        (OrderedDict(z=ONE, a=TWO), "z a"),
        (UserDict(a=ONE), "a"),
        (MappingProxyType({"a": [ONE]}), "a.0"),
        ({1: ONE, ("x",): TWO}, "1 ('x',)"),
        ({"a": {}, "b": []}, ""),
    ):
        assert leaves_of(container).names == names.split()


def test_wrappers_are_removed_from_names() -> None:
    for names, plain in (
        ("_orig_mod.fc.weight _orig_mod.b", "fc.weight b"),
        ("module.module.a module.module.b", "a b"),
        ("module._orig_mod.a module._orig_mod.b", "a b"),
        ("layers._checkpoint_wrapped_module.0._orig_mod.w", "layers.0.w"),
        ("layers._fsdp_wrapped_module.w", "layers.w"),
        # A real submodule named like a wrapper, and a parameter named like one.
        ("module.a head", "module.a head"),
        ("module module", "module module"),
        ("module.module module.a", "module a"),
        # Names that would collide without the wrapper.
        ("a._orig_mod.w a.w", "a._orig_mod.w a.w"),
    ):
        assert plain_names(names.split()) == plain.split()


def test_unusable_leaves_are_refused_by_name() -> None:
    record = np.ones(5, [("a", "f4"), ("b", "u1")])["a"]
    text = np.array(["a"])
    cases = ((3, BridgeError), (None, BridgeError), (record, BridgeError), (text, DTypeError))
    for array, error in cases:
        with pytest.raises(error, match=r"inner\.bad\.1"):
            leaves_of({"good": ONE, "inner": {"bad": (TWO, array)}})


@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_container_that_contains_itself_is_refused_by_name(framework: str) -> None:
    pytest.importorskip(framework)
    a: dict[str, Any] = {"w": ONE}
    holding = {"b": a, "b.1": [TWO, a], "b.0": (a,), "b.c.b": {"c": MappingProxyType(a)}}
    for place, held in holding.items():
        a["b"] = held
        with pytest.raises(BridgeError, match=rf"'{place}' is a \w+ that contains itself"):
            leaves_of(a)
    a["b"] = [ONE, TWO]
    assert leaves_of(a).names == ["w", "b.0", "b.1"]  # it still works without the cycle


BASE = np.arange(1.0, 121.0, dtype=np.float32).reshape(4, 5, 6)
ARRAYS = [
    *(BASE.T, BASE[1:, ::2, -1], BASE[::-1, :, ::-2], BASE[0, 0, 0:0], np.array(3.5)),
    *(np.ones(7, bool), np.ones(4, np.float16), np.ones((2, 3), np.complex128)[:, 1]),
    *(np.ones(3, f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)),
]


@pytest.mark.parametrize("array", ARRAYS)
def test_spec_has_address_strides_and_dtype_of_the_array(array: np.ndarray) -> None:
    spec = describe(array)
    strides = tuple(step // array.itemsize for step in array.strides)
    assert (spec.address, spec.shape, spec.strides) == (array.ctypes.data, array.shape, strides)
    assert (spec.dtype, spec.device) == (numpy_bridge.code(array.dtype), "cpu")
    assert spec.writable
    assert spec.owner is array
    for kind in (Current, Old):
        mine = describe(kind(array))
        assert bridge_of(kind(array)) is dlpack
        assert (mine.shape, mine.dtype, mine.device) == (spec.shape, spec.dtype, "cpu")
        if array.size:
            assert (mine.address, mine.strides) == (spec.address, spec.strides)
        assert mine.writable is (kind is Current)
    assert not describe(np.broadcast_to(array, (2, *array.shape))).writable


def test_memory_that_cannot_be_read_in_place_is_refused() -> None:
    odd_steps = np.ndarray((3,), np.complex128, np.zeros(9), strides=(24,))
    assert odd_steps.flags.aligned  # by its 8-byte halves
    read_only = np.ones(3, np.float32)
    read_only.flags.writeable = False
    for array, message in (
        (np.frombuffer(bytearray(41), np.uint8)[1:].view(np.float32), "multiples of 4 "),
        (odd_steps, "multiples of 16"),
        (Copying(np.ones(3)), "copies"),
        (Current(np.ones(3), (8, 0)), "device 8"),
        (Old(read_only), "Old"),
    ):
        with pytest.raises(BridgeError, match=message):
            describe(array)
    assert not describe(Current(read_only)).writable
    torch = pytest.importorskip("torch")
    with pytest.raises(DTypeError, match="DLPack dtype"):
        describe(Current(torch.zeros(3, dtype=torch.float8_e4m3fn)))


def test_arrays_of_unknown_frameworks_are_averaged() -> None:
    generator = np.random.default_rng(0)
    first, second = (generator.normal(size=size).astype(np.float32) for size in ((6, 5), 3))
    before = [first.astype(float), second.astype(float)]
    ema = fastema.EMA({"a": Current(first), "b": [Current(second)]}, 0.75)
    first += 4
    second *= -2
    ema.update()
    for name, b, x in zip(("a", "b.0"), before, (first, second), strict=True):
        np.testing.assert_allclose(ema.shadow[name], 0.75 * b + 0.25 * x, rtol=1e-6, atol=1e-6)
    raw, average = first.tobytes(), ema.shadow["a"].tobytes()
    with ema.swapped():
        assert first.tobytes() == average
    assert first.tobytes() == raw
    average_of_old = np.zeros((6, 5), np.float32)
    fastema.lerp_([average_of_old], [Old(first)], 1.0)
    assert average_of_old.tobytes() == raw
    with pytest.raises(LayoutError, match="read-only"):
        fastema.lerp_([Old(first)], [average_of_old], 0.5)


def test_scalar_accepts_host_numbers_only() -> None:
    exact = (0.625, Fraction(5, 8), Decimal("0.625"), np.float32(0.625), np.array([[0.625]]))
    whole = (3, True, np.int8(-3), np.bool_(True))
    for value, want in (*((one, 0.625) for one in exact), *((one, float(one)) for one in whole)):
        assert scalar(value) == want
        assert type(scalar(value)) is float
    for value in ("1.0", None, [1.0], {}, 1j, np.ones(2), np.ones((0,)), np.complex128(1j),
                  10**400, np.array("1.0"), np.array(1j), Decimal("sNaN"), object()):  # fmt: skip
        with pytest.raises(BridgeError, match="expected"):
            scalar(value)


def test_scalar_of_torch_tensors_reads_devices_lazily() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64):
        assert scalar(torch.tensor([5], dtype=dtype)) == 5.0
    assert scalar(torch.tensor(2.0, requires_grad=True) * 1.5) == 3.0
    for value, message in (
        (torch.ones(3), r"torch\.Tensor of shape \(3,\)"),
        (torch.ones((), device="meta"), "without data"),
    ):
        with pytest.raises(BridgeError, match=message):
            scalar(value)

    class OfAccelerator(torch.Tensor):  # pretends to be on a GPU and records reads
        device = torch.device("cuda")
        read = False

        def item(self) -> float:
            OfAccelerator.read = True
            return float(self.as_subclass(torch.Tensor).item())

    value = torch.tensor(4.0).as_subclass(OfAccelerator)
    later = scalar(value)
    with torch.no_grad():
        value.fill_(9.0)  # as the next replay of a captured graph does
    assert not OfAccelerator.read
    assert callable(later)
    assert later() == 4.0
