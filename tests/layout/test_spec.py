"""Descriptions of dtypes and tensors."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastema
from fastema import posthoc
from fastema.errors import DTypeError
from fastema.kernels import variants
from fastema.kernels.formats import FORMATS
from fastema.layout.dtypes import DTYPES, average_of, dtype, parse_dtype
from fastema.layout.flat import ALIGNMENT, compute_offsets
from fastema.layout.spec import TensorSpec

from ..support import arrays, reference


def spec(shape: tuple[int, ...], strides: tuple[int, ...], code: str = "f32") -> TensorSpec:
    return TensorSpec(1 << 20, shape, strides, code, "cpu")


AXES = st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=4)


@given(AXES, st.sampled_from(["f32", "bf16", "c128", "bool"]))
def test_a_span_covers_every_element_and_dense_means_no_gaps(
    axes: list[tuple[int, int]], code: str
) -> None:
    one = spec(tuple(n for n, _ in axes), tuple(s for _, s in axes), code)
    size, indices = one.kind.itemsize, product(*(range(n) for n in one.shape))
    found = sorted(
        one.address + size * sum(i * s for i, s in zip(index, one.strides, strict=True))
        for index in indices
    )
    assert (one.size, one.nbytes) == (len(found), len(found) * size)
    first, after = one.span()
    if not found:
        assert first == after
        return
    assert (first, after) == (found[0], found[-1] + size)
    stretch = list(range(one.address, one.address + size * one.size, size))
    if one.dense:
        assert found == stretch
    elif all(stride >= 0 for _, stride in axes):
        assert found != stretch


@pytest.mark.parametrize(
    ("weights", "wanted", "average"),
    [
        *(("bf16", None, "bf16"), ("bf16", "f32", "f32"), ("f64", "f16", "f16")),
        *(("c64", None, "c64"), ("c64", "f64", "c128"), ("c128", "f32", "c64")),
        *(("c64", "c128", "c128"), ("i64", None, "i64")),
        *(("f32", "i32", None), ("f32", "c64", None), ("c64", "f16", None), ("c128", "bf16", None)),
    ],
)
def test_an_average_gets_the_requested_dtype_or_is_refused(
    weights: str, wanted: str | None, average: str | None
) -> None:
    chosen = None if wanted is None else dtype(wanted)
    if average is not None:
        assert average_of(dtype(weights), chosen) == dtype(average)
        return
    with pytest.raises(DTypeError, match=wanted):
        average_of(dtype(weights), chosen)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *(("fp32", "f32"), ("float", "f32"), ("float32", "f32"), ("torch.float32", "f32")),
        *(("F32", "f32"), ("fp16", "f16"), ("half", "f16"), ("torch.half", "f16")),
        *(("bfloat16", "bf16"), ("BF16", "bf16"), ("torch.bfloat16", "bf16")),
        *(("fp64", "f64"), ("double", "f64"), ("torch.float64", "f64"), ("int8", "i8")),
    ],
)
def test_dtype_goes_by_its_usual_names(name: str, code: str) -> None:
    assert parse_dtype(name) == dtype(code)


def test_average_and_to_take_short_names_and_text_of_torch() -> None:
    ema = fastema.EMA([np.ones(3)], shadow_dtype="torch.float32")
    assert ema.shadow["0"].dtype == np.float32
    assert ema.to("fp64").shadow["0"].dtype == np.float64
    assert ema.to("half").shadow["0"].dtype == np.float16


def test_unknown_dtype_is_refused_with_the_accepted_names() -> None:
    with pytest.raises(DTypeError, match=r"'fp8'; expected float64 \(f64, fp64, double\), float32"):
        fastema.EMA([np.ones(3)], shadow_dtype="fp8")


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
def test_random_formats_are_in_the_table_of_pytorch_functions() -> None:
    pytest.importorskip("torch")
    from fastema.bridges.torch_foreach import _STOCHASTIC

    random = {f"{one.code}~" for one in REALS if one.random}
    assert _STOCHASTIC.keys() == random, "_STOCHASTIC in torch_foreach.py"


def test_dtypes_with_a_stochastic_format_are_marked_random() -> None:
    """A dtype without the mark would round to nearest, and its averages could stand still."""
    formats = {name.removesuffix("~") for name in FORMATS if name.endswith("~")}
    assert {one.code for one in REALS if one.random} == formats
    assert {name.removesuffix("~") for name in variants.FORMS if name.endswith("~")} == formats


@given(st.lists(st.integers(0, 200)), st.sampled_from([1, 2, 4, 8, 16]))
def test_tensors_in_a_flat_buffer_are_aligned_and_disjoint(sizes: list[int], itemsize: int) -> None:
    length, offsets = compute_offsets(sizes, itemsize)
    assert all(offset * itemsize % ALIGNMENT == 0 for offset in offsets)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(end <= begin for end, begin in zip(ends, offsets[1:], strict=False))
    assert length >= max(ends, default=0)
    # Padding is less than a line per tensor.
    assert length - sum(sizes) <= len(sizes) * ALIGNMENT // itemsize
