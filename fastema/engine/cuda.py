"""CUDA launches through the driver: modules, functions and launches on any thread and stream.

The driver is asked with plain numbers, in the primary context of the device, which is the one that
every framework works in. Nothing here waits for the device or allocates on it.
"""

from __future__ import annotations

import os
from typing import Any, Final

from fastema.engine.cubins import INSTALL, Cubin, Key, Unavailable, cubin
from fastema.engine.locks import lock
from fastema.errors import DeviceError

__all__ = ["Device", "device", "refuse_forked"]

_devices: dict[int, Device] = {}
_making = lock()
_forked = False


def _after_fork() -> None:
    # A context does not survive a fork: every call of the driver would fail, some would hang.
    global _forked
    _forked = bool(_devices) or _forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def refuse_forked() -> None:
    """Raise a DeviceError in a process that was forked from one that had used CUDA."""
    if _forked:
        raise DeviceError(
            "CUDA was in use before this process was forked and cannot be used in it: start "
            "workers by 'spawn' (multiprocessing.set_start_method('spawn')), or update the "
            "average in the parent"
        )


def _driver() -> Any:
    """The driver's functions; Unavailable without a driver, or the package that calls it."""
    try:
        from cuda.bindings import driver

        (error,) = driver.cuInit(0)
    except Exception as failure:  # of the loader of the library, which has errors of its own
        raise Unavailable(
            f"the CUDA driver cannot be called ({type(failure).__name__}: {failure}): it comes "
            f"with the GPU's display driver, and what calls it with {INSTALL}"
        ) from failure
    if error:
        raise Unavailable(f"the CUDA driver does not start: {error.name}")
    return driver


_LEGACY_STREAM: Final = 1
"""The default stream of all threads by a name of its own: 0 is another one, for each thread, where
the bindings are told so (CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM)."""

_NOT_TAKEN: Final = frozenset(
    f"CUDA_ERROR_{reason}"
    for reason in (
        *("INVALID_IMAGE", "INVALID_PTX", "INVALID_SOURCE", "NO_BINARY_FOR_GPU"),
        *("NOT_SUPPORTED", "UNSUPPORTED_PTX_VERSION"),
    )
)
"""Driver errors for code that the driver will never accept."""


class Device:
    """One GPU, by its number among those that the process sees.

    ``capability`` is its compute capability, such as (9, 0). A number that the driver does not know
    is a DeviceError.
    """

    def __init__(self, index: int) -> None:
        self._driver = driver = _driver()
        self._index = index
        self._functions: dict[Key, Any] = {}
        self._unavailable: dict[Key, str] = {}
        self._loading = lock()
        handle = self._checked(driver.cuDeviceGet(index))
        names = driver.CUdevice_attribute
        major, minor = (
            self._checked(driver.cuDeviceGetAttribute(one, handle))
            for one in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.capability = int(major), int(minor)
        self._context = self._checked(driver.cuDevicePrimaryCtxRetain(handle))
        self._context_number = int(self._context)

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        """Unpack the answer of a driver call; DeviceError if it failed."""
        error, *rest = answer
        if error:
            advice = (
                "free some of its memory, also what a framework holds in reserve, and call again"
                if error.name == "CUDA_ERROR_OUT_OF_MEMORY"
                else "after an illegal access or a failed kernel, in whichever package, only a new "
                "process helps"
            )
            raise DeviceError(f"cuda:{self._index}: the driver says {error.name}; {advice}")
        return rest[0] if rest else None

    def _enter(self) -> bool:
        """Make the device's context current where it is not; whether :meth:`_release` is needed."""
        refuse_forked()
        if int(self._checked(self._driver.cuCtxGetCurrent())) == self._context_number:
            return False
        self._checked(self._driver.cuCtxPushCurrent(self._context))
        return True

    def _release(self) -> None:
        self._checked(self._driver.cuCtxPopCurrent())

    def function(self, key: Key) -> Any:
        """A kernel of this device; the first request loads it, and compiles it if need be."""
        refuse_forked()
        with self._loading:
            if key not in self._functions:
                self._functions[key] = self._loaded(key, self._compiled(key))
            return self._functions[key]

    def _compiled(self, key: Key) -> Cubin:
        """The machine code; where it cannot be had, the same error again, without the compilers."""
        if key in self._unavailable:
            raise Unavailable(self._unavailable[key])
        try:
            return cubin(key)
        except Unavailable as error:
            self._unavailable[key] = str(error)  # itself it would keep what its frames hold
            raise

    def _loaded(self, key: Key, made: Cubin) -> Any:
        entered = self._enter()
        try:
            answer = self._driver.cuModuleLoadData(made.code)
            if answer[0] and answer[0].name in _NOT_TAKEN:
                raise Unavailable(
                    f"cuda:{self._index}: the driver does not take the GPU kernel "
                    f"{key.operation} ({answer[0].name}): it is made with CUDA 13, which needs a "
                    "driver of version 580 or later"
                )
            module = self._checked(answer)
            return self._checked(self._driver.cuModuleGetFunction(module, made.name.encode()))
        finally:
            if entered:
                self._release()

    def launch(
        self, function: Any, blocks: int, threads: int, stream: int, parameters: int
    ) -> None:
        """Put a kernel on a stream, given by its handle.

        ``parameters`` is the address of an array of the addresses of the kernel's parameters, which
        are read now.
        """
        entered = self._enter()
        try:
            launched = self._driver.cuLaunchKernel(
                function, blocks, 1, 1, threads, 1, 1, 0, stream or _LEGACY_STREAM, parameters, 0
            )
        finally:
            if entered:
                self._release()
        if launched[0]:
            self._checked(launched)


def device(index: int) -> Device:
    """The GPU of a number; the same object every time."""
    with _making:
        if index not in _devices:
            _devices[index] = Device(index)
        return _devices[index]
