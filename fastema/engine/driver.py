"""The CUDA driver functions that load and launch kernels, called through ctypes.

The library comes with the GPU's display driver: nothing else has to be installed. Handles are plain
integers.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_int, c_uint, c_void_p
from typing import Any, Final

__all__ = ["Driver", "DriverError"]

_LIBRARY: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_CAPABILITY: Final = 75, 76
"""Device attributes: the major and the minor number of the compute capability."""

_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (c_void_p,),
    "cuModuleLoadData": (c_void_p, c_char_p),
    "cuModuleGetFunction": (c_void_p, c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, *(c_void_p,) * 3),
}
"""Parameter types; all functions return an error code. Without its ``_v2`` suffix a name means an
older version of the function, kept for old programs."""


class DriverError(Exception):
    """A driver error; ``name`` is the driver's name for it, such as CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Driver:
    """The driver's functions, as methods that raise a DriverError.

    Raises an OSError if the library is missing.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(_LIBRARY)
        for name, parameters in _FUNCTIONS.items():
            try:
                getattr(library, name).argtypes = parameters
            except AttributeError:
                raise OSError(
                    f"{_LIBRARY} has no {name}: it is not a CUDA driver, or a very old one"
                ) from None
        self._library = library
        self._launch = library.cuLaunchKernel
        # Called before every launch. It returns at once: releasing the GIL, as a CDLL does, could
        # hand it to another thread for 5 ms.
        self._current = ctypes.PyDLL(_LIBRARY).cuCtxGetCurrent
        self._current.argtypes = _FUNCTIONS["cuCtxGetCurrent"]
        self._check(library.cuInit(0))

    def _check(self, error: int) -> None:
        if error:
            name = c_char_p()
            self._library.cuGetErrorName(error, ctypes.byref(name))
            raise DriverError(name.value.decode() if name.value else f"error {error}")

    def capability(self, index: int) -> tuple[int, int]:
        """Return the compute capability of a device, such as (9, 0)."""
        device, value = self._device(index), c_int()
        found = []
        for attribute in _CAPABILITY:
            error = self._library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            self._check(error)
            found.append(value.value)
        return found[0], found[1]

    def context(self, index: int) -> int:
        """Return the primary context of a device, which every framework uses."""
        context = c_void_p()
        device = self._device(index)
        self._check(self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        return context.value or 0

    def _device(self, index: int) -> int:
        device = c_int()
        self._check(self._library.cuDeviceGet(ctypes.byref(device), index))
        return device.value

    def current(self) -> int:
        """Return this thread's current context; 0 if there is none."""
        context = c_void_p()
        self._check(self._current(ctypes.byref(context)))
        return context.value or 0

    def push(self, context: int) -> None:
        """Make a context current on this thread."""
        self._check(self._library.cuCtxPushCurrent_v2(context))

    def pop(self) -> None:
        """Restore the context that was current before :meth:`push`."""
        self._check(self._library.cuCtxPopCurrent_v2(ctypes.byref(c_void_p())))

    def function(self, code: bytes, name: str) -> int:
        """Load machine code or PTX into the current context; return its kernel called ``name``."""
        module, function = c_void_p(), c_void_p()
        self._check(self._library.cuModuleLoadData(ctypes.byref(module), code))
        found = self._library.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        self._check(found)
        return function.value or 0

    def launch(
        self, function: int, blocks: int, threads: int, stream: int, parameters: int
    ) -> None:
        """Launch a kernel on a stream; ``parameters`` points to the addresses of its parameters."""
        error = self._launch(function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, None)
        if error:
            self._check(error)
