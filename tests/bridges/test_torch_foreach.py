"""PyTorch's functions, which replace our kernels on a GPU without them, against float64."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.bridges import torch_foreach as foreach
from fastema.errors import DTypeError
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DTYPES
from fastema.layout.group import Pair

from ..support import reference
from ..support.arrays import assert_same, numbers
from ..support.tolerance import cast_bound, lerp_bound, lerp_in_long_double, unit_roundoff

pytestmark = pytest.mark.torch

REAL = [code for code, kind in DTYPES.items() if kind.real and kind.parts == 1]
COMPLEX = [code for code, kind in DTYPES.items() if kind.parts == 2]
PAIRS = [*product(REAL, REAL), *product(COMPLEX, COMPLEX)]
SPLIT = "bf16+16"

Array = np.ndarray


def tensor(array: Array, code: str) -> Any:
    """Convert a stored array to a tensor; `stored` does the reverse."""
    return torch.from_numpy(array.copy()).view(bridge.native(code))


def stored(one: Any) -> Array:
    one = one.detach().contiguous()
    return (one.view(torch.uint16) if one.dtype == torch.bfloat16 else one).numpy()


def pair_of(
    dst: Any, src: Any, name: str = "t", residual: Any = None, ring: Any = None, **rest: Any
):
    """Build a pair as the shadow store does; ``ring`` has its slots along the first axis."""
    if ring is not None:
        spec = bridge.describe(ring)
        one = replace(spec, shape=spec.shape[1:], strides=spec.strides[1:])
        ring = one, spec.strides[0] * spec.kind.itemsize
    to, of = bridge.describe(dst), bridge.describe(src)
    residual = None if residual is None else bridge.describe(residual)
    return Pair(name, to, of, residual=residual, ring=ring, **rest)


def owners(pair: Pair) -> list[Any]:
    """Return the tensors of a pair."""
    specs = [pair.dst, pair.src, pair.residual, pair.ring and pair.ring[0]]
    return [spec.owner for spec in specs if spec is not None]


def run(operation: str, pairs: Sequence[Pair], numbers: Any = (0.0,), *settings: int) -> Any:
    """Run the substitute once."""
    return foreach.substitute(operation, pairs)(LaunchArgs(numbers, *settings))


def with_specials(array: Array, other: Array, dst: str, src: str) -> tuple[Array, Array]:
    """Append every pair of special numbers to two arrays."""
    special = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]
    forms = [reference.FLOATS[reference.real_of(code)] for code in (dst, src)]
    ends = [[*special, f.largest, -f.largest, f.smallest, 2.0**f.lowest] for f in forms]
    crossed = np.array(list(product(*ends))).T
    sides = []
    for values, code, kept in zip(crossed, (dst, src), (array, other), strict=True):
        reals = reference.encode(values, reference.real_of(code))
        if DTYPES[code].parts == 2:
            reals = np.resize(reals, 2 * len(reals)).view(kept.dtype)
        sides.append(np.concatenate([kept, reals]))
    return sides[0], sides[1]


def values_of(array: Array, code: str) -> Array:
    """Convert stored numbers to float64, complex ones to pairs."""
    return reference.decode(array.view(reference.real_of_storage(code)), reference.real_of(code))


def assert_lerped(got: Array, before: Array, x: Array, w: float, dst: str, src: str) -> None:
    """Assert the error bound of an unfused update; NaN and infinities as in float64."""
    computed = "f64" if "f64" in map(reference.real_of, (dst, src)) else "f32"
    value, old, new = (values_of(*one) for one in ((got, dst), (before, dst), (x, src)))
    with np.errstate(all="ignore"):
        w = float(w if computed == "f64" else np.float32(w))
        exact = new.astype(np.longdouble) if w == 1 else lerp_in_long_double(before, x, w, dst, src)
        np.testing.assert_array_equal(np.isnan(value), np.isnan(exact))
        moved = np.abs(exact - (0 if w == 1 else old)).astype(float)
        bound = lerp_bound(before, x, w, dst, src) + 2 * unit_roundoff(computed) * moved
        bound += reference.FLOATS[computed].smallest
        # Numbers near the largest may overflow on the way; f64 reaches 16 bits through float32.
        most = reference.FLOATS[reference.real_of(value_code(dst))].largest / 4
        ordinary = np.maximum(np.abs(old), np.abs(new)) < most
        assert ordinary.sum() > 500
        assert np.all(np.abs(value - exact)[ordinary] <= 1.001 * bound[ordinary])


def value_code(form: str) -> str:
    """Return the dtype code of the values that a form of average represents."""
    return "f32" if form == SPLIT else form.strip("~")


def average_pair(form: str, values: Array, src: Any, name: str = "t", **rest: Any) -> Pair:
    """Build a pair for a form of average: a dtype code, ``~`` if randomly rounded, or split."""
    if form != SPLIT:
        written = tensor(values, value_code(form))
        return pair_of(written, src, name, form=form if "~" in form else "", **rest)
    high, low = reference.split(np.where(np.isnan(values), np.float32(np.nan), values))
    residual = tensor(low.view(np.int16), "i16")
    return pair_of(tensor(high, "bf16"), src, name, residual=residual, form=SPLIT, **rest)


def average_of(pair: Pair) -> Array:
    """Return the stored average of a pair; compute a split one from its halves."""
    if pair.form != SPLIT:
        return stored(pair.dst.owner)
    high = stored(pair.dst.owner).astype(np.uint32)
    residual = stored(pair.residual.owner).view(np.uint16).astype(np.uint32)
    up = np.where((high & 0x7FFF) > 0x7F80, 0, residual >> 15)
    return ((high - up << 16) | residual).astype(np.uint32).view(np.float32)


WEIGHTS = [0.0, 2.0**-10, 0.3, 0.77, 1 - 2.0**-30, 1.0]


@pytest.mark.parametrize(("dst", "src"), [*PAIRS, *((SPLIT, src) for src in REAL)])
def test_lerp_of_every_pair_of_floats_is_within_the_bound(dst: str, src: str) -> None:
    code = value_code(dst)
    avg, x = numbers(1500, code, 1), numbers(1500, src, 2)
    for w in WEIGHTS:
        pair = average_pair(dst, avg, tensor(x, src))
        run("lerp", [pair], (w,))
        assert_lerped(average_of(pair), avg, x, w, code, src)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("size", [1.0, 3e-6, 1e-40], ids=["normal", "small", "subnormal"])
@pytest.mark.parametrize("code", ["bf16", "f16"])
def test_random_rounding_is_unbiased_and_gives_a_neighbor(
    code: str, size: float, sign: float
) -> None:
    """`3e-6` is subnormal in float16. The seed is fixed; the limit is six standard deviations."""
    size = 3e-6 if code == "f16" and size < 1e-30 else size
    count = 40_000
    for fraction in (1.1, 1.37, 1.9):
        x = torch.full((count,), sign * size * fraction, dtype=torch.float32)
        avg = torch.zeros(count, dtype=bridge.native(code))
        run("lerp", [pair_of(avg, x, form=f"{code}~")], (1.0,), 5, 6)
        found = avg.double()
        near = found.unique()
        below, above = float(near.min()), float(near.max())
        assert len(near) <= 2
        assert below <= float(x[0].double()) <= above
        gap = max(above - below, 2.0**-133)
        share = (float(found.mean()) - below) / gap
        want = (float(x[0].double()) - below) / gap
        assert abs(share - want) <= 6 * (0.25 / count) ** 0.5


def test_small_steps_move_a_random_average_at_the_right_rate() -> None:
    avg = torch.ones(40_000, dtype=torch.bfloat16)
    x = torch.full((40_000,), 1.01)
    pair = pair_of(avg, x, form="bf16~")
    for step in range(50):
        run("lerp", [pair], (0.001,), 3, step)
    want = 1 + 0.01 * (1 - 0.999**50)
    assert avg.double().mean() == pytest.approx(want, abs=6 * 0.0078 * (0.07 / 40_000) ** 0.5)


def test_random_bits_depend_on_seed_and_step_alone() -> None:
    x = torch.rand(999) + 1

    def rounded(*settings: int) -> Any:
        avg = torch.zeros(999, dtype=torch.bfloat16)
        run("lerp", [pair_of(avg, x, form="bf16~")], (1.0,), *settings)
        return avg

    assert torch.equal(rounded(1, 2), rounded(1, 2))
    assert not torch.equal(rounded(1, 2), rounded(1, 3))
    assert not torch.equal(rounded(1, 2), rounded(2, 2))


def test_random_rounding_keeps_nan_infinity_and_representable_numbers() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.5, -65504.0, 2.0**-24])
    for code in ("bf16", "f16"):
        avg = torch.zeros(len(x), dtype=bridge.native(code))
        run("copy" if code == "" else "lerp", [pair_of(avg, x, form=f"{code}~")], (1.0,), 1, 1)
        want = x.clone()
        if code == "bf16":
            avg[6], want[6] = 0, 0  # not representable
        torch.testing.assert_close(avg.float(), want, rtol=0, atol=0, equal_nan=True)
        assert avg[4].signbit()


@pytest.mark.parametrize("code", ["f16", "bf16"])
def test_finite_counts_by_pair(code: str) -> None:
    x = torch.ones(70, dtype=bridge.native(code))
    x[3], x[9] = torch.nan, -torch.inf
    pairs = [pair_of(one.clone(), one) for one in (x, torch.ones_like(x))]
    np.testing.assert_array_equal(run("finite", pairs), [2, 0])


@pytest.mark.parametrize("operation", ["copy", "cast_back", "swap"])
@pytest.mark.parametrize(("dst", "src"), [*PAIRS, *((SPLIT, src) for src in REAL)])
def test_copies_of_every_pair_of_floats_are_exact(dst: str, src: str, operation: str) -> None:
    code = value_code(dst)
    avg, x = (numbers(3000, one, i, "bits") for i, one in enumerate((code, src)))
    avg, x = with_specials(avg, x, code, src)
    if dst in (SPLIT, "f32"):
        ties = ((np.arange(1 << 16) << 16) | 0x8000).astype(np.uint32).view(np.float32)
        avg = np.concatenate([avg, ties])
        x = np.concatenate([x, reference.cast(ties[::-1].copy(), "f32", src)])
    pair = average_pair(dst, avg, tensor(x, src))
    run(operation, [pair])
    there = reference.cast(x, src, code)
    export = reference.cast if operation == "swap" else reference.export
    back = export(avg, code, src)
    assert_same(average_of(pair), avg if operation == "cast_back" else there, code)
    assert_same(stored(pair.src.owner), x if operation == "copy" else back, src)


@pytest.mark.parametrize("code", [code for code, kind in DTYPES.items() if kind.real is None])
def test_dtypes_without_an_average_are_copied_and_swapped_by_their_bits(code: str) -> None:
    kind = bridge.native(code)
    old, new = (torch.tensor(one, dtype=torch.uint8).repeat(8) for one in ([1, 0, 1], [0, 1, 1]))
    avg, x = old.clone().view(kind), new.clone().view(kind)
    run("copy", [pair_of(avg, x)])
    assert torch.equal(avg.view(torch.uint8), new)
    avg.view(torch.uint8).copy_(old)
    run("swap", [pair_of(avg, x)])
    assert torch.equal(avg.view(torch.uint8), new)
    assert torch.equal(x.view(torch.uint8), old)


# Dtypes of the average, weights, ring and residual.
WINDOWS = [
    *(("f32", "f32", "f32", "f32"), ("f64", "f64", "f64", "f64"), ("f32", "bf16", "bf16", "f32")),
    *(("bf16", "bf16", "bf16", "f32"), ("bf16~", "bf16", "bf16", "f32")),
    *(("f16~", "f16", "f16", "f32"), ("f64", "f32", "f32", "f64"), ("f32", "f64", "f32", "f32")),
    *(("f32", "f64", "f32", "f64"), ("c64", "c64", "c64", "c64")),
]


def window_pair(formats: tuple[str, ...], size: int, window: int) -> Pair:
    """Build the pair of a windowed mean in memory that is filled with sevens."""
    dst, src, ring, rest = (bridge.native(code.strip("~")) for code in formats)
    made = [torch.full((size,), 7, dtype=one) for one in (dst, src, rest)]
    slots = torch.full((window, size), 7, dtype=ring)
    form = formats[0] if "~" in formats[0] else ""
    return pair_of(made[0], made[1], residual=made[2], ring=slots, form=form)


def assert_window(pair: Pair, formats: tuple[str, ...], seen: list[Array], window: int) -> None:
    """Assert that the mean is within the kernels' bound and the ring holds the values."""
    code, src, ring, rest = (code.strip("~") for code in formats)
    want = reference.windowed_mean(np.array(seen[-window:]), window)
    mean = values_of(stored(pair.dst.owner), code)
    residual = values_of(stored(pair.residual.owner), rest)
    wide = "f64" in map(reference.real_of, (code, src))
    u = unit_roundoff("f64" if wide else "f32")
    largest = np.abs(np.array(seen[-2 * window :])).max()
    once = cast_bound(np.abs(want).astype(float), code) * (2 if "~" in formats[0] else 1)
    slack = (
        8 * window * max(u * u, 2.0**-53) * largest + 2 * window * unit_roundoff(rest) * once.max()
    )
    slack += 2.0**-62 * window * largest
    assert np.abs(mean + residual.astype(np.longdouble) - want).max() <= slack
    assert np.all(np.abs(mean - want) <= once * (1 + 1e-3) + slack)
    slots = stored(pair.ring[0].owner)
    for age, values in enumerate(reversed(seen[-window:])):
        slot = (len(seen) - 1 - age) % window
        np.testing.assert_array_equal(values_of(slots[slot], ring), values)


