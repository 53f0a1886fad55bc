"""Read PyTorch's pickles without running any code in them."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from fastema.checkpoint.files import check_extents, check_shape
from fastema.layout.dtypes import NAME_OF
from fastema.layout.flat import row_major

__all__ = ["STORAGES", "TENSORS", "PickledTensor", "is_row_major", "load"]

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
"""PyTorch storage class to dtype code."""


_DEEPEST_TUPLE: Final = 16
"""Limit on tuples in tuples: hashing deeper ones could crash Python, or never end."""


def _refuse_far_places(data: bytes) -> None:
    """Refuse a pickle whose memo indices or nested tuples could exhaust memory or crash Python.

    The unpickler allocates its memo up to the largest index.
    """
    # How deep tuples are nested in each object on the unpickler's stack, and in its memo.
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name, first = opcode.name, len(stack)
        if name == "MARK":
            marks.append(first)
            continue
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if argument is None else int(argument)
            if place > len(memo) + 256:
                raise pickle.UnpicklingError(f"it stores an object at memo index {place}")
            memo[place] = stack[-1] if stack else 0
            continue
        operands = [one.name for one in opcode.stack_before]
        if "mark" in operands:  # the operands after the mark are all that lies above it
            first = marks.pop() if marks else 0
            del operands[operands.index("mark") :]
        first = max(first - len(operands), 0)
        depth = max(stack[first:], default=0) + name.startswith(("TUPLE", "FROZENSET"))
        if depth > _DEEPEST_TUPLE:
            raise pickle.UnpicklingError("it nests tuples too deeply")
        del stack[first:]
        if name in ("GET", "BINGET", "LONG_BINGET"):
            depth = memo.get(int(argument or 0), 0)
        stack += [depth] * len(opcode.stack_after)


class _Unpickler(pickle.Unpickler):
    """Unpickler that resolves only the allowed names."""

    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any]) -> None:
        _refuse_far_places(data)
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, but code is never run; save a state_dict() "
                "(docs/checkpoints.md has the lines for modules)"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


class PickledTensor(NamedTuple):
    """A tensor in a pickle: its storage, position and strides there, and dtype code."""

    storage: tuple[Any, ...]
    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    code: str

    @property
    def key(self) -> str:
        """The name of the tensor's storage in its file."""
        return str(self.storage[2])


def is_row_major(found: PickledTensor) -> bool:
    """Return whether a tensor is row-major contiguous; ignore strides of axes of length 1."""
    expected = row_major(found.size)
    return 0 in found.size or all(
        extent == 1 or one == other
        for extent, one, other in zip(found.size, found.strides, expected, strict=True)
    )


def _rebuild_v3(
    storage: Any,
    offset: Any,
    size: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    code: Any,
    metadata: Any = None,
) -> PickledTensor:
    if metadata:
        raise pickle.UnpicklingError(
            f"a tensor is a lazy conjugate or negative: {metadata!r}; save a .clone()"
        )
    kind = tuple(storage)
    if len(kind) != 5 or not isinstance(kind[1], str):
        raise pickle.UnpicklingError("a tensor has no storage")
    extents, steps, (first,) = check_shape(size), check_extents(strides), check_extents([offset])
    if len(extents) != len(steps):
        raise pickle.UnpicklingError("a tensor does not have one stride per axis")
    of_storage = STORAGES.get(kind[1], "")
    return PickledTensor(kind, first, extents, steps, of_storage or str(code))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_v2(*args: Any) -> PickledTensor:
    """Rebuild a tensor whose dtype is that of its storage; the seventh argument is metadata."""
    return _rebuild_v3(*(*args[:6], None, *args[6:]))


class _Function:
    """Wrapper of a function whose attributes a pickle cannot set."""

    __slots__ = ("_call",)
    _call: Any

    def __init__(self, call: Any) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets the attribute {name!r} of a function")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


TENSORS: Final[dict[tuple[str, str], Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch", "Size"): _Function(check_shape),
    **{("torch", name): code for code, name in NAME_OF.items()},
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, name): name for module in ("torch", "torch.storage") for name in STORAGES},
}
"""Names that a pickled state dict of tensors and plain values may use."""


def load(data: bytes, allowed: Mapping[tuple[str, str], Any]) -> Any:
    """Read a pickle; raise an UnpicklingError if it names an object that is not allowed."""
    return _Unpickler(data, allowed).load()
