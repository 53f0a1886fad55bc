"""A dtype that is averaged has a row in every table that goes by dtypes."""

from __future__ import annotations

import pytest

from fastema import posthoc
from fastema.kernels import variants
from fastema.kernels.formats import FORMATS
from fastema.layout.dtypes import DTYPES

from ..support import arrays, reference

REALS = [one for one in DTYPES.values() if one.real == one.code]

TABLES = {
    "FORMATS in kernels/formats.py": FORMATS,
    "FLOATS in kernels/variants.py": variants.FLOATS,
    "_NOISE in fastema/posthoc.py": posthoc._NOISE,
    "STORAGE in tests/support/arrays.py": arrays.STORAGE,
    "FLOATS in tests/support/reference.py": reference.FLOATS,
}


def test_averaged_dtypes_are_in_every_table() -> None:
    lacking = [
        f"{one.code} is not in {name}"
        for one in REALS
        for name in TABLES
        if one.code not in TABLES[name]
    ]
    assert not lacking


@pytest.mark.torch
def test_averaged_dtypes_are_in_the_table_of_pytorch_functions() -> None:
    pytest.importorskip("torch")
    from fastema.bridges.torch_foreach import _FORMS

    random = {f"{one.code}~" for one in REALS if one.random}
    assert _FORMS.keys() >= {one.code for one in REALS} | random, "_FORMS in torch_foreach.py"


def test_dtypes_are_rounded_at_random_where_there_is_a_format_for_it() -> None:
    """A dtype without the mark would be rounded to nearest, and a small average stand still."""
    formats = {name.removesuffix("~") for name in FORMATS if name.endswith("~")}
    assert {one.code for one in REALS if one.random} == formats
    assert {name.removesuffix("~") for name in variants.FORMS if name.endswith("~")} == formats
