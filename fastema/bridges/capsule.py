"""Arrays of any other framework that hands out DLPack capsules, in the memory of the host."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from fastema.bridges.dlpack import Described, read_capsule
from fastema.errors import BridgeError, DTypeError
from fastema.layout.flat import row_major
from fastema.layout.spec import TensorSpec

MEMORY: Final = "numpy"
"""The framework whose arrays hold averages of these."""

_CPU: Final = 1
"""DLPack's number for the memory of the host."""

_CODES: Final = {
    **{(0, bits): f"i{bits}" for bits in (8, 16, 32, 64)},
    **{(1, bits): f"u{bits}" for bits in (8, 16, 32, 64)},
    **{(2, bits): f"f{bits}" for bits in (16, 32, 64)},
    (4, 16): "bf16",
    **{(5, bits): f"c{bits}" for bits in (64, 128)},
    (6, 8): "bool",
}
"""DLPack's kind of number and its bits."""


def owns(obj: Any) -> bool:
    """Return whether an object exports itself by DLPack."""
    return hasattr(type(obj), "__dlpack__") and hasattr(type(obj), "__dlpack_device__")


def _described(array: Any) -> tuple[Any, Described]:
    capsule = None
    # What is older than version 1 of the protocol takes no arguments, and says nothing of writing.
    with contextlib.suppress(TypeError):
        capsule = array.__dlpack__(max_version=(1, 0), copy=False)
    if capsule is None:
        capsule = array.__dlpack__()
    return capsule, read_capsule(capsule)


def describe(array: Any) -> TensorSpec:
    """Describe where an array lies now; it must be on the host, and not given out as a copy."""
    kind, _ = array.__dlpack_device__()
    name = type(array).__name__
    if kind != _CPU:
        raise BridgeError(f"a {name} on DLPack device {kind}: only the memory of the host is read")
    try:
        first, found = _described(array)
        second, again = _described(array)
    except BufferError as error:
        raise BridgeError(f"this {name} does not give its memory away: {error}") from None
    if found.address != again.address:
        raise BridgeError(f"a {name} gives out copies of its memory; pass an array that does not")
    del first, second
    number, bits, lanes = found.dtype
    if lanes != 1 or (number, bits) not in _CODES:
        raise DTypeError(f"DLPack dtype {found.dtype} has no kernel; known are {[*_CODES]}")
    return TensorSpec(
        address=found.address,
        shape=found.shape,
        strides=row_major(found.shape) if found.strides is None else found.strides,
        dtype=_CODES[number, bits],
        device="cpu",
        writable=found.writable,
        owner=array,
    )
