"""The dtypes that fastema supports, by code, and their formats in kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from fastema.errors import DTypeError

__all__ = [
    "DTYPES",
    "NAMES",
    "NAME_OF",
    "DType",
    "average_of",
    "describe_names",
    "dtype",
    "parse_dtype",
    "raw",
]


class DType(NamedTuple):
    """A dtype: its code, bytes per element, and how kernels treat it.

    An element consists of ``parts`` floats of the format ``real``, which is None if the dtype is
    not averaged but copied bit for bit. ``whole`` is True for integers and booleans. ``random`` is
    True if averages can be rounded stochastically: there is a kernel format ``code~``.
    """

    code: str
    itemsize: int
    real: str | None
    parts: int = 1
    whole: bool = False
    random: bool = False


_FLOATS: Final = (
    DType("f64", 8, "f64"),
    DType("f32", 4, "f32"),
    DType("f16", 2, "f16", random=True),
    DType("bf16", 2, "bf16", random=True),
    DType("c64", 8, "f32", parts=2),
    DType("c128", 16, "f64", parts=2),
)
_EXACT: Final = (
    *(DType(f"i{8 * size}", size, None, whole=True) for size in (1, 2, 4, 8)),
    *(DType(f"u{8 * size}", size, None, whole=True) for size in (1, 2, 4, 8)),
    DType("bool", 1, None, whole=True),
)
_SMALL: Final = {
    **{f"f8{kind}": f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")},
    "f8e8m0fnu": "float8_e8m0fnu",
    "f4e2m1fnx2": "float4_e2m1fn_x2",  # an element is two numbers
}
"""One-byte floats, which are only copied, and their names in PyTorch."""

DTYPES: Final = {
    one.code: one for one in (*_FLOATS, *_EXACT, *(DType(code, 1, None) for code in _SMALL))
}
"""DType by code."""


NAMES: Final = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "complex64": "c64",
    "complex128": "c128",
    "bool": "bool",
    **{f"int{n}": f"i{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"u{n}" for n in (8, 16, 32, 64)},
}
"""Code by the name of the dtype in frameworks."""

NAME_OF: Final = {**{code: name for name, code in NAMES.items()}, **_SMALL}
"""Framework name by code, including the one-byte floats that only PyTorch has."""

_SHORT: Final = {
    "fp64": "f64",
    "double": "f64",
    "fp32": "f32",
    "float": "f32",
    "fp16": "f16",
    "half": "f16",
}
"""Code by further names in common use."""

_COMPLEX: Final = {"f32": "c64", "f64": "c128"}


def parse_dtype(name: str) -> DType:
    """Return the DType of a name such as ``"bfloat16"``, ``"fp32"``, ``"torch.half"`` or a code.

    Raises
    ------
    DTypeError
        Listing the accepted names.
    """
    plain = name.strip().lower().removeprefix("torch.")
    code = {**NAMES, **_SHORT}.get(plain, plain)
    if code not in DTYPES:
        raise DTypeError(f"unknown dtype {name!r}; expected {describe_names()}")
    return DTYPES[code]


def describe_names(codes: Iterable[str] = tuple(NAMES.values())) -> str:
    """Return the accepted names of these dtypes, for a message: each name and its short forms."""
    lines = []
    for code in codes:
        short = [name for name, its in _SHORT.items() if its == code]
        others = [one for one in (code, *short) if one != NAME_OF[code]]
        lines.append(NAME_OF[code] + (f" ({', '.join(others)})" if others else ""))
    return ", ".join(lines[:-1]) + " or " + lines[-1]


def average_of(weights: DType, wanted: DType | None) -> DType:
    """Return the dtype of an average: ``wanted``, or its complex form for complex weights.

    None means the weights' own dtype. Raises a DTypeError if such an average cannot hold them.
    """
    if wanted is None or wanted == weights:
        return weights
    if wanted.real is None:
        raise DTypeError(f"an average cannot be {wanted.code}; expected a float dtype")
    if weights.parts == wanted.parts:
        return wanted
    if weights.parts == 2 and wanted.code in _COMPLEX:
        return DTYPES[_COMPLEX[wanted.code]]
    raise DTypeError(f"an average of {weights.code} weights cannot be {wanted.code}")


def dtype(code: str) -> DType:
    """Return the DType of a code such as ``"bf16"``; raise a DTypeError if it is unknown."""
    try:
        return DTYPES[code]
    except KeyError:
        raise DTypeError(f"unknown dtype {code!r}; known dtypes: {', '.join(DTYPES)}") from None


def raw(one: DType) -> str:
    """Return the kernel format that copies a dtype's bits unchanged."""
    return f"raw{one.itemsize // one.parts}"