@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("formats", WINDOWS, ids="-".join)
def test_window_mean_matches_ring(formats: tuple[str, ...], window: int) -> None:
    _, src, ring, _ = formats
    pair = window_pair(formats, 500, window)
    seen: list[Array] = []
    for turn in range(1, 2 * window + 10):
        x = numbers(500, src, turn)
        seen.append(values_of(reference.cast(x, src, ring), ring))
        pair.src.owner.copy_(tensor(x, src))
        moment = ((float(min(turn, window)),), 1, turn, window, (turn - 1) % window, turn)
        run("window", [pair], *moment)
        assert_window(pair, formats, seen, window)


# Shape, then the strides of both sides in elements.
LAYOUTS = {
    "row-major": ((6, 5, 8), (40, 8, 1), (40, 8, 1)),
    "transposed": ((6, 80), (1, 6), (1, 6)),
    "channels last": ((4, 6, 5, 7), (210, 1, 42, 6), (210, 1, 42, 6)),
    "differently permuted": ((6, 5, 8), (40, 8, 1), (1, 48, 6)),
    "0-dim": ((), (), ()),
    "empty": ((3, 0, 2), (0, 2, 1), (0, 2, 1)),
    "ones": ((1, 1, 1), (1, 1, 1), (9, 4, 7)),
    "every second": ((70,), (2,), (2,)),
    "rows of a matrix": ((7, 30), (90, 1), (60, 1)),
    "gaps on one side": ((7, 30), (30, 1), (64, 1)),
    "expanded source": ((9, 70), (70, 1), (0, 1)),
    "one source element": ((9, 70), (70, 1), (0, 0)),
}


