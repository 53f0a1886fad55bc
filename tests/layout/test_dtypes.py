from __future__ import annotations

import numpy as np
import pytest

from fastema.errors import DTypeError
from fastema.kernels.formats import FORMATS
from fastema.layout.dtypes import DTYPES, average_of, dtype, parse, raw

from ..support import reference

LONG = {
    "float64": "f64",
    "double": "f64",
    "float32": "f32",
    "float": "f32",
    "float16": "f16",
    "half": "f16",
    "bfloat16": "bf16",
    "complex64": "c64",
    "complex128": "c128",
}


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_has_its_kernel_formats(code: str) -> None:
    kind = dtype(code)
    assert kind.code == code
    assert FORMATS[raw(kind)].itemsize * kind.parts == kind.itemsize
    if kind.real is not None:
        assert FORMATS[kind.real].itemsize * kind.parts == kind.itemsize
        assert reference.real_of(code) == kind.real
        assert np.dtype(reference.FLOATS[kind.real].storage).itemsize * kind.parts == kind.itemsize


@pytest.mark.parametrize(("name", "code"), list(LONG.items()))
def test_long_names(name: str, code: str) -> None:
    assert parse(name) is DTYPES[code]
    assert parse(code) is DTYPES[code]


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    for name in ("float8", "", "F32", "int"):
        with pytest.raises(DTypeError, match=r"f64.*bool"):
            parse(name)


@pytest.mark.parametrize(
    ("weights", "wanted", "average"),
    [
        ("bf16", None, "bf16"),
        ("bf16", "f32", "f32"),
        ("f64", "f16", "f16"),
        ("c64", None, "c64"),
        ("c64", "f64", "c128"),
        ("c128", "f32", "c64"),
        ("c64", "c128", "c128"),
        ("i64", None, "i64"),
    ],
)
def test_dtype_of_an_average(weights: str, wanted: str | None, average: str) -> None:
    chosen = None if wanted is None else dtype(wanted)
    assert average_of(dtype(weights), chosen) == dtype(average)


@pytest.mark.parametrize(
    ("weights", "wanted"), [("f32", "i32"), ("f32", "c64"), ("c64", "f16"), ("c128", "bf16")]
)
def test_dtypes_that_cannot_hold_an_average(weights: str, wanted: str) -> None:
    with pytest.raises(DTypeError, match=wanted):
        average_of(dtype(weights), dtype(wanted))
