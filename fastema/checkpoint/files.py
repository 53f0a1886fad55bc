"""safetensors files: written under another name and moved into place, read by mapping them.

The format is eight bytes with the length of a JSON header, the header, and the tensors' bytes in
row-major order; see https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from fastema.errors import CheckpointError
from fastema.layout.flat import row_major
from fastema.layout.spec import TensorSpec

__all__ = ["File", "read", "write"]

_NAMES: Final = {
    "f64": ("F64", "float64"),
    "f32": ("F32", "float32"),
    "f16": ("F16", "float16"),
    "bf16": ("BF16", "bfloat16"),
    "c64": ("C64", "complex64"),
    "i8": ("I8", "int8"),
    "i16": ("I16", "int16"),
    "i32": ("I32", "int32"),
    "i64": ("I64", "int64"),
    "u8": ("U8", "uint8"),
    "u16": ("U16", "uint16"),
    "u32": ("U32", "uint32"),
    "u64": ("U64", "uint64"),
    "bool": ("BOOL", "bool"),
}
"""Code to the name in a header, and the one that the package is given."""

_CODES: Final = {in_header: code for code, (in_header, _) in _NAMES.items()}

_LONGEST_HEADER: Final = 100_000_000


class File(NamedTuple):
    """A mapped file: the tensors, which stay valid as long as it is held, and the annotations."""

    path: Path
    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]


def write(path: str | os.PathLike[str], tensors: Mapping[str, TensorSpec], **metadata: str) -> None:
    """Write tensors to a file; whatever happens, there is the old file or the whole new one.

    Parameters
    ----------
    path : path
        Its folder must exist.
    tensors : mapping of str to TensorSpec
        In memory of the CPU, row-major without gaps.
    **metadata : str
        Annotations.

    Raises
    ------
    CheckpointError
        If the safetensors package is missing, or a tensor is not as it must be.
    OSError
        If the file cannot be written.
    """
    try:
        import safetensors
    except ImportError:
        raise CheckpointError(
            "snapshots are safetensors files: pip install safetensors (or fastema[posthoc])"
        ) from None
    entries: dict[str, Any] = {}
    for name, spec in tensors.items():
        if spec.dtype not in _NAMES:
            raise CheckpointError(f"{name}: safetensors has no dtype for {spec}")
        if spec.device != "cpu" or spec.strides != row_major(spec.shape):
            raise CheckpointError(f"{name}: {spec} is not row-major memory of the CPU")
        entries[name] = safetensors.TensorSpec(
            dtype=_NAMES[spec.dtype][1],
            shape=list(spec.shape),
            data_ptr=spec.address,
            data_len=spec.nbytes,
        )
    final = Path(path)
    handle, partial = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent)
    os.close(handle)
    try:
        safetensors.serialize_file(entries, partial, dict(metadata))
        _settle(partial)
        os.replace(partial, final)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    with suppress(OSError):  # not every system lets a folder be synchronised
        _settle(final.parent)


def _settle(path: str | os.PathLike[str]) -> None:
    """Have the system put what was written on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: str | os.PathLike[str]) -> File:
    """Map a file into memory: nothing is read before it is used.

    Raises
    ------
    CheckpointError
        If it is no safetensors file, or cut short.
    OSError
        If it cannot be opened.
    """
    name = Path(path)
    with name.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{name} is not a safetensors file, or was cut short")
        try:
            header = json.loads(opened.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            whole = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            data = np.frombuffer(whole, np.uint8)
            tensors = {key: _spec(data, 8 + length, entry) for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{name} is not a safetensors file: {error}") from None
    return File(name, tensors, metadata)


def _spec(data: np.ndarray[Any, np.dtype[np.uint8]], start: int, entry: Any) -> TensorSpec:
    shape = tuple(int(extent) for extent in entry["shape"])
    first, end = (start + int(offset) for offset in entry["data_offsets"])
    spec = TensorSpec(
        address=data.ctypes.data + first,
        shape=shape,
        strides=row_major(shape),
        dtype=_CODES[entry["dtype"]],
        device="cpu",
        writable=False,
        owner=data,
    )
    if not start <= first <= end <= len(data) or end - first != spec.nbytes:
        raise ValueError("a tensor lies outside the file; it was cut short")
    return spec
