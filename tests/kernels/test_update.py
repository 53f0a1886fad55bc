"""Updates, copies and swaps of every pair of formats, to the bit, on rows built by hand."""

from itertools import product

import numpy as np
import pytest

from fastema.kernels import operations
from fastema.kernels.table import BLOCK
from fastema.kernels.variants import cpu_variants

from ..support import reference
from ..support.arrays import assert_same, lay_out_guarded, numbers
from .rows import Row, run

# Stochastic formats are tested in test_random.py, split ones in test_split.py.
PAIRS = list(product(reference.FLOATS, reference.FLOATS))
OPERATIONS = ["lerp", "copy", "swap"]
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
RAW = {"raw1": "u8", "raw2": "u16", "raw4": "u32", "raw8": "i64"}

Array = np.ndarray


def expected(operation: str, a: Array, b: Array, dst: str, src: str, w: float) -> list[Array]:
    """Return what both sides hold afterwards; a NaN may have become quiet."""
    if operation == "lerp":
        return [reference.lerp(a, b, w, dst, src), b]
    moved = reference.encode(reference.decode(b, src), dst)
    return [moved, reference.encode(reference.decode(a, dst), src) if operation == "swap" else b]


def check(
    operation: str,
    formats: tuple[str, str],
    sides: list[tuple[Array, Array]],
    w: float = 0.3,
    *,
    starts: tuple[int, int] = (0, 0),
    steps: tuple[int, int] | None = None,
) -> None:
    """Run rows, compare both sides, and assert that nothing around them is written."""
    watched, want = [], []
    for side in sides:
        row = zip(side, starts, steps or (1, 1), strict=True)
        watched.append([lay_out_guarded(array, start, (step,)) for array, start, step in row])
        a, b = (one.array.copy() for one in watched[-1])  # read back: elements may overlap
        want.append(expected(operation, a, b, *formats, w))
    rows = [Row(to.array, of.array, *(steps or ())) for to, of in watched]
    run(operation, formats, rows, [w], layout="strided" if steps else "flat")
    for pair, after in zip(watched, want, strict=True):
        for one, values, code in zip(pair, after, formats, strict=True):
            assert_same(one.array, values, code)
            one.assert_rest_untouched()
        if operation != "swap":
            pair[1].assert_untouched()


def specials(code: str) -> Array:
    """Return numbers that are hard on arithmetic, as stored."""
    form = reference.FLOATS[code]
    unit = 2.0 ** (1 - form.digits)
    normal = 2.0**form.lowest
    values = [0.0, 1.0, 1 + unit, 2 - unit, form.smallest, 3 * form.smallest]
    values += [normal - form.smallest, normal, form.largest, form.largest / 3, np.inf]
    both = np.array([sign * value for value in values for sign in (1.0, -1.0)] + [np.nan])
    return reference.encode(both, code)


