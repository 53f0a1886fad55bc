"""Pickles that PyTorch writes, read without running anything that they contain."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

__all__ = ["STORAGES", "TENSORS", "Rebuilt", "load"]

STORAGES: Final = {
    "DoubleStorage": "f64",
    "FloatStorage": "f32",
    "HalfStorage": "f16",
    "BFloat16Storage": "bf16",
    "ComplexFloatStorage": "c64",
    "ComplexDoubleStorage": "c128",
    "CharStorage": "i8",
    "ShortStorage": "i16",
    "IntStorage": "i32",
    "LongStorage": "i64",
    "ByteStorage": "u8",
    "BoolStorage": "bool",
    "UntypedStorage": "",
}

"""Names of PyTorch's storages, to codes."""


def _refuse_far_places(data: bytes) -> None:
    """Refuse a pickle that keeps an object at a far place, up to which memory would be taken."""
    count = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if int(argument or 0) > count + 256:
                raise pickle.UnpicklingError(f"it keeps an object at {argument}")
            count += 1


class _Unpickler(pickle.Unpickler):
    """Makes nothing but what is allowed."""

    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any]) -> None:
        _refuse_far_places(data)
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


class Rebuilt(NamedTuple):
    """A tensor in a file of its own: its storage, and how it lies there."""

    storage: tuple[Any, ...]
    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuilt(storage: Any, offset: int, size: Any, strides: Any, *_: Any) -> Rebuilt:
    return Rebuilt(tuple(storage), int(offset), tuple(size), tuple(strides))


TENSORS: Final[dict[tuple[str, str], Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, name): name for module in ("torch", "torch.storage") for name in STORAGES},
}


def load(data: bytes, allowed: Mapping[tuple[str, str], Any]) -> Any:
    """Read a pickle that may name these objects and no others; an error for any other."""
    return _Unpickler(data, allowed).load()
