"""Copies, measures and windowed means by PyTorch's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.kernels.table import DISTANCE, MEASURES, SQUARE, STILL
from fastema.layout.group import Pair

from ..support import reference
from ..support.arrays import assert_same, numbers
from ..support.tolerance import cast_bound, unit_roundoff
from .foreach_runs import (
    COMPLEX,
    PAIR_IDS,
    PAIRS,
    REAL,
    SPLIT,
    STEPS,
    WINDOWS,
    Array,
    assert_same_bits,
    joined,
    pair_of,
    run,
    run_both,
    run_kernels,
    split_pair,
    stored,
    tensor,
    twin,
    values_of,
    window_pair,
    with_specials,
)

pytestmark = pytest.mark.torch


# -- copies ----------------------------------------------------------------------------------------


def halfway(code: str, size: int = 1000) -> Array:
    """Float64 numbers around the middle between two 16-bit ones, where two roundings go wrong."""
    bits = np.random.default_rng(1).integers(0x0400, 0x7400, size).astype(np.uint16)
    form = reference.FLOATS[code].storage
    ends = [reference.decode((bits + i).astype(np.uint16).view(form), code) for i in (0, 1)]
    middle = (ends[0] + ends[1]) / 2
    return np.concatenate([middle, *(middle * (1 + s * 2.0**-40) for s in (1, -1))])


@pytest.mark.parametrize("operation", ["copy", "cast_back", "swap"])
@pytest.mark.parametrize(("dst", "src"), PAIRS, ids=PAIR_IDS)
def test_copies_of_every_pair_of_floats(dst: str, src: str, operation: str) -> None:
    avg, x = (numbers(3000, code, i, "bits") for i, code in enumerate((dst, src)))
    avg, x = with_specials(avg, x, dst, src)
    for code, other, array in ((src, dst, x), (dst, src, avg)):
        if code == "f64" and other in STEPS:
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
    x = np.concatenate(
        [numbers(3000, src, 2, "bits"), reference.cast(ties[::-1].copy(), "f32", src)]
    )
    pair = split_pair(avg, tensor(x, src))
    (other,) = run_both(operation, [pair])
    assert_same(joined(pair), joined(other), "f32")
    assert_same(stored(pair.src.owner), stored(other.src.owner), src)
    if src != "f32":  # what is converted has other bits where it is not a number
        return
    assert_same_bits([pair], [other])
    if operation != "cast_back":
        assert_same(joined(pair), x, "f32")
    if operation != "copy":
        assert_same(stored(pair.src.owner), avg, "f32")


# -- measures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dst", "src"),
    [
        *(("f32", "f32"), ("f32", "bf16"), ("f64", "f32"), ("bf16", "bf16"), ("bf16~", "bf16")),
        *(("f16~", "f32"), (SPLIT, "f32"), (SPLIT, "bf16"), ("c64", "c64")),
    ],
)
def test_measures_of_each_pair(dst: str, src: str) -> None:
    code = dst.strip("~")
    pairs, before = [], []
    for i, size in enumerate([1, 5000, 0, 37, 4000]):
        x, index = tensor(numbers(size, src, i), src), i % 2
        avg = numbers(size, "f32" if dst == SPLIT else code, 50 + i)
        before.append(values_of(avg, "f32" if dst == SPLIT else code))
        if dst == SPLIT:
            pairs.append(split_pair(avg, x, name=f"t{i}", average_index=index))
        else:
            form = dst if "~" in dst else ""
            pairs.append(pair_of(tensor(avg, code), x, f"t{i}", form=form, average_index=index))
    others, plain = twin(pairs), twin(pairs)
    weights, settings = (0.0, 2.0**-6), (3, 4)
    found = run("lerp_measured", pairs, weights, *settings)
    run("lerp", plain, weights, *settings)
    assert_same_bits(pairs, plain)
    assert found.shape == (5, MEASURES)
    assert found.dtype == np.float64
    slack = 8 * unit_roundoff("f64" if "f64" in (dst, src) else "f32")
    for row, (pair, old) in enumerate(zip(pairs, before, strict=True)):
        new = joined(pair) if dst == SPLIT else stored(pair.dst.owner)
        new = values_of(new, "f32" if dst == SPLIT else code)
        distance = values_of(stored(pair.src.owner), src) - new
        want = [np.square(distance).sum(), np.square(new).sum(), (new == old).sum()]
        np.testing.assert_allclose(found[row, [DISTANCE, SQUARE]], want[:2], rtol=slack)
        assert found[row, STILL] == want[2]
    program = run_kernels("lerp_measured", others, weights, *settings)
    for index in (0, 1):
        measured = program.measured(index)
        sums = found[[i for i, pair in enumerate(pairs) if pair.average_index == index]].sum(axis=0)
        np.testing.assert_allclose(np.sqrt(sums[:2]), measured[:2], rtol=1e-3)
        assert abs(sums[STILL] - measured.still) <= 0.01 * sum(map(len, before))


@pytest.mark.parametrize("src", [*REAL, *COMPLEX])
def test_number_of_elements_that_are_not_finite(src: str) -> None:
    wide = {"c64": "c64", "c128": "c128"}.get(src, "f32")
    arrays = [with_specials(*[numbers(n, src, n, "bits")] * 2, src, src)[0] for n in (900, 5)]
    arrays += [numbers(n, src, n) for n in (0, 900, 7)]
    pairs = [
        pair_of(torch.zeros(len(x), dtype=bridge.native(wide)), tensor(x, src)) for x in arrays
    ]
    before = twin(pairs)
    found = run("finite", pairs)
    with np.errstate(invalid="ignore"):
        bad = [(~np.isfinite(values_of(x, src))).sum() for x in arrays]
    assert np.all(np.array(bad[:2]) > 20)
    assert not any(bad[2:])
    np.testing.assert_array_equal(found[:, DISTANCE], bad)
    assert_same_bits(pairs, before)
    assert not run("finite", pairs[2:]).any()
    # Both sides the same tensor, as a guard has them.
    same = [pair_of(pair.src.owner, pair.src.owner) for pair in pairs]
    np.testing.assert_array_equal(run("finite", same)[:, DISTANCE], bad)
    assert run("copy", pairs) is None


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


def hand_over(turn: int) -> Callable[..., Any]:
    """Kernels and substitute in turn, for three updates each."""
    return (run, run_kernels)[turn // 3 % 2]


RUNNERS = {
    "substitute": lambda turn: run,
    "kernels first": lambda turn: hand_over(turn + 2),
    "substitute first": lambda turn: hand_over(turn - 1),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("formats", WINDOWS, ids="-".join)
def test_mean_of_what_is_in_the_ring(formats: tuple[str, ...], window: int, runner: str) -> None:
    _, src, ring, _ = formats
    pair = window_pair(formats, 500, window)
    other = twin([pair])
    seen: list[Array] = []
    for turn in range(1, 2 * window + 10):
        x = numbers(500, src, turn)
        seen.append(values_of(reference.cast(x, src, ring), ring))
        for one in (pair, *other):
            one.src.owner.copy_(tensor(x, src))
        moment = ((float(min(turn, window)),), 1, turn, window, (turn - 1) % window, turn)
        RUNNERS[runner](turn)("window", [pair], *moment)
        assert_window(pair, formats, seen, window)
        run_kernels("window", other, *moment)
        if "~" not in formats[0]:
            code = formats[0]
            got, theirs = (values_of(stored(one.dst.owner), code) for one in (pair, *other))
            near = 2 * cast_bound(np.abs(theirs), code) + 1e-10 * (
                code == "f64" and "f32" in formats
            )
            assert np.all(np.abs(got - theirs) <= near)
