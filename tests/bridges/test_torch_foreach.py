"""Averages and random rounding by PyTorch's functions, for GPUs without our kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.bridges import torch_foreach as foreach
from fastema.layout.dtypes import DTYPES

from ..support import reference
from ..support.arrays import numbers
from ..support.tolerance import exact_lerp, lerp_bound, unit_roundoff
from .foreach_runs import (
    PAIR_IDS,
    PAIRS,
    REAL,
    SPLIT,
    STEPS,
    Array,
    assert_lerped,
    assert_same_bits,
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


@pytest.mark.parametrize(("dst", "src"), PAIRS, ids=PAIR_IDS)
def test_average_of_every_pair_of_floats(dst: str, src: str) -> None:
    sides = with_specials(numbers(1500, dst, 1), numbers(1500, src, 2), dst, src)
    for w in WEIGHTS:
        for form in ("", dst) if DTYPES[dst].parts == 1 else ("",):
            pair = pair_of(tensor(sides[0], dst), tensor(sides[1], src), form=form)
            (other,) = run_both("lerp", [pair], (w,))
            got, theirs = stored(pair.dst.owner), stored(other.dst.owner)
            assert_lerped(got, *sides, w, dst, src, theirs)
            if w == 0:
                np.testing.assert_array_equal(values_of(got, dst), values_of(theirs, dst))
            if dst in STEPS:
                assert np.mean(got[:1500] == theirs[:1500]) > 0.99
            np.testing.assert_array_equal(words(pair.src.owner), words(other.src.owner))


@pytest.mark.parametrize("src", REAL)
def test_average_in_two_halves(src: str) -> None:
    avg, x = with_specials(numbers(1500, "f32", 1), numbers(1500, src, 2), "f32", src)
    for w in WEIGHTS:
        pair = split_pair(avg, tensor(x, src))
        (other,) = run_both("lerp", [pair], (w,))
        assert_lerped(joined(pair), avg, x, w, "f32", src, joined(other))


def test_averages_updated_together() -> None:
    weights = (0.5, 0.125, 1.0)
    pairs = []
    for i, (size, code) in enumerate([(700, "f32"), (900, "bf16"), (1, "f32"), (1000, "f32")]):
        x = tensor(numbers(size, code, i), code)
        for index in range(3):
            avg = tensor(numbers(size, "f32", 10 * i + index), "f32")
            pairs.append(pair_of(avg, x, f"t{i}", average_index=index))
    others = run_both("lerp", pairs, weights)
    for pair, other in zip(pairs, others, strict=True):
        torch.testing.assert_close(pair.dst.owner, other.dst.owner, rtol=1e-6, atol=1e-6)
        if pair.average_index == 2:
            assert torch.equal(pair.dst.owner, pair.src.owner.to(torch.float32))


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


def test_rounding_is_unbiased_from_step_to_step() -> None:
    size, steps = 3000, 100
    values = np.random.default_rng(3).uniform(1, 2, size).astype(np.float32).astype(np.float64)
    _, high, share = neighbours(values, "bf16")
    chosen = (share > 0.1) & (share < 0.9)
    ups = sum(
        (rounded(values, "bf16", "f32", 1, step) == high).astype(int) for step in range(steps)
    )
    z = ((ups - steps * share) / np.sqrt(steps * share * (1 - share) + (share == 0)))[chosen]
    assert abs(z.sum()) / np.sqrt(len(z)) < 5
    # The squares of independent ones have mean 1 and variance 2.
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / len(z))


@pytest.mark.parametrize("code", STEPS)
def test_rounding_of_special_numbers(code: str) -> None:
    form = reference.FLOATS[code]
    f32 = reference.FLOATS["f32"].largest
    values = np.array([0.0, np.inf, form.largest, form.smallest, 2.0**form.lowest, 1.0])
    values = np.concatenate([values, -values])
    fixed = np.repeat(values, 50)
    np.testing.assert_array_equal(rounded(fixed, code), fixed)
    assert np.array_equal(np.signbit(rounded(fixed, code)), np.signbit(fixed))
    largest = np.repeat([f32, -f32, form.largest * (1 + 2.0**-20)], 200)
    with np.errstate(over="ignore"):
        got = rounded(largest.astype(np.float32).astype(float), code)
    if code == "bf16":  # a finite number stays finite
        assert np.isfinite(got).all()
    else:  # beyond the largest one, to nearest
        want = np.repeat([np.inf, -np.inf, form.largest], 200)
        np.testing.assert_array_equal(got, want)
    bits = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    x = torch.from_numpy(np.repeat(bits, 99).view(np.float32))
    avg = torch.zeros(len(x), dtype=bridge.native(code))
    run("lerp", [pair_of(avg, x, form=f"{code}~")], (1.0,))
    assert avg.isnan().all()


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


def test_random_bits_belong_to_seed_step_tensor_and_place() -> None:
    before, x = numbers(5000, "bf16", 1), numbers(5000, "f32", 2)
    others = [(numbers(700, "bf16", 3), numbers(700, "f32", 4))] * 2

    def result(
        seed: int = 5, step: int = 9, name: str = "t", index: int = 0, among: bool = False
    ) -> Array:
        avg = tensor(before, "bf16")
        pairs = [pair_of(avg, tensor(x, "f32"), name, form="bf16~", average_index=index)]
        if among:
            around = [
                pair_of(
                    tensor(a, "bf16"), tensor(b, "f32"), f"o{i}", form="bf16~", average_index=index
                )
                for i, (a, b) in enumerate(others)
            ]
            pairs = [around[0], *pairs, around[1]]
        run("lerp", pairs, (0.3, 0.3), seed, step)
        return stored(avg)

    want = result()
    np.testing.assert_array_equal(result(), want)
    np.testing.assert_array_equal(result(among=True), want)
    changed = [result(seed=6), result(step=10), result(name="u"), result(index=1)]
    changed += [result(seed=5 + 2**40), result(step=9 + 2**32)]
    assert all(0.2 < np.mean(one != want) < 0.5 for one in changed)
    assert all(0.2 < np.mean(a != b) < 0.5 for a, b in pairwise(changed))


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


@pytest.mark.parametrize("operation", ["copy", "cast_back", "swap"])
def test_copies_are_rounded_to_nearest(operation: str) -> None:
    pair = pair_of(tensor(numbers(3000, "bf16"), "bf16"), tensor(numbers(3000, "f32"), "f32"))
    assert_same_bits([pair], run_both(operation, [pair._replace(form="bf16~")]))
