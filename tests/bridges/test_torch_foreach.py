"""PyTorch's functions, which replace our kernels on a GPU without them, against CPU kernels."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.bridges import torch_foreach as foreach
from fastema.engine.program import Program
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


def copy_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Copy pairs to other memory, with the same gaps and shared storages."""
    made: dict[int, Any] = {}

    def copied(one: Any) -> Any:
        if one is None:
            return None
        old = one.detach().untyped_storage()
        storage = made.setdefault(old.data_ptr(), old.clone())
        empty = torch.empty(0, dtype=one.dtype)
        return empty.set_(storage, one.storage_offset(), one.shape, one.stride())

    def again(pair: Pair) -> Pair:
        residual, ring = pair.residual and pair.residual.owner, pair.ring and pair.ring[0].owner
        dst, src, residual, ring = map(copied, (pair.dst.owner, pair.src.owner, residual, ring))
        return pair_of(dst, src, pair.name, residual, ring, form=pair.form)

    return list(map(again, pairs))


def owners(pair: Pair) -> list[Any]:
    """Return the tensors of a pair."""
    specs = [pair.dst, pair.src, pair.residual, pair.ring and pair.ring[0]]
    return [spec.owner for spec in specs if spec is not None]


def run(operation: str, pairs: Sequence[Pair], numbers: Any = (0.0,), *settings: int) -> Any:
    """Run the substitute once."""
    return foreach.substitute(operation, pairs)(LaunchArgs(numbers, *settings))


def run_kernels(operation: str, pairs: Sequence[Pair], numbers: Any = (0.0,), *settings: int):
    """Run the kernels once."""
    Program({"all": pairs}).run({"all": operation}, LaunchArgs(numbers, *settings))


def run_both(operation: str, pairs: Sequence[Pair], *arguments: Any):
    """Run the substitute on the pairs and the kernels on copies; return the copies."""
    others = copy_pairs(pairs)
    run(operation, pairs, *arguments)
    run_kernels(operation, others, *arguments)
    return others


def assert_same_bits(pairs: Sequence[Pair], others: Sequence[Pair]) -> None:
    """Assert that all bytes of the storages are equal, gaps included."""
    for pair, other in zip(pairs, others, strict=True):
        for sides in zip(owners(pair), owners(other), strict=True):
            one, two = (torch.ByteTensor().set_(side.untyped_storage()) for side in sides)
            assert torch.equal(one, two), pair.name


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


def assert_lerped(
    got: Array, before: Array, x: Array, w: float, dst: str, src: str, kernels: Array
) -> None:
    """Assert the error bound of an unfused update, and the kernels' NaN and infinities."""
    value, theirs = values_of(got, dst), values_of(kernels, dst)
    np.testing.assert_array_equal(np.isnan(value), np.isnan(theirs))
    infinite = np.isinf(value) | np.isinf(theirs)
    np.testing.assert_array_equal(value[infinite], theirs[infinite])
    finite = np.isfinite(theirs)
    assert finite.sum() > 500
    computed = "f64" if "f64" in map(reference.real_of, (dst, src)) else "f32"
    if reference.decode(reference.encode(np.array([w]), computed), computed) == 1:
        want = reference.cast(x, src, dst)  # regardless of the old average
        np.testing.assert_array_equal(value, values_of(want, dst))
        return
    with np.errstate(all="ignore"):
        exact = lerp_in_long_double(before, x, w, dst, src)
        moved = np.abs(exact - values_of(before, dst)).astype(float)
        bound = lerp_bound(before, x, w, dst, src) + 2 * unit_roundoff(computed) * moved
        bound += reference.FLOATS[computed].smallest
        assert np.all(np.abs(value - exact)[finite] <= bound[finite])


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
    avg, x = with_specials(numbers(1500, code, 1), numbers(1500, src, 2), code, src)
    for w in WEIGHTS:
        pair = average_pair(dst, avg, tensor(x, src))
        (other,) = run_both("lerp", [pair], (w,))
        assert_lerped(average_of(pair), avg, x, w, code, src, average_of(other))


# Whole shape and offset of a shard, whose indices may pass a multiple of 2**32.
WHOLES = {
    "whole": (None, None),
    "part": ((40, 9, 60), (3, 2, 5)),
    "far on": ((2**20, 2**10, 2**10), (2**19, 7, 0)),
    "over the border": ((1000, 5000, 1001), (855, 673, 600)),
}


