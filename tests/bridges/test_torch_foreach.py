"""Averages and random rounding by PyTorch's functions, for GPUs without our kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.bridges import torch_foreach as foreach

from ..support import reference
from ..support.arrays import numbers
from ..support.tolerance import exact_lerp, lerp_bound, unit_roundoff
from .foreach_runs import (
    REAL,
    SPLIT,
    STEPS,
    Array,
    assert_lerped,
    joined,
    pair_of,
    run,
    run_both,
    run_kernels,
    split_pair,
    stored,
    tensor,
    values_of,
    with_specials,
    words,
)

pytestmark = pytest.mark.torch


# -- averages --------------------------------------------------------------------------------------

WEIGHTS = [0.0, 2.0**-10, 0.3, 0.5, 0.77, 1 - 2.0**-30, 1.0]


@pytest.mark.parametrize("src", REAL)
def test_average_in_two_halves(src: str) -> None:
    avg, x = with_specials(numbers(1500, "f32", 1), numbers(1500, src, 2), "f32", src)
    for w in WEIGHTS:
        pair = split_pair(avg, tensor(x, src))
        (other,) = run_both("lerp", [pair], (w,))
        assert_lerped(joined(pair), avg, x, w, "f32", src, joined(other))


@pytest.mark.parametrize(
    ("dst", "src"),
    [
        *(("f64", "bf16"), ("f64", "f64"), ("f32", "f32"), ("f32", "f16"), ("bf16", "bf16")),
        *(("c128", "c64"), (SPLIT, "f32")),
    ],
)
def test_terms_of_a_weighted_sum(dst: str, src: str) -> None:
    coefficients = (0.3, -1.7, 0.9)
    terms = [tensor(numbers(3000, src, i), src) for i in range(3)]
    begin = numbers(3000, "f32" if dst == SPLIT else dst, 9)
    if dst == SPLIT:
        first = split_pair(begin, terms[0])
        pairs = [
            first._replace(src=bridge.describe(x), average_index=i) for i, x in enumerate(terms)
        ]
    else:
        total = tensor(begin, dst)
        pairs = [pair_of(total, x, average_index=i) for i, x in enumerate(terms)]
    run("add", pairs, coefficients)
    code = "bf16" if dst == SPLIT else dst
    got = joined(pairs[0]) if dst == SPLIT else stored(pairs[0].dst.owner)
    got = values_of(got, "f32" if dst == SPLIT else dst)
    want = sizes = values_of(begin, "f32" if dst == SPLIT else dst)
    sizes = np.abs(sizes)
    for w, x in zip(coefficients, terms, strict=True):
        want = want + w * values_of(stored(x), src)
        sizes = sizes + np.abs(w * values_of(stored(x), src))
    u = unit_roundoff("f32") if dst == SPLIT else unit_roundoff(reference.real_of(code))
    assert np.all(np.abs(got - want) <= 8 * u * sizes)
    assert np.abs(got - want).max() < np.abs(want).max() / 50


# -- stochastic rounding ---------------------------------------------------------------------------


def neighbours(values: Array, code: str) -> tuple[Array, Array, Array]:
    """The two numbers of a format around values, and how far along the way a value is."""
    ends = [
        reference.decode(reference.encode_random(values, np.full(values.shape, word), code), code)
        for word in (0, 0xFFFF)
    ]
    with np.errstate(invalid="ignore"):
        gap = ends[1] - ends[0]
        share = np.where(gap == 0, 0, (values - ends[0]) / np.where(gap == 0, 1, gap))
    return ends[0], ends[1], share


def rounded(values: Array, code: str, src: str = "f32", *settings: int, name: str = "t") -> Array:
    """Values rounded by random bits: an average of weight 1."""
    x = tensor(reference.encode(values, src), src)
    avg = torch.full((len(values),), 3.0, dtype=bridge.native(code))
    run("lerp", [pair_of(avg, x, name, form=f"{code}~")], (1.0,), *settings)
    return reference.decode(stored(avg), code)


RANGES = {"usual": 2.0**-8, "small": 2.0**-17, "tiny": 2.0**-24}


@pytest.mark.parametrize("src", ["f32", "f64"])
@pytest.mark.parametrize("code", STEPS)
@pytest.mark.parametrize("scale", RANGES)
def test_rounding_is_unbiased(code: str, src: str, scale: str) -> None:
    generator = np.random.default_rng(len(code) + len(src))
    size = 200_000
    values = generator.normal(size=size) * RANGES[scale] * 2.0 ** generator.integers(-3, 3, size)
    values = reference.decode(reference.encode(values, src), src)
    got = rounded(values, code, src, 5, 7)
    low, high, share = neighbours(values, code)
    assert np.all((got == low) | (got == high))
    up = (got == high) & (low != high)
    assert (low != high).mean() > 0.9
    for part in range(8):
        chosen = (low != high) & (np.floor(share * 8) == part)
        if chosen.sum() > 500:
            p = share[chosen]
            z = (up[chosen] - p).sum() / np.sqrt((p * (1 - p)).sum())
            assert abs(z) < 5, (part, z)


@pytest.mark.parametrize("src", REAL)
@pytest.mark.parametrize("code", STEPS)
def test_average_rounded_by_random_bits(code: str, src: str) -> None:
    before, x = numbers(20_000, code, 1), numbers(20_000, src, 2)
    for w in (0.01, 0.3, 0.8):
        avg = tensor(before, code)
        run("lerp", [pair_of(avg, tensor(x, src), form=f"{code}~")], (w,), 1, 2)
        exact = exact_lerp(before, x, w, code, src)
        low, high, share = neighbours(exact.astype(float), code)
        got = reference.decode(stored(avg), code)
        among = (got == low) | (got == high)
        assert among.mean() > 0.99
        # Of the others the value before it was rounded was on the other side of a number.
        bound = 2 * lerp_bound(before, x, w, code, src)
        assert np.all(np.abs(got - exact) <= bound)
        inner = among & (low != high) & (share > 0.01) & (share < 0.99)
        z = ((got == high) - share)[inner].sum() / np.sqrt((share * (1 - share))[inner].sum())
        assert abs(z) < 5


# A part of a whole tensor, whose indices may pass a multiple of 2**32: whole and offset.
WHOLES = {
    "whole": (None, None),
    "part": ((40, 9, 60), (3, 2, 5)),
    "far on": ((2**20, 2**10, 2**10), (2**19, 7, 0)),
    "over the border": ((1000, 5000, 1001), (855, 673, 600)),
}


@pytest.mark.parametrize("whole", WHOLES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize(("code", "src"), [("bf16", "f32"), ("f16", "f64")])
def test_random_bits_are_the_kernels(
    code: str,
    src: str,
    order: tuple[int, ...],
    whole: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(foreach, "AT_ONCE", 999)
    shape = (11, 6, 35)
    sides = [
        tensor(numbers(11 * 6 * 35, one, i).reshape([shape[axis] for axis in order]), one)
        for i, one in enumerate((code, src))
    ]
    to, of = (one.permute(*np.argsort(order)) for one in sides)
    pair = pair_of(to, of, form=f"{code}~")
    pair = pair._replace(src=replace(pair.src, whole=WHOLES[whole][0], offset=WHOLES[whole][1]))
    again = to.clone()
    other = pair._replace(dst=replace(pair.dst, address=again.data_ptr(), owner=again))
    # At weight 1 nothing is rounded before.
    for operation in ("lerp", "lerp_measured"):
        run(operation, [pair], (1.0,), 2**40 + 3, 2**33 + 7)
        run_kernels(operation, [other], (1.0,), 2**40 + 3, 2**33 + 7)
        assert torch.equal(words(to), words(again))
