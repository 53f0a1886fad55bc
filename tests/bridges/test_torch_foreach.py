"""torch's own functions in the place of kernels, against the kernels on the same CPU tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.bridges import torch_foreach as foreach
from fastema.engine.program import Program
from fastema.errors import DTypeError
from fastema.kernels.table import DISTANCE, MEASURES, SQUARE, STILL
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DTYPES
from fastema.layout.group import Pair

from ..support import reference
from ..support.arrays import assert_same, numbers
from ..support.tolerance import cast_bound, exact_lerp, lerp_bound, unit_roundoff

pytestmark = pytest.mark.torch

REAL = [code for code, kind in DTYPES.items() if kind.real and kind.parts == 1]
COMPLEX = [code for code, kind in DTYPES.items() if kind.parts == 2]
EXACT = [code for code, kind in DTYPES.items() if kind.whole]
PAIRS = [*product(REAL, REAL), *product(COMPLEX, COMPLEX)]
PAIR_IDS = ["-".join(pair) for pair in PAIRS]
SPLIT = "bf16+16"
STEPS = {"f16": 13, "bf16": 16}
WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Array = np.ndarray


# -- tensors, pairs and runs -----------------------------------------------------------------------


def tensor(array: Array, code: str) -> Any:
    """A tensor of an array as stored."""
    return torch.from_numpy(array.copy()).view(bridge.native(code))


def stored(one: Any) -> Array:
    """The other way, row-major."""
    one = one.detach().contiguous()
    return (one.view(torch.uint16) if one.dtype == torch.bfloat16 else one).numpy()


def words(one: Any) -> Any:
    """The bits of a tensor."""
    one = one.detach().contiguous()
    reals = torch.view_as_real(one) if one.is_complex() else one
    return reals.view(WORD[reals.element_size()])


def pair_of(
    dst: Any, src: Any, name: str = "t", residual: Any = None, ring: Any = None, **rest: Any
):
    """A pair as a store makes it; ``ring`` has its slots along the first axis."""
    slots = None
    if ring is not None:
        spec = bridge.describe(ring)
        one = replace(spec, shape=spec.shape[1:], strides=spec.strides[1:])
        slots = one, spec.strides[0] * spec.kind.itemsize
    residual = None if residual is None else bridge.describe(residual)
    return Pair(
        name, bridge.describe(dst), bridge.describe(src), residual=residual, ring=slots, **rest
    )


def twin(pairs: Sequence[Pair]) -> list[Pair]:
    """The same pairs in other memory, gaps and sharing included."""
    made: dict[int, Any] = {}

    def copied(one: Any) -> Any:
        one = one.detach()
        old = one.untyped_storage()
        storage = made.setdefault(old.data_ptr(), old.clone())
        empty = torch.empty(0, dtype=one.dtype)
        return empty.set_(storage, one.storage_offset(), one.shape, one.stride())

    return [
        pair_of(
            copied(pair.dst.owner),
            copied(pair.src.owner),
            pair.name,
            None if pair.residual is None else copied(pair.residual.owner),
            None if pair.ring is None else copied(pair.ring[0].owner),
            form=pair.form,
            average_index=pair.average_index,
        )
        for pair in pairs
    ]


def owners(pair: Pair) -> list[Any]:
    """The tensors of a pair."""
    specs = [pair.dst, pair.src, pair.residual, pair.ring and pair.ring[0]]
    return [spec.owner for spec in specs if spec is not None]


def run(operation: str, pairs: Sequence[Pair], numbers: Any = (0.0,), *settings: int) -> Any:
    """The substitute, once."""
    return foreach.substitute(operation, pairs)(LaunchArgs(numbers, *settings))


def run_kernels(operation: str, pairs: Sequence[Pair], numbers: Any = (0.0,), *settings: int):
    """The kernels, once; returns the program."""
    program = Program({"all": pairs})
    program.run({"all": operation}, LaunchArgs(numbers, *settings))
    return program


def run_both(operation: str, pairs: Sequence[Pair], numbers: Any = (0.0,), *settings: int):
    """The substitute on the pairs, and the kernels on their twins, which are returned."""
    others = twin(pairs)
    run(operation, pairs, numbers, *settings)
    run_kernels(operation, others, numbers, *settings)
    return others


def memory(one: Any) -> Any:
    """The whole storage of a tensor, gaps included, in bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(one.untyped_storage())


