"""CUDA launches through the driver: modules, functions and launches on any thread and stream.

Driver calls take plain integers and run in the device's primary context, which every framework
uses. Nothing here waits for the device or allocates memory on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

from fastema.engine.cubins import Cubin, Key, Unavailable, cubin
from fastema.engine.driver import Driver, DriverError
from fastema.engine.locks import lock
from fastema.errors import DeviceError

__all__ = ["Device", "device", "refuse_forked"]

_T = TypeVar("_T")

_devices: dict[int, Device] = {}
_making = lock()
_forked = False


def _after_fork() -> None:
    # A context does not survive a fork: every driver call would fail, and some would hang.
    global _forked
    _forked = bool(_devices) or _forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def refuse_forked() -> None:
    """Raise a DeviceError if this process was forked from one that had used CUDA."""
    if _forked:
        raise DeviceError(
            "CUDA was in use before this process was forked and cannot be used in it: start "
            "workers with 'spawn' (multiprocessing.set_start_method('spawn')), or update the "
            "average in the parent"
        )


def _driver() -> Driver:
    """Return the CUDA driver; raise Unavailable if it cannot be used."""
    try:
        return Driver()
    except (OSError, DriverError) as failure:
        raise Unavailable(
            f"the CUDA driver cannot be used ({failure}): it comes with the GPU's display driver"
        ) from failure


_NOT_TAKEN: Final = frozenset(
    f"CUDA_ERROR_{reason}"
    for reason in (
        *("INVALID_IMAGE", "INVALID_PTX", "INVALID_SOURCE", "NO_BINARY_FOR_GPU"),
        *("NOT_SUPPORTED", "UNSUPPORTED_PTX_VERSION"),
    )
)
"""Driver errors for code that the driver will never accept."""


class Device:
    """One GPU, by its index among the devices that the process sees.

    ``capability`` is its compute capability, such as (9, 0). An index that the driver does not
    know raises a DeviceError.
    """

    def __init__(self, index: int) -> None:
        self._driver = driver = _driver()
        self._index = index
        self._functions: dict[Key, int] = {}
        self._unavailable: dict[Key, str] = {}
        self._loading = lock()
        try:
            self.capability = driver.capability(index)
            self._context = driver.context(index)
        except DriverError as error:
            raise self._failure(error) from None

    def _failure(self, error: DriverError) -> DeviceError:
        advice = (
            "free some of its memory, including what a framework caches, and call again"
            if error.name == "CUDA_ERROR_OUT_OF_MEMORY"
            else "after an illegal access or a failed kernel, in any package, only a new "
            "process helps"
        )
        return DeviceError(f"cuda:{self._index}: the driver reports {error.name}; {advice}")

    def _in_context(self, call: Callable[..., _T], *args: Any) -> _T:
        """Call a driver function with the device's context current."""
        refuse_forked()
        driver = self._driver
        try:
            foreign = driver.current() != self._context
            if foreign:
                driver.push(self._context)
            try:
                return call(*args)
            finally:
                if foreign:
                    driver.pop()
        except DriverError as error:
            raise self._failure(error) from error

    def function(self, key: Key) -> int:
        """Return a kernel; the first request loads it, and compiles it if necessary."""
        refuse_forked()
        with self._loading:
            if key not in self._functions:
                self._functions[key] = self._load(key, self._compile(key))
            return self._functions[key]

    def _compile(self, key: Key) -> Cubin:
        """Return the machine code; after a failure, raise the same error without recompiling."""
        if key in self._unavailable:
            raise Unavailable(self._unavailable[key])
        try:
            return cubin(key)
        except Unavailable as error:
            self._unavailable[key] = str(error)  # the error itself would keep its frames' objects
            raise

    def _load(self, key: Key, made: Cubin) -> int:
        try:
            return self._in_context(self._driver.function, made.code, made.name)
        except DeviceError as error:
            name = getattr(error.__cause__, "name", "")
            if name not in _NOT_TAKEN:
                raise
            raise Unavailable(
                f"cuda:{self._index}: the driver does not accept the GPU kernel {key.operation} "
                f"({name}); shipped kernels need driver version 525 or later, kernels compiled "
                "here with CUDA 13 need 580 or later"
            ) from None

    def launch(
        self, function: int, blocks: int, threads: int, stream: int, parameters: int
    ) -> None:
        """Launch a kernel on a stream, given by its handle.

        ``parameters`` is the address of an array that holds the addresses of the kernel's
        parameters. The driver reads them before this returns.
        """
        self._in_context(self._driver.launch, function, blocks, threads, stream, parameters)


def device(index: int) -> Device:
    """Return the GPU with this index; the same object every time."""
    with _making:
        if index not in _devices:
            _devices[index] = Device(index)
        return _devices[index]
