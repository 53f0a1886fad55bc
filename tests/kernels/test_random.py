"""Stochastic rounding: as specified, unbiased, and safe at the ends of the range.

Random bits are a function of their arguments, hence the same in every run. A few thousand draws
from the null distribution stay below a threshold of 5 or 6 standard deviations.
"""

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from fastema.kernels.table import BLOCK

from ..support import reference
from ..support.arrays import assert_same, lay_out_guarded, numbers
from .rows import Row, run

NARROW = ["bf16", "f16"]
PAIRS = list(product(NARROW, ["f32", "bf16", "f16", "f64"]))
SEED, STEP, KEY = 2**40 + 17, 3 * 2**33 + 5, 0xDEADBEEF

Array = np.ndarray


def words_of(place: int, size: int, step: int = STEP, *, every: int = 1) -> Array:
    return reference.random_words(SEED, step, KEY, place + every * np.arange(size))


@pytest.mark.parametrize(
    ("to_step", "of_step", "every"), [(1, 1, 1), (1, 3, 1), (3, 1, 5), (-2, 2, 70_000)]
)
@pytest.mark.parametrize(("dst", "src"), PAIRS)
def test_rows_of_any_size_and_place_match_the_specification(
    dst: str, src: str, to_step: int, of_step: int, every: int
) -> None:
    layout = "flat" if (to_step, of_step) == (1, 1) else "strided"
    sizes = [0, 1, BLOCK - 1, BLOCK + 1, 5 * BLOCK + 13]
    sides, rows, want = [], [], []
    for i, (n, place) in enumerate(
        product(sizes, [0, 3, 65_536 * 7, 2**31 - 9, 2**32, 5 * 2**33 + 1])
    ):
        to = lay_out_guarded(numbers(n, dst, i), i % 3, (to_step,))
        of = lay_out_guarded(numbers(n, src, 99 + i), 8 - i % 3, (of_step,))
        words = words_of(place, n, every=every)
        want.append(reference.lerp(to.array.copy(), of.array.copy(), 0.01, dst, src, words))
        row = Row(to.array, of.array, to_step, of_step, index=place, index_step=every, key=KEY)
        rows.append(row)
        sides.append((to, of))
    run("lerp", (f"{dst}~", src), rows, [0.01], layout=layout, seed=SEED, step=STEP)
    for (to, of), expected in zip(sides, want, strict=True):
        assert_same(to.array, expected, dst)
        to.assert_rest_untouched()
        of.assert_untouched()


def round_randomly(values: Array, code: str, step: int = 1) -> Array:
    """Round float32 numbers stochastically with a kernel: an update of weight 1."""
    got = np.zeros(values.size, reference.FLOATS[code].storage)
    run("lerp", (f"{code}~", "f32"), [Row(got, values, key=KEY)], [1.0], seed=SEED, step=step)
    return got


def last_place(values: Array, code: str) -> Array:
    form = reference.FLOATS[code]
    _, exponent = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponent, form.lowest + 1) - form.digits)


def scores(values: Array, code: str, groups: Array, step: int = 1) -> Iterator[float]:
    """Yield the mean error of each group of numbers, in units of its standard error.

    A number at a fraction ``f`` between its neighbors rounds up with probability ``f``: its error
    has mean 0 and variance ``f * (1 - f)``, in units of the last place.
    """
    exact = values.astype(np.float64)
    place = last_place(exact, code)
    error = (reference.decode(round_randomly(values, code, step), code) - exact) / place
    share = np.abs(exact) / place % 1.0
    for group in np.unique(groups):
        inside = groups == group
        spread = math.sqrt(float((share * (1 - share))[inside].sum()))
        assert spread > 0
        yield float(error[inside].sum()) / spread


@pytest.mark.parametrize("code", NARROW)
def test_the_mean_error_is_zero_for_every_exponent(code: str) -> None:
    form = reference.FLOATS[code]
    # Subnormal results are included. Beyond the largest number, rounding is biased.
    exponents = np.arange(form.lowest - form.digits + 1, form.highest)
    draws = 1 << (15 if code == "f16" else 13)
    mantissas = 1 + np.random.default_rng(1).random((exponents.size, draws))
    values = np.ldexp(mantissas, exponents[:, None]).astype(np.float32).reshape(-1)
    values[::2] *= -1
    groups = np.repeat(exponents, draws)
    found = list(scores(values, code, groups))
    assert len(found) == exponents.size
    assert max(map(abs, found)) < 5
    assert abs(sum(found)) / math.sqrt(exponents.size) < 5
    signs = list(scores(values, code, np.sign(values), step=2))
    assert max(map(abs, signs)) < 5


@pytest.mark.parametrize("src", ["f32", "f64"])
@pytest.mark.parametrize("code", NARROW)
def test_special_numbers_are_preserved(code: str, src: str) -> None:
    # Every sign, exponent and leading fraction bits of a float32, with several tails each.
    rests = np.array([0, 1, 0x1FFF, 0x7FFF, 0x8000, 0xE000, 0xE001, 0xEFFF, 0xFFFF], np.uint32)
    bits = (np.arange(1 << 16, dtype=np.uint32)[:, None] << np.uint32(16)) | rests
    values = bits.reshape(-1).view(np.float32)
    form = reference.FLOATS[code]
    with np.errstate(invalid="ignore"):
        stored = values if src == "f32" else values.astype(np.float64)
    exact = reference.decode(stored, src)
    got_bits = np.zeros(values.size, np.uint16)
    for step in (1, 2):
        run("lerp", (f"{code}~", src), [Row(got_bits, stored, key=KEY)], [1.0], seed=1, step=step)
        got = reference.decode(got_bits.view(form.storage), code)
        nan = np.isnan(exact)
        np.testing.assert_array_equal(np.isnan(got), nan)
        np.testing.assert_array_equal(got_bits >> 15, np.signbit(exact))
        np.testing.assert_array_equal(got[np.isinf(exact)], exact[np.isinf(exact)])
        finite = np.isfinite(exact)
        if code == "bf16":
            assert np.isfinite(got[finite]).all()
        else:
            np.testing.assert_array_equal(np.isinf(got[finite]), np.abs(exact[finite]) >= 65520)
        within = np.abs(exact) <= form.largest
        known, place = exact[within], last_place(exact[within], code)
        assert (np.abs(got[within] - known) < place).all()
        # Numbers that the format can hold, signed zeros and subnormals included, are kept.
        held = known % place == 0
        assert held.sum() > 20_000
        np.testing.assert_array_equal(got[within][held], known[held])


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("half", ["high", "low"])
def test_tails_of_random_words_are_uniform_and_independent(half: str, bits: int) -> None:
    """Steps far below the last place change an average only at the ends of either half."""
    size = 1 << 20
    tails = []
    for step in (STEP, STEP + 1):
        words = reference.random_words(SEED, step, KEY, np.arange(size))
        part = words >> np.uint32(16) if half == "high" else words & np.uint32(0xFFFF)
        tails += [part >> np.uint32(16 - bits) == end for end in (0, (1 << bits) - 1)]
    expected = size / 2**bits
    assert all(abs(one.sum() - expected) < 5 * math.sqrt(expected) for one in tails)
    pairs = [(one[:-lag], one[lag:]) for one in tails for lag in (1, 2, 8, 64)]
    both = sum(int((one & other).sum()) for one, other in [*pairs, tails[::2], tails[1::2]])
    wanted = 18 * expected / 2**bits
    assert abs(both - wanted) < 5 * math.sqrt(wanted) + 1