def assert_same_bits(pairs: Sequence[Pair], others: Sequence[Pair]) -> None:
    """Every byte of their storages is equal, gaps included."""
    for pair, other in zip(pairs, others, strict=True):
        for one, two in zip(owners(pair), owners(other), strict=True):
            assert torch.equal(memory(one), memory(two)), pair.name


SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]


def with_specials(array: Array, other: Array, dst: str, src: str) -> tuple[Array, Array]:
    """Two arrays, and beside them every two special numbers."""
    ends = [
        [*SPECIAL, *(s * form.largest for s in (1, -1)), form.smallest, 2.0**form.lowest]
        for form in (reference.FLOATS[reference.real_of(code)] for code in (dst, src))
    ]
    crossed = np.array(list(product(*ends))).T
    sides = []
    for values, code, kept in zip(crossed, (dst, src), (array, other), strict=True):
        reals = reference.encode(values, reference.real_of(code))
        if DTYPES[code].parts == 2:
            reals = np.resize(reals, 2 * len(reals)).view(kept.dtype)
        sides.append(np.concatenate([kept, reals]))
    return sides[0], sides[1]


def values_of(array: Array, code: str) -> Array:
    """Stored numbers as float64; complex ones as pairs."""
    return reference.decode(array.view(reference.real_of_storage(code)), reference.real_of(code))


def assert_lerped(
    got: Array, before: Array, x: Array, w: float, dst: str, src: str, kernels: Array
) -> None:
    """As near to the exact average as without one fused operation, and special where they are."""
    value, theirs = values_of(got, dst), values_of(kernels, dst)
    np.testing.assert_array_equal(np.isnan(value), np.isnan(theirs))
    infinite = np.isinf(value) | np.isinf(theirs)
    np.testing.assert_array_equal(value[infinite], theirs[infinite])
    finite = np.isfinite(theirs)
    assert finite.sum() > 500
    computed = "f64" if "f64" in map(reference.real_of, (dst, src)) else "f32"
    if reference.decode(reference.encode(np.array([w]), computed), computed) == 1:
        want = reference.cast(x, src, dst)  # whatever the average held
        np.testing.assert_array_equal(value, values_of(want, dst))
        return
    with np.errstate(all="ignore"):
        exact = exact_lerp(before, x, w, dst, src)
        moved = np.abs(exact - values_of(before, dst)).astype(float)
        bound = lerp_bound(before, x, w, dst, src) + 2 * unit_roundoff(computed) * moved
        bound += reference.FLOATS[computed].smallest
        assert np.all(np.abs(value - exact)[finite] <= bound[finite])


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


def split_pair(values: Array, src: Any, **rest: Any) -> Pair:
    """A float32 average in two halves."""
    clean = np.where(np.isnan(values), np.float32(np.nan), values)
    bits = clean.view(np.uint32)
    up = np.where(np.isnan(clean), 0, bits >> 15 & 1)
    high = ((bits >> 16) + up).astype(np.uint16)
    residual = (bits & 0xFFFF).astype(np.uint16).view(np.int16)
    return pair_of(tensor(high, "bf16"), src, residual=tensor(residual, "i16"), form=SPLIT, **rest)


def joined(pair: Pair) -> Array:
    """What an average in two halves stands for, by arithmetic on its parts."""
    high = stored(pair.dst.owner).astype(np.uint32)
    residual = stored(pair.residual.owner).view(np.uint16).astype(np.uint32)
    up = np.where((high & 0x7FFF) > 0x7F80, 0, residual >> 15)
    return ((high - up << 16) | residual).astype(np.uint32).view(np.float32)


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
@pytest.mark.parametrize("code", [*EXACT, *REAL, *COMPLEX])
def test_equal_dtypes_are_moved_to_the_bit(code: str, operation: str) -> None:
    sides = [tensor(numbers(700, code, i, "bits"), code) for i in (1, 2)]
    old = [words(one).clone() for one in sides]
    form = f"{code}~" if code in STEPS else ""
    run(operation, [pair_of(*sides, form=form)])
    new = {"copy": (1, 1), "cast_back": (0, 0), "swap": (1, 0)}[operation]
    for side, index in zip(sides, new, strict=True):
        assert torch.equal(words(side), old[index])


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