def lay_out(values: Array, code: str, strides: tuple[int, ...], start: int = 3) -> Any:
    """Build a tensor with these values and strides inside filled memory."""
    source = tensor(values.copy(), code)
    length = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True) if n)
    filler = torch.full((start + length + 9,), 85, dtype=torch.uint8).to(source.dtype)
    placed = filler.as_strided(values.shape, strides, start)
    if values.size and 0 not in strides:
        placed.copy_(source)
    return placed


MOVES = [
    *(("lerp", *codes) for codes in (("f32", "bf16"), ("f32", "f32"), ("c64", "c64"))),
    *(("copy", *codes) for codes in (("f32", "bf16"), ("i16", "i16"), ("c64", "c64"))),
    *(("swap", *codes) for codes in (("i16", "i16"), ("c64", "c64"), (SPLIT, "f32"))),
    *((operation, "f32", "bf16") for operation in ("park", "window")),
]
CASES = [
    pytest.param(*move, layout, id="-".join([*move, layout]))
    for move, layout in product(MOVES, LAYOUTS)
    if not ("source" in layout and move[0] in ("swap", "park"))  # they write to it
]


@pytest.mark.parametrize(("operation", "dst", "src", "layout"), CASES)
def test_all_layouts_give_the_result_and_change_nothing_around_it(
    monkeypatch: pytest.MonkeyPatch, operation: str, dst: str, src: str, layout: str
) -> None:
    """In parts of 37 elements. Swaps are undone: to the bit, NaN included."""
    monkeypatch.setattr(foreach, "AT_ONCE", 37)
    shape, to_strides, of_strides = LAYOUTS[layout]
    size = int(np.prod(shape))

    def made(code: str, seed: int, strides: tuple[int, ...], *slots: int) -> Any:
        values = numbers(size * int(np.prod(slots)), code, seed)
        return lay_out(values.reshape((*slots, *shape)), code, strides, 2 + seed)

    to = made({SPLIT: "bf16"}.get(dst, dst), 1, to_strides)
    of = made(src, 2, of_strides)
    residual = ring = None
    if operation == "window":
        far = (2 + sum(n * s for n, s in zip(shape, to_strides, strict=True)), *to_strides)
        ring = made("bf16", 4, far, 3)
        residual = made("f32", 3, to_strides)
    elif dst == SPLIT:
        residual = made("i16", 3, to_strides)
    pair = pair_of(to, of, residual=residual, ring=ring, form=dst if dst == SPLIT else "")
    around = [torch.ByteTensor().set_(one.untyped_storage()).clone() for one in owners(pair)]
    before = [one.clone() for one in owners(pair)]
    if operation == "window":
        run(operation, [pair], (2.0,), 0, 1, 3, 1, 2)
        torch.testing.assert_close(to, (before[3][0].float() + of.float()) / 2)
        assert torch.equal(ring, torch.stack([before[3][0], of, before[3][2]]))
    else:
        run(operation, [pair], (0.25,))
        if operation == "lerp":
            torch.testing.assert_close(to, before[0] + (of.to(to.dtype) - before[0]) * 0.25)
        elif operation == "copy":
            torch.testing.assert_close(to, of.to(to.dtype), rtol=0, atol=0)
        else:
            run("unpark" if operation == "park" else operation, [pair])
            for one, other in zip(owners(pair), before, strict=True):
                assert torch.equal(bits_of(one), bits_of(other))
    for one, other in zip(owners(pair), before, strict=True):
        if size and 0 not in one.stride():
            one.detach().copy_(other)
    for one, other in zip(owners(pair), around, strict=True):
        assert torch.equal(torch.ByteTensor().set_(one.untyped_storage()), other)