@pytest.mark.parametrize("place", WHOLES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize(("code", "src"), [("bf16", "f32"), ("f16", "f64")])
def test_random_bits_equal_those_of_the_kernels(
    code: str, src: str, order: tuple[int, ...], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach, "AT_ONCE", 999)
    shape = (11, 6, 35)
    avg, x = (numbers(11 * 6 * 35, one, i) for i, one in enumerate((code, src)))
    x[::3] *= 2.0**-20 if code == "f16" else 2.0**-130  # subnormal numbers
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
    # At weight 1 the random rounding is the only one.
    for operation in ("lerp",):
        run(operation, [pair], (1.0,), 2**40 + 3, 2**33 + 7)
        run_kernels(operation, [other], (1.0,), 2**40 + 3, 2**33 + 7)
        assert torch.equal(sides[0].view(torch.int16), again.view(torch.int16))


def halfway(code: str, size: int = 1000) -> Array:
    """Return float64 numbers near 16-bit midpoints, where rounding twice is wrong."""
    bits = np.random.default_rng(1).integers(0x0400, 0x7400, size).astype(np.uint16)
    form = reference.FLOATS[code].storage
    ends = [reference.decode((bits + i).astype(np.uint16).view(form), code) for i in (0, 1)]
    middle = (ends[0] + ends[1]) / 2
    return np.concatenate([middle, *(middle * (1 + s * 2.0**-40) for s in (1, -1))])


@pytest.mark.parametrize("operation", ["copy", "cast_back", "swap"])
@pytest.mark.parametrize(("dst", "src"), [*PAIRS, *((SPLIT, src) for src in REAL)])
def test_copies_of_every_pair_of_floats_are_exact(dst: str, src: str, operation: str) -> None:
    code = value_code(dst)
    avg, x = (numbers(3000, one, i, "bits") for i, one in enumerate((code, src)))
    avg, x = with_specials(avg, x, code, src)
    if dst == SPLIT:
        ties = ((np.arange(1 << 16) << 16) | 0x8000).astype(np.uint32).view(np.float32)
        avg = np.concatenate([avg, ties])
        x = np.concatenate([x, reference.cast(ties[::-1].copy(), "f32", src)])
    for one, other, array in ((src, code, x), (code, src, avg)):
        if one == "f64" and other in ("f16", "bf16"):
            array[:3000] = halfway(other)
    pair = average_pair(dst, avg, tensor(x, src))
    (other,) = run_both(operation, [pair])
    there = reference.cast(x, src, code)
    export = reference.cast if operation == "swap" else reference.export
    back = export(avg, code, src)
    assert_same(average_of(pair), avg if operation == "cast_back" else there, code)
    assert_same(stored(pair.src.owner), x if operation == "copy" else back, src)
    if (dst, src) == (SPLIT, "f32"):  # a conversion may change the bits of NaN
        assert_same_bits([pair], [other])


# Dtypes of the average, weights, ring and residual.
WINDOWS = [
    *(("f32", "f32", "f32", "f32"), ("f64", "f64", "f64", "f64"), ("f32", "bf16", "bf16", "f32")),
    *(("bf16", "bf16", "bf16", "f32"), ("bf16~", "bf16", "bf16", "f32")),
    *(("f16~", "f16", "f16", "f32"), ("f64", "f32", "f32", "f64"), ("f32", "f64", "f32", "f32")),
    *(("f32", "f64", "f16", "f64"), ("c64", "c64", "c64", "c64")),
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
    slack = 8 * window * u * u * largest + 2 * window * unit_roundoff(rest) * once.max()
    slack += 2.0**-62 * window * largest
    assert np.abs(mean + residual.astype(np.longdouble) - want).max() <= slack
    assert np.all(np.abs(mean - want) <= once * (1 + 1e-3) + slack)
    slots = stored(pair.ring[0].owner)
    for age, values in enumerate(reversed(seen[-window:])):
        slot = (len(seen) - 1 - age) % window
        np.testing.assert_array_equal(values_of(slots[slot], ring), values)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("formats", WINDOWS, ids="-".join)
def test_window_mean_matches_ring(formats: tuple[str, ...], window: int, in_turn: bool) -> None:
    _, src, ring, _ = formats
    pair = window_pair(formats, 500, window)
    seen: list[Array] = []
    for turn in range(1, 2 * window + 10):
        x = numbers(500, src, turn)
        seen.append(values_of(reference.cast(x, src, ring), ring))
        pair.src.owner.copy_(tensor(x, src))
        moment = ((float(min(turn, window)),), 1, turn, window, (turn - 1) % window, turn)
        by_kernels = in_turn and turn // 3 % 2  # from the substitute's state
        (run_kernels if by_kernels else run)("window", [pair], *moment)
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
    *(("lerp", *codes) for codes in (("bf16~", "f32"), (SPLIT, "f32"))),
    *(("copy", *codes) for codes in (("f32", "bf16"), ("i16", "i16"), ("c64", "c64"))),
    *(("swap", *codes) for codes in (("i16", "i16"), ("c64", "c64"), (SPLIT, "f32"))),
    *((operation, "f32", "bf16") for operation in ("park", "unpark", "window")),
]
CASES = [
    pytest.param(*move, layout, id="-".join([*move, layout]))
    for move, layout in product(MOVES, LAYOUTS)
    if not ("source" in layout and move[0] in ("swap", "park", "unpark"))  # they write to it
]


@pytest.mark.parametrize(("operation", "dst", "src", "layout"), CASES)
def test_all_layouts_match_kernels(operation: str, dst: str, src: str, layout: str) -> None:
    shape, to_strides, of_strides = LAYOUTS[layout]
    size = int(np.prod(shape))

    def made(code: str, seed: int, strides: tuple[int, ...], *slots: int) -> Any:
        values = numbers(size * int(np.prod(slots)), code, seed)
        return lay_out(values.reshape((*slots, *shape)), code, strides, 2 + seed)

    to = made({SPLIT: "bf16"}.get(dst, dst.strip("~")), 1, to_strides)
    of = made(src, 2, of_strides)
    if operation == "window":
        far = (2 + sum(n * s for n, s in zip(shape, to_strides, strict=True)), *to_strides)
        ring = made("bf16", 4, far, 3)
        pair = pair_of(to, of, residual=made("f32", 3, to_strides), ring=ring)
        before, (other,) = ring.clone(), copy_pairs([pair])
        run(operation, [pair], (2.0,), 0, 1, 3, 1, 2)
        torch.testing.assert_close(to, (before[0].float() + of.float()) / 2)
        assert torch.equal(ring, torch.stack([before[0], of, before[2]]))
    else:
        residual = made("i16", 3, to_strides) if dst == SPLIT else None
        pair = pair_of(to, of, residual=residual, form=dst if dst == SPLIT or "~" in dst else "")
        (other,) = run_both(operation, [pair], (0.25,))
        if operation != "lerp":
            assert_same_bits([pair], [other])
        elif "~" in dst:  # except where an earlier rounding differed
            assert (to != other.dst.owner).sum() <= size // 100
        else:
            np.testing.assert_allclose(average_of(pair), average_of(other), rtol=1e-6, atol=1e-6)
    # The memory around the elements is unchanged.
    for one in (one for both in (pair, other) for one in owners(both)):
        one.detach().zero_()
    assert_same_bits([pair], [other])


def test_operations_without_torch_functions_are_refused() -> None:
    ones = torch.ones(3)
    with pytest.raises(DTypeError, match=r"^lerp_: torch has no functions.*lerp, add"):
        foreach.substitute("lerp_", [pair_of(ones, ones.clone())])
    whole = torch.ones(3, dtype=torch.int64)
    for operation in ("lerp", "add", "finite", "window"):
        with pytest.raises(DTypeError, match="i64 is not averaged"):
            foreach.substitute(operation, [pair_of(whole, whole.clone())])


@pytest.mark.parametrize("w", [1e-5, 0.3])
@pytest.mark.parametrize(("code", "src"), [("bf16", "bf16"), ("bf16", "f32"), ("f16", "f32")])
def test_small_steps_are_dithered_as_by_the_kernels(code: str, src: str, w: float) -> None:
    avg = numbers(60_000, code, 1)
    near = reference.decode(avg, code) * (1 + np.random.default_rng(2).normal(size=60_000) * 0.02)
    x = reference.encode(near, src)
    there, here = tensor(avg, code), tensor(avg, code)
    source = tensor(x, src)
    run("lerp", [pair_of(there, source, form=f"{code}~")], (w,), 3, 4)
    run_kernels("lerp", [pair_of(here, source, form=f"{code}~")], (w,), 3, 4)
    differ = there.view(torch.int16) != here.view(torch.int16)
    assert differ.sum() <= 3  # products are not always fused there
    assert (here.view(torch.int16) != tensor(avg, code).view(torch.int16)).sum() > 10 * w