@pytest.mark.parametrize(("dst", "src"), PAIRS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_of_any_size_and_start_match_the_specification(
    operation: str, dst: str, src: str
) -> None:
    sides = [(numbers(n, dst, n), numbers(n, src, n + 99)) for n in SIZES]
    for start in (0, 1, 2, 8):
        check(operation, (dst, src), sides, starts=(start, 8 - start))


@pytest.mark.parametrize(("dst", "src"), PAIRS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kind_of_number_matches_the_specification(operation: str, dst: str, src: str) -> None:
    a, b = specials(dst), specials(src)
    random = [numbers(20_000, code, 7, "bits") for code in (dst, src)]
    avg = np.concatenate([np.repeat(a, len(b)), random[0]])
    x = np.concatenate([np.tile(b, len(a)), random[1]])
    if operation == "lerp":
        for w in (0.0009765625, 0.3, 1.0, 0.0, -0.7, 1.75):
            few = avg[:2500], x[:2500]
            check(operation, (dst, src), [few], w)
            check(operation, (dst, src), [few], w, steps=(1, 1))
        return
    every = np.arange(1 << 16, dtype=np.uint16)
    if src in ("f16", "bf16"):
        avg = np.concatenate([avg, np.resize(avg, every.size)])
        x = np.concatenate([x, every.view(x.dtype)])
    check(operation, (dst, src), [(avg, x)])


# Strided loops share the code of one element, so one pair of each kind suffices.
@pytest.mark.parametrize(
    ("dst", "src"), [("f32", "bf16"), ("bf16", "f64"), ("f16", "f16"), ("f64", "f16")]
)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("steps", [(1, 3), (3, 1), (2, 5), (-1, 2), (2, -3), (1, 0)])
def test_strided_rows_match_the_specification(
    operation: str, dst: str, src: str, steps: tuple[int, int]
) -> None:
    if operation == "swap" and 0 in steps:  # an expanded tensor is not written
        return
    sides = [(numbers(131, dst, 1), numbers(131, src, 2))]
    check(operation, (dst, src), sides, starts=(1, 2), steps=steps)


@pytest.mark.parametrize("layout", ["flat", "strided"])
@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("operation", ["copy", "swap"])
def test_raw_copies_and_swaps_keep_every_bit(operation: str, raw: str, layout: str) -> None:
    steps = (1, 1) if layout == "flat" else (2, 3)
    for n in SIZES:
        to, of = (lay_out_guarded(numbers(n, RAW[raw], k), k, steps[k : k + 1]) for k in (0, 1))
        a, b = to.array.copy(), of.array.copy()
        run(operation, (raw, raw), [Row(to.array, of.array, *steps)], layout=layout)
        np.testing.assert_array_equal(to.array, b)
        np.testing.assert_array_equal(of.array, a if operation == "swap" else b)
        to.assert_rest_untouched()
        of.assert_rest_untouched()


def quiet_signaling_nan(pattern: Array) -> Array:
    """Quiet the signaling NaNs, never results of arithmetic, whose upper 16 bits are infinity."""
    size = pattern & np.uint32(0x7FFFFFFF)
    changed = (size > 0x7F800000) & (size < 0x7F810000)
    return np.where(changed, pattern | np.uint32(0x400000), pattern)


def patterns(kind: int | str) -> Array:
    """Return float32 patterns: random ones and ties, or every high half with one low half."""
    if isinstance(kind, int):
        return (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(kind)
    found = numbers(30_000, "u32", 1, "bits")
    found[::5] = (found[::5] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    found[1::5] = numbers(len(found[1::5]), "f32", 3).view(np.uint32)
    return found


@pytest.mark.parametrize("layout", ["flat", "strided"])
@pytest.mark.parametrize("kind", ["random", 0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_parking_an_average_in_the_weights_loses_no_bit(kind: int | str, layout: str) -> None:
    step = 1 if layout == "flat" else 2
    pattern = patterns(kind)
    values, nan = pattern.view(np.float32), np.isnan(pattern.view(np.float32))
    tie = ~nan & (pattern & 0xFFFF == 0x8000)
    with np.errstate(over="ignore"):
        nearest = reference.cast(values, "f32", "bf16")
    for size in (1, BLOCK + 1, pattern.size):
        weight = numbers(size, "u16", 2, "bits")
        avg, model = (lay_out_guarded(one[:size], 1, (step,)) for one in (pattern, weight))
        rows = [Row(avg.array, model.array, step, step)]
        run("park", ("raw4", "raw2"), rows, layout=layout)
        held, plain = model.array, (~nan & ~tie)[:size]
        np.testing.assert_array_equal(held[plain], nearest[:size][plain])
        # Ties round away from zero.
        np.testing.assert_array_equal(held[tie[:size]], (pattern[:size][tie[:size]] >> 16) + 1)
        assert np.isnan(reference.decode(held[nan[:size]], "bf16")).all()
        run("unpark", ("raw4", "raw2"), rows, layout=layout)
        np.testing.assert_array_equal(model.array, weight)
        np.testing.assert_array_equal(avg.array, quiet_signaling_nan(pattern[:size]))
        avg.assert_rest_untouched()
        model.assert_rest_untouched()


def test_kernels_of_raw_bits_are_those_of_operations_that_move_bits() -> None:
    for operation, formats, _ in cpu_variants():
        if formats:
            moves = operations.OPERATIONS[operation].moves_bits
            raw = [one.startswith("raw") for one in formats]
            assert moves != "never" or not any(raw), operation
            assert moves != "always" or all(raw), operation