def test_park_and_back() -> None:
    ends = np.array([0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 1, 0x8000, 0x7FFF, 0, 0x7F800000])
    ties = np.concatenate([np.arange(1 << 16) << 16 | low for low in (0x8000, 0x7FFF, 1)])
    avg = np.concatenate([ends, ends | 0x80000000, ties]).astype(np.uint32).view(np.float32)
    avg = np.concatenate([avg, numbers(30_000, "f32", 3, "bits")])
    x = np.resize(np.random.default_rng(1).permutation(1 << 16).astype(np.uint16), avg.size)
    pair = pair_of(tensor(avg, "f32"), tensor(x, "bf16"))
    assert_same_bits([pair], run_both("park", [pair]))
    nan = np.isnan(avg)
    away = reference.split(avg[~nan])[0]
    np.testing.assert_array_equal(stored(pair.src.owner)[~nan], away)
    assert_same_bits([pair], run_both("unpark", [pair]))
    np.testing.assert_array_equal(stored(pair.src.owner), x)
    bits = avg.view(np.uint32)
    lost = nan & (bits & 0x7FFF0000 == 0x7F800000)
    back = np.where(lost, bits | np.uint32(0x400000), bits)
    np.testing.assert_array_equal(stored(pair.dst.owner).view(np.uint32), back)
    # A model that was written meanwhile, by whatever numbers.
    pair = pair_of(tensor(avg, "f32"), tensor(x, "bf16"))
    assert_same_bits([pair], run_both("unpark", [pair]))


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

WINDOWS = [
    ("f32", "f32", "f32", "f32"),
    ("f64", "f64", "f64", "f64"),
    ("f32", "bf16", "bf16", "f32"),
    ("bf16", "bf16", "bf16", "f32"),
    ("bf16~", "bf16", "bf16", "f32"),
    ("f16~", "f16", "f16", "f32"),
    ("f64", "f32", "f32", "f64"),
    ("f32", "f64", "f32", "f32"),
    ("f32", "f64", "f16", "f64"),
    ("c64", "c64", "c64", "c64"),
]


def window_pair(formats: tuple[str, ...], size: int, window: int) -> Pair:
    """Memory that holds something else before the first value."""
    dst, src, ring, rest = (bridge.native(code.strip("~")) for code in formats)
    made = [torch.full((size,), 7, dtype=one) for one in (dst, src, rest)]
    slots = torch.full((window, size), 7, dtype=ring)
    form = formats[0] if "~" in formats[0] else ""
    return pair_of(made[0], made[1], residual=made[2], ring=slots, form=form)


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


def test_what_is_not_finite_passes_through() -> None:
    window, formats = 4, WINDOWS[0]
    pair = window_pair(formats, 90, window)
    for turn in range(1, 30):
        x = torch.from_numpy(numbers(90, "f32", turn))
        if turn == 9:
            x[:3] = torch.tensor([np.inf, -np.inf, np.nan])
        pair.src.owner.copy_(x)
        moment = ((float(min(turn, window)),), 1, turn, window, (turn - 1) % window, turn)
        (run if turn < 12 else run_kernels)("window", [pair], *moment)
        bad = (~pair.dst.owner.isfinite()).sum()
        within = 9 <= turn < 9 + window
        assert bad == 3 if within else bad == 0 or turn < 9 + 2 * window
        assert pair.residual.owner.isfinite().all()
        if turn == 10:
            assert pair.dst.owner[:2].tolist() == [np.inf, -np.inf]


# -- where tensors lie -----------------------------------------------------------------------------

# Shape, then strides of both sides in elements.
LAYOUTS = {
    "row-major": ((6, 5, 8), (40, 8, 1), (40, 8, 1)),
    "transposed": ((6, 80), (1, 6), (1, 6)),
    "channels last": ((4, 6, 5, 7), (210, 1, 42, 6), (210, 1, 42, 6)),
    "differently permuted": ((6, 5, 8), (40, 8, 1), (1, 48, 6)),
    "0-dim": ((), (), ()),
    "ones": ((1, 1, 1), (1, 1, 1), (9, 4, 7)),
    "empty": ((3, 0, 2), (0, 2, 1), (0, 2, 1)),
    "every second": ((70,), (2,), (2,)),
    "rows of a matrix": ((7, 30), (90, 1), (60, 1)),
    "gaps on one side": ((7, 30), (30, 1), (64, 1)),
    "expanded source": ((9, 70), (70, 1), (0, 1)),
    "one source element": ((9, 70), (70, 1), (0, 0)),
}