def bits_of(one: Any) -> Any:
    one = one.detach().new_empty(one.numel()).copy_(one.detach().flatten())
    return (torch.view_as_real(one) if one.is_complex() else one).flatten().view(torch.uint8)


@pytest.mark.parametrize("of", ["random", "every upper half"])
def test_swap_of_two_halves_with_float32_is_exact_to_the_bit(of: str) -> None:
    if of == "random":
        words = np.random.default_rng(1).integers(0, 2**32, 100_000, np.uint32)
    else:
        words = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    weights = torch.from_numpy(words.view(np.float32).copy())
    average = reference.split(numbers(len(words), "f32", 3))
    high, low = tensor(average[0], "bf16"), tensor(average[1].view(np.int16), "i16")
    pair = pair_of(high, weights, residual=low, form=SPLIT)
    held = [bits_of(one).clone() for one in owners(pair)]
    run("swap", [pair])
    np.testing.assert_array_equal(weights.numpy(), numbers(len(words), "f32", 3))
    run("swap", [pair])
    assert all(map(torch.equal, map(bits_of, owners(pair)), held))


def test_operations_without_torch_functions_are_refused() -> None:
    ones = torch.ones(3)
    with pytest.raises(DTypeError, match=r"^lerp_: torch has no functions.*lerp, add"):
        foreach.substitute("lerp_", [pair_of(ones, ones.clone())])
    whole = torch.ones(3, dtype=torch.int64)
    for operation in ("lerp", "add", "finite", "window"):
        with pytest.raises(DTypeError, match="i64 is not averaged"):
            foreach.substitute(operation, [pair_of(whole, whole.clone())])
