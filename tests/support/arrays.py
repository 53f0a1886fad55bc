"""Arrays as kernels see them: values of every dtype, bitwise comparison and guarded memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastema.layout.dtypes import DTYPES
from fastema.layout.spec import TensorSpec

Array = NDArray[Any]

STORAGE: dict[str, Any] = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "c64": np.complex64,
    "c128": np.complex128,
    "bool": np.bool_,
    **{f"i{8 * n}": np.dtype(f"i{n}").type for n in (1, 2, 4, 8)},
    **{f"u{8 * n}": np.dtype(f"u{n}").type for n in (1, 2, 4, 8)},
}


def bits(array: Array) -> Array:
    """View an array as unsigned integers for bitwise comparison, complex elements as two each."""
    size = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    return np.ascontiguousarray(array).reshape(-1).view(f"u{size}")


def is_nan(array: Array, code: str) -> Array:
    """Return which reals are NaN; a complex number counts as two consecutive reals."""
    if code == "bf16":
        return np.asarray((array & 0x7FFF) > 0x7F80)
    reals = np.ascontiguousarray(array).view(array.real.dtype) if array.dtype.kind == "c" else array
    return np.isnan(reals) if reals.dtype.kind == "f" else np.zeros(reals.shape, bool)


def assert_same(got: Array, want: Array, code: str) -> None:
    """Assert that arrays are bitwise equal, except that any NaN equals any NaN."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    nan_got, nan_want = is_nan(got, code).reshape(-1), is_nan(want, code).reshape(-1)
    np.testing.assert_array_equal(nan_got, nan_want)
    a, b = bits(got), bits(want)
    wrong = np.flatnonzero((a != b) & ~nan_want)
    assert not wrong.size, (
        f"{wrong.size} of {a.size} {code} differ, the first at {wrong[0]}: "
        f"{a[wrong[0]]:#x}, expected {b[wrong[0]]:#x}"
    )


def numbers(size: int, code: str, seed: int = 0, kind: str = "weights") -> Array:
    """Draw nonzero stored numbers like weights, or any bit pattern with ``kind="bits"``."""
    generator = np.random.default_rng([seed, len(code), DTYPES[code].itemsize])
    storage = np.dtype(STORAGE[code])
    if code == "bool":
        return generator.integers(0, 2, size).astype(bool)
    if kind == "bits" or DTYPES[code].real is None:
        return generator.integers(0, 256, size * storage.itemsize, np.uint8).view(storage)
    count = size * DTYPES[code].parts
    values = generator.normal(size=count) * 2.0 ** generator.integers(-6, 3, count)
    if code == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values.astype(np.empty(0, storage).real.dtype).view(storage)


def draw_bits(shape: tuple[int, ...], name: str, seed: int = 0) -> Array:
    """Draw random bits, NaN and infinities included, as an array of the named dtype."""
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    generator = np.random.default_rng([seed, len(name), *shape])
    if name == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * dtype.itemsize
    return generator.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


class GuardedArray:
    """An array in poisoned memory that detects writes around and between its elements."""

    def __init__(self, array: Array, memory: Array, owned: Array) -> None:
        self.array = array
        self._memory = memory  # in bytes
        self._owned = owned  # bytes that belong to the array
        self._before = memory.copy()

    def poison(self, value: Any) -> None:
        """Overwrite the elements and take the result as the state that must not change."""
        self.array[...] = value
        self._before[...] = self._memory

    def assert_rest_untouched(self) -> None:
        """Assert that only the array's elements have changed."""
        changed = (self._memory != self._before) & ~self._owned
        assert not changed.any(), f"written outside, at byte {np.flatnonzero(changed)[0]}"

    def assert_untouched(self) -> None:
        """Assert that neither the elements nor the memory around them has changed."""
        np.testing.assert_array_equal(self._memory, self._before)


def lay_out_guarded(
    values: Array, start: int = 0, strides: tuple[int, ...] | None = None
) -> GuardedArray:
    """Copy values into guarded memory, with strides given in elements."""
    size = values.itemsize
    if strides is None:
        strides = tuple(step // size for step in np.empty(values.shape, values.dtype).strides)
    spans = [(n - 1) * s for n, s in zip(values.shape, strides, strict=True) if n > 0]
    before = -sum(span for span in spans if span < 0)
    length = before + sum(span for span in spans if span > 0) + 1
    margin = 64 + start * size
    raw = np.full(64 + margin + length * size + 256, 0xA5, np.uint8)
    first = -raw.ctypes.data % 64 + margin + before * size
    steps = tuple(s * size for s in strides)
    array: Array = np.ndarray(values.shape, values.dtype, raw, first, steps)
    owned = np.zeros(raw.shape, bool)
    if values.size:
        array[...] = values
        places = np.arange(raw.size)
        index = np.ndarray(
            values.shape, np.int64, places, first * 8, tuple(step * 8 for step in steps)
        )
        owned[(index.reshape(-1, 1) + np.arange(size)).reshape(-1)] = True
    return GuardedArray(array, raw, owned)


def spec_of(array: Array, code: str, device: str = "cpu", **more: Any) -> TensorSpec:
    """Describe a NumPy array as a tensor of a dtype code (bfloat16 is stored as uint16)."""
    strides = tuple(step // array.itemsize for step in array.strides)
    address = array.ctypes.data
    return TensorSpec(address, array.shape, strides, code, device, owner=array, **more)
