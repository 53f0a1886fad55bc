"""A stub of CuPy whose arrays are in host memory, for the driver of `stub_gpu`.

It has only what fastema calls and what tests inspect.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.bridges import registry
from fastema.engine import cuda as engine
from fastema.engine import cuda_group

from .stub_gpu import StubDriver, stub_cubin

_current = [0]


class Device:
    """`cupy.cuda.Device`, also a context manager."""

    def __init__(self, index: int = 0) -> None:
        self.id = index

    def __enter__(self) -> Device:
        _current.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        _current.pop()

    def synchronize(self) -> None:
        assert not Stream.captured, "cannot synchronize while a stream is captured"
        Stream.waits += 1
        if Stream.driver is not None and Stream.driver.pending is not None:
            Stream.driver.finish()


class Stream:
    """The current stream of a device."""

    captured = False
    waits = 0
    driver: StubDriver | None = None

    def __init__(self, index: int) -> None:
        self.ptr = 5000 + index

    def is_capturing(self) -> bool:
        return self.captured


class Pointer:
    """`cupy.cuda.MemoryPointer`: an address and its owner."""

    def __init__(self, memory: np.ndarray, device: int, offset: int = 0) -> None:
        self.memory, self.device_id, self.offset = memory, device, offset
        self.ptr = memory.ctypes.data + offset

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.memory, self.device_id, self.offset + offset)


class ndarray:
    """`cupy.ndarray`; tests read its elements through `there`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any = np.float32,
        memptr: Pointer | None = None,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        dtype = np.dtype(dtype)
        if memptr is None:
            memory = np.empty(int(np.prod(shape)) * dtype.itemsize + 16, np.uint8)
            memory[:] = 0xA5  # garbage, as from `cupy.empty`
            memptr = Pointer(memory, _current[-1])
        self.data, self.device = memptr, Device(memptr.device_id)
        self.there = np.ndarray(shape, dtype, memptr.memory, memptr.offset, strides)

    shape = property(lambda self: self.there.shape)
    strides = property(lambda self: self.there.strides)
    dtype = property(lambda self: self.there.dtype)
    itemsize = property(lambda self: self.there.itemsize)
    size = property(lambda self: self.there.size)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`.")

    def view(self) -> ndarray:
        return ndarray(self.shape, self.dtype, self.data, self.strides)

    def get(self) -> np.ndarray:
        Device(self.device.id).synchronize()
        return self.there.copy()

    def set(self, values: np.ndarray) -> None:
        assert values.flags.c_contiguous
        assert (values.dtype, values.shape) == (self.dtype, self.shape)
        self.there[...] = values


def array(values: Any) -> ndarray:
    """Copy values to the current device, as `cupy.array` does."""
    values = values.there if isinstance(values, ndarray) else np.asarray(values)
    made = ndarray(values.shape, values.dtype)
    made.there[...] = values
    return made


def zeros(length: int, dtype: Any) -> ndarray:
    made = ndarray((length,), dtype)
    made.there[...] = np.zeros(length, dtype)
    return made


def _build_module() -> ModuleType:
    made = ModuleType("cupy")
    made.ndarray, made.array, made.asarray, made.zeros = ndarray, array, array, zeros
    cuda = ModuleType("cupy.cuda")
    cuda.Device, cuda.get_current_stream = Device, lambda index=0: Stream(index)
    made.cuda = cuda
    return made


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    """Install the stub as `cupy`; the host runs the GPU kernels on its arrays."""
    driver = StubDriver()
    forgotten = "fastema.bridges.cupy"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", _build_module())
        patch.delitem(sys.modules, forgotten, raising=False)
        patch.setattr(engine, "_driver", lambda: driver)
        patch.setattr(engine, "_devices", {})
        patch.setattr(engine, "cubin", stub_cubin)
        patch.setattr(cuda_group, "_warned", set())
        patch.setattr(Stream, "driver", driver)
        patch.setattr(Stream, "waits", 0)
        registry._bridge.cache_clear()
        registry._owners.clear()
        yield driver
    sys.modules.pop(forgotten, None)
    with suppress(AttributeError):
        del fastema.bridges.cupy
    registry._bridge.cache_clear()
    registry._owners.clear()