def laid_out(values: Array, code: str, strides: tuple[int, ...], start: int = 3) -> Any:
    """A tensor of these values and strides within memory that holds something else."""
    source = tensor(values.copy(), code)
    length = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True) if n)
    filler = torch.full((start + length + 9,), 85, dtype=torch.uint8).to(source.dtype)
    placed = filler.as_strided(values.shape, strides, start)
    if values.size and 0 not in strides:
        placed.copy_(source)
    return placed


MOVES = [
    *(("lerp", *codes) for codes in (("f32", "bf16"), ("f32", "f32"), ("c64", "c64"))),
    *(("lerp", *codes) for codes in (("bf16~", "f32"), (SPLIT, "f32"))),
    *(("copy", *codes) for codes in (("f32", "bf16"), ("i16", "i16"), ("c64", "c64"))),
    *(("swap", *codes) for codes in (("i16", "i16"), ("c64", "c64"), (SPLIT, "f32"))),
    ("park", "f32", "bf16"),
    ("window", "f32", "bf16"),
]


CASES = [
    pytest.param(*move, layout, id="-".join([*move, layout]))
    for move, layout in product(MOVES, LAYOUTS)
    if not ("source" in layout and move[0] in ("swap", "park"))  # which would write it
]


def gaps(one: Any) -> Any:
    """The memory around a tensor's elements."""
    whole = torch.empty(0, dtype=one.dtype).set_(one.untyped_storage()).clone()
    places = torch.arange(len(whole))
    whole[places.as_strided(one.shape, one.stride(), one.storage_offset()).reshape(-1)] = 0
    return words(whole)


@pytest.mark.parametrize(("operation", "dst", "src", "layout"), CASES)
def test_every_way_to_lie_in_memory(operation: str, dst: str, src: str, layout: str) -> None:
    shape, to_strides, of_strides = LAYOUTS[layout]
    size = int(np.prod(shape))

    def made(code: str, seed: int, strides: tuple[int, ...], *slots: int) -> Any:
        values = numbers(size * int(np.prod(slots)), code, seed)
        return laid_out(values.reshape((*slots, *shape)), code, strides, 2 + seed)

    to = made({SPLIT: "bf16"}.get(dst, dst.strip("~")), 1, to_strides)
    of = made(src, 2, of_strides)
    if operation == "window":
        far = (2 + sum(n * s for n, s in zip(shape, to_strides, strict=True)), *to_strides)
        ring = made("bf16", 4, far, 3)
        pair = pair_of(to, of, residual=made("f32", 3, to_strides), ring=ring)
        before, (other,) = ring.clone(), twin([pair])
        run(operation, [pair], (2.0,), 0, 1, 3, 1, 2)
        torch.testing.assert_close(to, (before[0].float() + of.float()) / 2)
        assert torch.equal(ring, torch.stack([before[0], of, before[2]]))
    else:
        residual = made("i16", 3, to_strides) if dst == SPLIT else None
        pair = pair_of(to, of, residual=residual, form=dst if dst == SPLIT or "~" in dst else "")
        (other,) = run_both(operation, [pair], (0.25,))
        if operation != "lerp":
            assert_same_bits([pair], [other])
        elif dst == SPLIT:
            np.testing.assert_allclose(joined(pair), joined(other), rtol=1e-6, atol=1e-9)
        elif "~" in dst:  # all but those that were rounded apart before
            assert (to != other.dst.owner).sum() <= size // 100
        else:
            torch.testing.assert_close(to, other.dst.owner, rtol=1e-6, atol=1e-6)
    for one, two in zip(owners(pair), owners(other), strict=True):
        assert torch.equal(gaps(one), gaps(two))


# -- what torch keeps of a tensor ------------------------------------------------------------------


