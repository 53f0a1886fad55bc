"""PyTorch's functions in place of kernels, for GPUs without ours: against the kernels of the CPU.

Averages, random rounding, copies, measures and windowed means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.bridges import torch_foreach as foreach
from fastema.kernels.table import DISTANCE, MEASURES, SQUARE, STILL
from fastema.layout.group import Pair

from ..support import reference
from ..support.arrays import assert_same, numbers
from ..support.tolerance import cast_bound, exact_lerp, lerp_bound, unit_roundoff
from .foreach_runs import (
    COMPLEX,
    PAIRS,
    REAL,
    SPLIT,
    WINDOWS,
    Array,
    assert_lerped,
    assert_same_bits,
    average_of,
    average_pair,
    kept_as,
    pair_of,
    run,
    run_both,
    run_kernels,
    stored,
    tensor,
    twin,
    values_of,
    window_pair,
    with_specials,
    words,
)

pytestmark = pytest.mark.torch

# -- averages --------------------------------------------------------------------------------------

WEIGHTS = [0.0, 2.0**-10, 0.3, 0.77, 1 - 2.0**-30, 1.0]


@pytest.mark.parametrize(("dst", "src"), [*PAIRS, *((SPLIT, src) for src in REAL)])
def test_average_of_every_pair_of_floats(dst: str, src: str) -> None:
    code = kept_as(dst)
    avg, x = with_specials(numbers(1500, code, 1), numbers(1500, src, 2), code, src)
    for w in WEIGHTS:
        pair = average_pair(dst, avg, tensor(x, src))
        (other,) = run_both("lerp", [pair], (w,))
        assert_lerped(average_of(pair), avg, x, w, code, src, average_of(other))


@pytest.mark.parametrize(
    ("dst", "src"),
    [("f64", "bf16"), ("f32", "f32"), ("bf16", "bf16"), ("c128", "c64"), (SPLIT, "f32")],
)
def test_terms_of_a_weighted_sum(dst: str, src: str) -> None:
    coefficients = (0.3, -1.7, 0.9)
    terms = [tensor(numbers(3000, src, i), src) for i in range(3)]
    code = kept_as(dst)
    begin = numbers(3000, code, 9)
    first = average_pair(dst, begin, terms[0])
    pairs = [first._replace(src=bridge.describe(x), average_index=i) for i, x in enumerate(terms)]
    run("add", pairs, coefficients)
    got = values_of(average_of(first), code)
    parts = [w * values_of(stored(x), src) for w, x in zip(coefficients, terms, strict=True)]
    parts.append(values_of(begin, code))
    want, sizes = np.sum(parts, axis=0), np.abs(parts).sum(axis=0)
    assert np.all(np.abs(got - want) <= 8 * unit_roundoff(reference.real_of(code)) * sizes)


# -- stochastic rounding ---------------------------------------------------------------------------


@pytest.mark.parametrize("src", REAL)
@pytest.mark.parametrize("code", ["f16", "bf16"])
def test_average_rounded_by_random_bits(code: str, src: str) -> None:
    before, x = numbers(20_000, code, 1), numbers(20_000, src, 2)
    for w in (0.01, 0.3, 0.8):
        pair = average_pair(f"{code}~", before, tensor(x, src))
        run("lerp", [pair], (w,), 1, 2)
        exact = exact_lerp(before, x, w, code, src)
        low, high = (
            reference.decode(
                reference.encode_random(exact.astype(float), np.full(exact.shape, word), code), code
            )
            for word in (0, 0xFFFF)
        )
        share = (exact.astype(float) - low) / np.where(high == low, 1, high - low)
        got = reference.decode(average_of(pair), code)
        among = (got == low) | (got == high)
        assert among.mean() > 0.99
        # Of the others the value before it was rounded was on the other side of a number.
        assert np.all(np.abs(got - exact) <= 2 * lerp_bound(before, x, w, code, src))
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


@pytest.mark.parametrize("place", WHOLES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize(("code", "src"), [("bf16", "f32"), ("f16", "f64")])
def test_random_bits_are_the_kernels(
    code: str, src: str, order: tuple[int, ...], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach, "AT_ONCE", 999)
    shape = (11, 6, 35)
    avg, x = (numbers(11 * 6 * 35, one, i) for i, one in enumerate((code, src)))
    x[::3] *= 2.0**-20 if code == "f16" else 2.0**-130  # subnormal ones
    x[:4] = [np.inf, -np.inf, 3e38, -3e38]
    sides = [
        tensor(one.reshape([shape[axis] for axis in order]), its).permute(*np.argsort(order))
        for one, its in ((avg, code), (x, src))
    ]
    again = sides[0].clone()
    whole, offset = WHOLES[place]
    pair = pair_of(*sides, form=f"{code}~")
    pair = pair._replace(src=replace(pair.src, whole=whole, offset=offset))
    other = pair._replace(dst=replace(pair.dst, address=again.data_ptr(), owner=again))
    # At weight 1 nothing is rounded before.
    for operation in ("lerp", "lerp_measured"):
        run(operation, [pair], (1.0,), 2**40 + 3, 2**33 + 7)
        run_kernels(operation, [other], (1.0,), 2**40 + 3, 2**33 + 7)
        assert torch.equal(words(sides[0]), words(again))


# -- copies ----------------------------------------------------------------------------------------


def halfway(code: str, size: int = 1000) -> Array:
    """Float64 numbers around the middle between two 16-bit ones, where two roundings go wrong."""
    bits = np.random.default_rng(1).integers(0x0400, 0x7400, size).astype(np.uint16)
    form = reference.FLOATS[code].storage
    ends = [reference.decode((bits + i).astype(np.uint16).view(form), code) for i in (0, 1)]
    middle = (ends[0] + ends[1]) / 2
    return np.concatenate([middle, *(middle * (1 + s * 2.0**-40) for s in (1, -1))])


@pytest.mark.parametrize("operation", ["copy", "cast_back", "swap"])
@pytest.mark.parametrize(("dst", "src"), PAIRS)
def test_copies_of_every_pair_of_floats(dst: str, src: str, operation: str) -> None:
    avg, x = (numbers(3000, code, i, "bits") for i, code in enumerate((dst, src)))
    avg, x = with_specials(avg, x, dst, src)
    for code, other, array in ((src, dst, x), (dst, src, avg)):
        if code == "f64" and other in ("f16", "bf16"):
            array[:3000] = halfway(other)
    pair = pair_of(tensor(avg, dst), tensor(x, src))
    run(operation, [pair])
    there, back = reference.cast(x, src, dst), reference.cast(avg, dst, src)
    assert_same(stored(pair.dst.owner), avg if operation == "cast_back" else there, dst)
    assert_same(stored(pair.src.owner), x if operation == "copy" else back, src)


@pytest.mark.parametrize("operation", ["copy", "cast_back", "swap"])
@pytest.mark.parametrize("src", REAL)
def test_copies_of_an_average_in_two_halves(src: str, operation: str) -> None:
    ties = ((np.arange(1 << 16) << 16) | 0x8000).astype(np.uint32).view(np.float32)
    avg = np.concatenate([numbers(3000, "f32", 1, "bits"), ties])
    other_ties = reference.cast(ties[::-1].copy(), "f32", src)
    x = np.concatenate([numbers(3000, src, 2, "bits"), other_ties])
    pair = average_pair(SPLIT, avg, tensor(x, src))
    (other,) = run_both(operation, [pair])
    assert_same(average_of(pair), average_of(other), "f32")
    assert_same(stored(pair.src.owner), stored(other.src.owner), src)
    if src == "f32":  # what is converted has other bits where it is not a number
        assert_same_bits([pair], [other])
        assert_same(average_of(pair), avg if operation == "cast_back" else x, "f32")
        assert_same(stored(pair.src.owner), x if operation == "copy" else avg, "f32")


# -- measures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dst", "src"),
    [
        *(("f32", "f32"), ("f32", "bf16"), ("f64", "f32"), ("bf16~", "bf16")),
        *(("f16~", "f32"), (SPLIT, "f32"), (SPLIT, "bf16"), ("c64", "c64")),
    ],
)
def test_measures_of_each_pair(dst: str, src: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "AT_ONCE", 999)
    code, sizes = kept_as(dst), [1, 5000, 0, 37, 4000]
    averages = [numbers(size, code, 50 + i) for i, size in enumerate(sizes)]
    pairs = [
        average_pair(dst, avg, tensor(numbers(len(avg), src, i), src), f"t{i}", average_index=i % 2)
        for i, avg in enumerate(averages)
    ]
    others, plain = twin(pairs), twin(pairs)
    weights, settings = (0.0, 2.0**-6), (3, 4)
    found = run("lerp_measured", pairs, weights, *settings)
    run("lerp", plain, weights, *settings)
    assert_same_bits(pairs, plain)
    assert found.shape == (5, MEASURES)
    assert found.dtype == np.float64
    slack = 8 * unit_roundoff("f64" if "f64" in (dst, src) else "f32")
    for row, (pair, avg) in enumerate(zip(pairs, averages, strict=True)):
        new, old = values_of(average_of(pair), code), values_of(avg, code)
        distance = values_of(stored(pair.src.owner), src) - new
        want = [np.square(distance).sum(), np.square(new).sum()]
        np.testing.assert_allclose(found[row, [DISTANCE, SQUARE]], want, rtol=slack)
        assert found[row, STILL] == (new == old).sum()
    program = run_kernels("lerp_measured", others, weights, *settings)
    for index in (0, 1):
        measured = program.measured(index)
        sums = found[[i for i, pair in enumerate(pairs) if pair.average_index == index]].sum(axis=0)
        np.testing.assert_allclose(np.sqrt(sums[:2]), measured[:2], rtol=1e-3)
        assert abs(sums[STILL] - measured.still) <= 0.01 * sum(sizes)


@pytest.mark.parametrize("src", [*REAL, *COMPLEX])
def test_number_of_elements_that_are_not_finite(src: str) -> None:
    wide = src if src in COMPLEX else "f32"
    arrays = [with_specials(*[numbers(n, src, n, "bits")] * 2, src, src)[0] for n in (900, 5)]
    arrays += [numbers(n, src, n) for n in (0, 900, 7)]
    pairs = [
        pair_of(torch.zeros(len(x), dtype=bridge.native(wide)), tensor(x, src)) for x in arrays
    ]
    before = twin(pairs)
    with np.errstate(invalid="ignore"):
        bad = [(~np.isfinite(values_of(x, src))).sum() for x in arrays]
    np.testing.assert_array_equal(run("finite", pairs)[:, DISTANCE], bad)
    assert np.all(np.array(bad[:2]) > 20)
    assert not any(bad[2:])
    assert_same_bits(pairs, before)
    # Both sides the same tensor, as a guard has them.
    same = [pair_of(pair.src.owner, pair.src.owner) for pair in pairs]
    np.testing.assert_array_equal(run("finite", same)[:, DISTANCE], bad)


# -- windowed means --------------------------------------------------------------------------------


def assert_window(pair: Pair, formats: tuple[str, ...], seen: list[Array], window: int) -> None:
    """The mean is that of the ring, as near as the kernels promise; the ring holds the values."""
    code, src, ring, rest = (code.strip("~") for code in formats)
    want = reference.windowed_mean(np.array(seen[-window:]), window)
    mean = values_of(stored(pair.dst.owner), code)
    residual = values_of(stored(pair.residual.owner), rest)
    wide = "f64" in map(reference.real_of, (code, src))
    u = unit_roundoff("f64" if wide else "f32")
    largest = np.abs(np.array(seen[-2 * window :])).max()
    once = cast_bound(np.abs(want).astype(float), code) * (2 if "~" in formats[0] else 1)
    slack = 8 * window * u * u * largest + 2 * window * unit_roundoff(rest) * once.max()
    slack += 2.0**-62 * window * largest
    assert np.abs(mean + residual.astype(np.longdouble) - want).max() <= slack
    assert np.all(np.abs(mean - want) <= once * (1 + 1e-3) + slack)
    slots = stored(pair.ring[0].owner)
    for age, values in enumerate(reversed(seen[-window:])):
        slot = (len(seen) - 1 - age) % window
        np.testing.assert_array_equal(values_of(slots[slot], ring), values)


# Which of both makes each update: the substitute alone, or in turn with the kernels.
RUNNERS: dict[str, Callable[[int], Callable[..., Any]]] = {
    "substitute": lambda turn: run,
    "kernels first": lambda turn: (run, run_kernels)[(turn + 2) // 3 % 2],
    "substitute first": lambda turn: (run, run_kernels)[(turn - 1) // 3 % 2],
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("formats", WINDOWS, ids="-".join)
def test_mean_of_what_is_in_the_ring(formats: tuple[str, ...], window: int, runner: str) -> None:
    _, src, ring, _ = formats
    pair = window_pair(formats, 500, window)
    seen: list[Array] = []
    for turn in range(1, 2 * window + 10):
        x = numbers(500, src, turn)
        seen.append(values_of(reference.cast(x, src, ring), ring))
        pair.src.owner.copy_(tensor(x, src))
        moment = ((float(min(turn, window)),), 1, turn, window, (turn - 1) % window, turn)
        RUNNERS[runner](turn)("window", [pair], *moment)
        assert_window(pair, formats, seen, window)