def test_parameters_keep_what_they_are_and_autograd_is_told() -> None:
    model = [torch.nn.Parameter(tensor(numbers(90, "f32", i), "f32")) for i in (1, 2)]
    avg = [tensor(numbers(90, "f32", i), "f32") for i in (3, 4)]
    pairs = [pair_of(a, p, f"t{i}") for i, (a, p) in enumerate(zip(avg, model, strict=True))]
    run("lerp", pairs, (0.5,))
    assert all(a.grad_fn is None and not a.requires_grad for a in avg)
    loss = sum((p * p).sum() for p in model)
    run("swap", pairs)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("operation", ["lerp", "swap", "copy"])
def test_tensors_of_inference_mode(operation: str) -> None:
    with torch.inference_mode():
        sides = [tensor(numbers(90, code, i), code) for i, code in enumerate(["bf16", "f32"])]
    pair = pair_of(*sides)
    assert pair.dst.owner.is_inference()
    assert_same_bits([pair], run_both(operation, [pair], (0.25,)))


def test_defaults_of_torch_are_of_no_account() -> None:
    def result() -> list[Array]:
        x = tensor(numbers(900, "f64", 2), "f64")
        avg = [tensor(numbers(900, code, 1), code) for code in ("f16", "bf16")]
        random = [
            pair_of(a, x, f"t{i}", form=f"{code}~")
            for i, (a, code) in enumerate(zip(avg, STEPS, strict=True))
        ]
        measures = run("lerp_measured", random, (0.3,))
        mean = window_pair(WINDOWS[1], 900, 3)
        run("window", [mean], (1.0,), 0, 0, 3, 1, 1)
        return [*map(stored, avg), measures, stored(mean.dst.owner)]

    want = result()
    prepared = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        got = result()
    finally:
        torch.set_default_dtype(prepared)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


# -- batches and memory ----------------------------------------------------------------------------


def test_batches_cover_every_element_once() -> None:
    shapes = [(700,), (30, 40), (), (0, 3), (3, 5, 7), (1, 900)]
    pairs = []
    for i, shape in enumerate(shapes):
        whole = torch.zeros(*shape[:-1], 2 * shape[-1]) if shape else torch.zeros(2)
        gapped = whole[..., ::2] if i % 2 else whole[..., : shape[-1] if shape else 1]
        gapped = gapped if shape else whole[0]
        code = "bf16" if i % 3 else "f32"
        x = torch.ones(shape, dtype=bridge.native(code))
        if len(shape) == 2 and shape[0]:
            x = x.t().contiguous().t()
        pairs += [pair_of(gapped, x, f"t{i}"), pair_of(gapped.clone(), x, f"t{i}", average_index=1)]
    made = foreach.batches("lerp", pairs, 100)
    assert [batch.average_index for batch in made] == sorted(batch.average_index for batch in made)
    sizes: Counter[int] = Counter()
    for batch in made:
        assert 0 < sum(one.numel() for one in batch.dst) <= 100
        assert not batch.residual
        assert not batch.ring
        assert len({one.dtype for one in batch.src}) == 1
        for row, one, of in zip(batch.rows, batch.dst, batch.src, strict=True):
            assert pairs[row].average_index == batch.average_index
            assert of.shape == one.shape
            sizes[row] += one.numel()
            one += of
    for row, pair in enumerate(pairs):
        assert sizes[row] == pair.dst.size
        assert torch.all(pair.dst.owner == 1)
        assert pair.dst.owner.untyped_storage().nbytes() == 0 or (
            torch.empty(0).set_(pair.dst.owner.untyped_storage()).sum() == pair.dst.size
        )
    # Full ones: no more than twice as many as there have to be, of each kind.
    assert len(made) <= 2 * (sum(sizes.values()) // 100) + 4


def test_dense_pieces_are_flat_whatever_the_order_of_axes() -> None:
    """Lists of tensors that lie alike are what torch takes in one launch."""
    avg, x = (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2))
    other = torch.zeros(2, 3, 4, 5, dtype=torch.complex64).permute(3, 0, 2, 1)
    gapped = torch.zeros(9, 8)[:, :4]
    pairs = [pair_of(avg, x), pair_of(other, other.clone()), pair_of(gapped, gapped.clone())]
    made = foreach.batches("lerp", pairs, 1000)
    assert [[one.shape for one in batch.dst] for batch in made] == [[(120,), (240,), (9, 4)]]
    (mean,) = foreach.batches("window", [window_pair(WINDOWS[0], 7, 3)], 1000)
    assert mean.ring[0].shape == (3, 7)


def test_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def results(most: int) -> list[Array]:
        monkeypatch.setattr(foreach, "AT_ONCE", most)
        found = []
        for operation, dst, src in [("lerp", "f32", "bf16"), ("swap", "f16", "f64")]:
            a = tensor(numbers(7000, dst, 1).reshape(70, 100), dst).t()
            x = tensor(numbers(7000, src, 2).reshape(100, 70), src)
            run(operation, [pair_of(a, x)], (0.25,))
            found += [stored(a), stored(x)]
        pair = split_pair(numbers(7000, "f32", 1), tensor(numbers(7000, "f32", 2), "f32"))
        measures = run("lerp_measured", [pair], (0.75,))
        mean = window_pair(WINDOWS[0], 7000, 3)
        run("window", [mean], (2.0,), 0, 0, 3, 1, 2)
        return [*found, joined(pair), measures[:, STILL], stored(mean.dst.owner)]

    for one, other in zip(results(1 << 20), results(999), strict=True):
        np.testing.assert_array_equal(one, other)


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of storages that torch's functions made and that are still held."""

    def __init__(self, known: Sequence[Any]) -> None:
        super().__init__()
        self._known = {one.untyped_storage()._cdata for one in known}
        self._held: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.peak = 0

    def _gone(self, storage: int) -> None:
        self._held[storage] -= 1
        if not self._held[storage]:
            del self._held[storage]
            del self._sizes[storage]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(out):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()._cdata
                if storage not in self._known:
                    self._held[storage] += 1
                    self._sizes[storage] = one.untyped_storage().nbytes()
                    weakref.finalize(one, self._gone, storage)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out


EVERYTHING = [
    *product(
        ["lerp", "lerp_measured", "add"], ["f64", "f32", "bf16~", "f16~", "bf16", SPLIT], REAL
    ),
    *product(["copy", "cast_back", "swap"], ["f64", "f32", "bf16", SPLIT], REAL),
    *(("finite", "f32", src) for src in REAL),
    ("park", "f32", "bf16"),
    ("unpark", "f32", "bf16"),
    *(("window", dst, src) for dst, src, *_ in WINDOWS),
]


@pytest.mark.parametrize(("operation", "dst", "src"), EVERYTHING)
def test_memory_does_not_grow_with_the_tensors(
    operation: str, dst: str, src: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = 3000
    monkeypatch.setattr(foreach, "AT_ONCE", at_once)
    formats = next((one for one in WINDOWS if one[:2] == (dst, src)), ())

    def peak(sizes: Sequence[int]) -> int:
        pairs = []
        for i, size in enumerate(sizes):
            x = tensor(numbers(size, src, i), src)
            if operation == "window":
                pairs.append(window_pair(formats, size, 3))
            elif dst == SPLIT:
                pairs.append(split_pair(numbers(size, "f32", 9), x))
            else:
                code = dst.strip("~")
                form = dst if "~" in dst else ""
                pairs.append(pair_of(tensor(numbers(size, code, 9), code), x, form=form))
        once = foreach.substitute(operation, pairs)
        with LiveBytes([one for pair in pairs for one in owners(pair)]) as live:
            once(LaunchArgs((3.0 if operation == "window" else 0.75,), 0, 0, 3, 1, 3))
        return live.peak

    measures = 200  # a few numbers for each piece
    parts = 2 if dst == "c64" else 1
    assert peak([9000]) <= foreach.BYTES * at_once + measures
    assert peak([at_once // 10] * 10) <= foreach.BYTES * at_once + 10 * measures
    assert peak([at_once * 10]) <= peak([at_once]) + 10 * measures * parts


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["read_read_write", "lerp_", ""])
def test_operations_that_are_refused(operation: str) -> None:
    pair = pair_of(torch.ones(3), torch.ones(3))
    with pytest.raises(DTypeError, match=f"^{operation}: torch has no functions.*lerp_measured"):
        foreach.substitute(operation, [pair])


@pytest.mark.parametrize("operation", ["lerp", "lerp_measured", "add", "finite", "window"])
@pytest.mark.parametrize("code", EXACT)
def test_integers_are_not_averaged(operation: str, code: str) -> None:
    one = torch.ones(3, dtype=bridge.native(code))
    with pytest.raises(DTypeError, match=f"{code} is not averaged"):
        foreach.substitute(operation, [pair_of(one, one.clone())])
