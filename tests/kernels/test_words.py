"""Every word means the same as plain Python and in a kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from numba import njit, types

from fastema.kernels import formats, scalar, words

from ..support import reference

EDGES = [0, 1, 2, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
SHIFTS = [0, 1, 13, 16, 31]
HALVES = np.arange(1 << 16, dtype=np.uint16)

converts_half = pytest.mark.skipif(
    not formats.CONVERTS_HALF, reason="the processor compiled for cannot convert halves"
)

TINY, HUGE = 1.4e-45, 3.4028235e38

REALS = [0.0, -0.0, 1.0, -1.0, 3.1415927, TINY, -TINY, 1.1754944e-38, HUGE, -HUGE, np.inf, np.nan]


def _pairs(second: list[int]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(11)
    random = generator.integers(0, 1 << 32, 300).tolist()
    first, other = zip(*product(EDGES + random, second), strict=True)
    return np.array(first, np.uint32), np.array(other, np.uint32)


def _in_kernel(word: Callable[..., object], result: np.dtype, *columns: np.ndarray) -> np.ndarray:
    """What a word gives in a compiled loop, which is where it is vectorised."""
    out = np.empty(len(columns[0]), result)
    if len(columns) == 1:

        @njit
        def one(out, a):
            for i in range(len(out)):
                out[i] = word(a[i])

        one(out, *columns)
    elif len(columns) == 2:

        @njit
        def two(out, a, b):
            for i in range(len(out)):
                out[i] = word(a[i], b[i])

        two(out, *columns)
    else:

        @njit
        def three(out, a, b, c):
            for i in range(len(out)):
                out[i] = word(a[i], b[i], c[i])

        three(out, *columns)
    return out


def _in_python(word: Callable[..., object], result: np.dtype, *columns: np.ndarray) -> np.ndarray:
    values = [word(*row) for row in zip(*columns, strict=True)]
    assert all(np.result_type(value) == result for value in values)
    return np.array(values, result)


INTEGER_WORDS = {
    "add32": (lambda x, y: (x + y) % 2**32, EDGES),
    "sub32": (lambda x, y: (x - y) % 2**32, EDGES),
    "mul32": (lambda x, y: (x * y) % 2**32, [*EDGES, 0x7FEB352D, 0x846CA68B]),
    "and32": (lambda x, y: x & y, EDGES),
    "or32": (lambda x, y: x | y, EDGES),
    "xor32": (lambda x, y: x ^ y, EDGES),
    "shl32": (lambda x, y: (x << y) % 2**32, SHIFTS),
    "shr32": (lambda x, y: x >> y, SHIFTS),
    "above32": (lambda x, y: x > y, EDGES),
}


@pytest.mark.parametrize("name", INTEGER_WORDS)
def test_integer_words(name: str) -> None:
    plain, second = INTEGER_WORDS[name]
    word = getattr(words, name)
    x, y = _pairs(second)
    kind = np.dtype(bool) if name == "above32" else np.dtype(np.uint32)
    want = np.array([plain(int(a), int(b)) for a, b in zip(x, y, strict=True)], kind)
    np.testing.assert_array_equal(_in_python(word, kind, x, y), want)
    np.testing.assert_array_equal(_in_kernel(word, kind, x, y), want)


def test_select32() -> None:
    x, y = _pairs(EDGES)
    chosen = (x >> np.uint32(3)) % 2 == 1
    want = np.where(chosen, x, y)
    kind = np.dtype(np.uint32)
    np.testing.assert_array_equal(_in_python(words.select32, kind, chosen, x, y), want)
    np.testing.assert_array_equal(_in_kernel(words.select32, kind, chosen, x, y), want)


def test_widths_change_without_loss_of_the_low_bits() -> None:
    wide, narrow = np.dtype(np.uint32), np.dtype(np.uint16)
    sparse = HALVES[:: 1 << 8]
    for run, words16 in ((_in_python, sparse), (_in_kernel, HALVES)):
        np.testing.assert_array_equal(run(words.widen16, wide, words16), words16.astype(wide))
        x, _ = _pairs([0])
        np.testing.assert_array_equal(run(words.narrow16, narrow, x), x.astype(narrow))


def test_halves_of_64_bits() -> None:
    x, y = (column.astype(np.int64) for column in _pairs(EDGES))
    whole = (x << 32) | y  # of both signs
    assert (whole < 0).any()
    kind = np.dtype(np.uint32)
    for run in (_in_python, _in_kernel):
        np.testing.assert_array_equal(run(words.low32, kind, whole), y.astype(kind))
        np.testing.assert_array_equal(run(words.high32, kind, whole), x.astype(kind))


def test_whole_numbers_as_floats_and_back() -> None:
    whole = np.array([0, 1, 2, 65_535, 2**22 - 1, 2**24 - 1, 2**24, 2**30], np.uint32)
    floats = np.array([0.0, 0.99999994, 1.5, 8_388_607.5, 2.0**30], np.float32)
    for run in (_in_python, _in_kernel):
        got = run(words.float_of_int, np.dtype(np.float32), whole)
        np.testing.assert_array_equal(got, whole.astype(np.float32))
        got = run(words.int_of_float, np.dtype(np.uint32), floats)
        np.testing.assert_array_equal(got, [0, 0, 1, 8_388_607, 2**30])


@pytest.mark.parametrize("code", ["f32", "f64"])
def test_nan_becomes_zero(
    code: str, numbers: Callable[..., np.ndarray], bits: Callable[..., np.ndarray]
) -> None:
    kind = np.dtype(np.float32 if code == "f32" else np.float64)
    values = np.concatenate([np.array([*REALS, -np.nan], kind), numbers(3000, code, 1)])
    want = np.where(np.isnan(values), kind.type(0), values)
    assert np.isnan(values).sum() == 2
    for run in (_in_python, _in_kernel):
        np.testing.assert_array_equal(bits(run(words.nan_to_zero, kind, values)), bits(want))


@pytest.mark.parametrize("code", ["f32", "f64"])
def test_sum_in_any_order(code: str, numbers: Callable[..., np.ndarray]) -> None:
    # Of small whole numbers, every order gives the same.
    kind = np.dtype(np.float32 if code == "f32" else np.float64)
    sum_any_order = words.sum_any_order
    values = np.random.default_rng(3).integers(-1000, 1000, 4001).astype(kind)

    def total(values):
        found = kind.type(0)
        for i in range(len(values)):
            found = sum_any_order(found, values[i])
        return found

    assert total(values) == values.sum()

    real = np.float32 if code == "f32" else np.float64

    @njit
    def compiled(values):
        found = real(0)
        for i in range(len(values)):
            found = sum_any_order(found, values[i])
        return found

    assert compiled(values) == values.sum()
    assert np.isnan(compiled(np.append(values, kind.type(np.nan))))
    x, y = numbers(900, code, 1), numbers(900, code, 2)
    np.testing.assert_array_equal(_in_kernel(sum_any_order, kind, x, y), x + y)
    np.testing.assert_array_equal(_in_python(sum_any_order, kind, x, y), x + y)


def test_bits_of_floats(
    numbers: Callable[..., np.ndarray], bits: Callable[..., np.ndarray]
) -> None:
    floats = numbers(4000, "f32", 1, "bits")
    pattern = floats.view(np.uint32)
    for run in (_in_python, _in_kernel):
        np.testing.assert_array_equal(run(words.bits32, np.dtype(np.uint32), floats), pattern)
        back = run(words.float_of_bits32, np.dtype(np.float32), pattern)
        # A signalling NaN may come back quiet where a float passes through a register.
        np.testing.assert_array_equal(bits(back) | 0x00400000, pattern | 0x00400000)


@converts_half
def test_half_to_float_for_every_half(assert_same: Callable[..., None]) -> None:
    want = reference.cast(HALVES.view(np.float16), "f16", "f32")
    for run in (_in_python, _in_kernel):
        with np.errstate(invalid="ignore"):
            got = run(words.half_to_float, np.dtype(np.float32), HALVES)
        assert_same(got, want, "f32")


@converts_half
def test_float_to_half_around_every_half(assert_same: Callable[..., None]) -> None:
    values = _around_every_half()
    want = reference.cast(values, "f32", "f16")
    got = _in_kernel(words.float_to_half, np.dtype(np.uint16), values)
    assert_same(got.view(np.float16), want, "f16")
    some = slice(None, None, 97)
    got = _in_python(words.float_to_half, np.dtype(np.uint16), values[some])
    assert_same(got.view(np.float16), want[some], "f16")


def _around_every_half() -> np.ndarray:
    finite = np.sort(reference.decode(np.arange(0x7C00, dtype=np.uint16).view(np.float16), "f16"))
    middle = ((finite + np.append(finite[1:], 65536.0)) / 2).astype(np.float32)
    near = [np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))]
    values = np.concatenate([finite.astype(np.float32), *near])
    return np.concatenate([values, -values, np.array([np.inf, -np.inf, np.nan], np.float32)])


@pytest.mark.parametrize("code", ["f32", "f64"])
def test_fma_is_rounded_once(
    code: str, numbers: Callable[..., np.ndarray], assert_same: Callable[..., None]
) -> None:
    kind = np.dtype(np.float32 if code == "f32" else np.float64)
    edges = np.array(list(product(REALS, repeat=3)), np.float64)
    if code == "f64":
        scale = {TINY: 5e-324, HUGE: 1.7976931348623157e308}
        edges = np.vectorize(lambda v: np.copysign(scale.get(abs(v), abs(v)), v))(edges)
    random = [numbers(1500, code, seed, kind) for seed in (1, 2, 3) for kind in ("weights", "bits")]
    x, y, z = (
        np.concatenate([edges[:, i].astype(kind), *random[2 * i : 2 * i + 2]]) for i in range(3)
    )
    # Products that the addend cancels but for their low digits.
    with np.errstate(all="ignore"):
        x, y, z = (
            np.append(x, x[-1500:]),
            np.append(y, y[-1500:]),
            np.append(z, -x[-1500:] * y[-1500:]),
        )
        exact = reference._fma32 if code == "f32" else reference._fma64
        wide = [side.astype(np.float64) for side in (x, y, z)]
        want = np.array([exact(w, d[None], a[None])[0] for w, d, a in zip(*wide, strict=True)])
        assert_same(_in_kernel(words.fma, kind, x, y, z), want.astype(kind), code)
        assert_same(_in_python(words.fma, kind, x, y, z), want.astype(kind), code)


POINTERS = {
    "u8": np.uint8,
    "u16": np.uint16,
    "u32": np.uint32,
    "i64": np.int64,
    "f32": np.float32,
    "f64": np.float64,
}


@pytest.mark.parametrize("name", POINTERS)
def test_memory_words(name: str) -> None:
    pointer = getattr(words, f"pointer_{name}")
    load, store = words.load, words.store
    load_dst, load_src = words.load_dst, words.load_src
    load_residual, load_ring = words.load_residual, words.load_ring
    store_dst, store_src = words.store_dst, words.store_src
    store_residual, store_ring = words.store_residual, words.store_ring

    def rotate(one, two, three, four, n):
        to, of, residual, ring = pointer(one), pointer(two), pointer(three), pointer(four)
        for i in range(n):
            a, b, c, d = (
                load_dst(to, i),
                load_src(of, i),
                load_residual(residual, i),
                load_ring(ring, i),
            )
            store_dst(to, i, b)
            store_src(of, i, c)
            store_residual(residual, i, d)
            store_ring(ring, i, a)
        store(of, n, load(to, 0))
        return load(to, 0)

    for run in (rotate, njit(rotate)):
        values = np.arange(3, 43).astype(POINTERS[name]).reshape(4, 10)
        sides = [row.copy() for row in values]
        first = run(*(side.ctypes.data for side in sides), 9)
        assert first == values[1, 0]
        want = np.roll(values, -1, axis=0)
        want[:, 9] = values[:, 9]
        want[1, 9] = values[1, 0]
        np.testing.assert_array_equal(sides, want)


def test_prefetch_of_any_address_is_harmless() -> None:
    prefetch = words.prefetch

    @njit
    def ask(address):
        prefetch(address)

    for address in (0, 1, 8, 2**47 - 1, -1):
        ask(address)
        assert prefetch(address) is None


def test_fetch_add_is_atomic() -> None:
    fetch_add = words.fetch_add
    cell, threads, times = np.array([5], np.int64), 4, 20_000
    address = cell.ctypes.data
    assert fetch_add(address, 2) == 5
    assert cell[0] == 7

    @njit(types.void(types.int64, types.int64[:]), nogil=True)
    def take(address, taken):
        for i in range(len(taken)):
            taken[i] = fetch_add(address, 1)

    taken = [np.zeros(times, np.int64) for _ in range(threads)]
    pool = [threading.Thread(target=take, args=(address, part)) for part in taken]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    # Every number was handed out once.
    np.testing.assert_array_equal(np.sort(np.concatenate(taken)), 7 + np.arange(threads * times))


def test_float_to_bf16_is_the_nearest() -> None:
    generator = np.random.default_rng(5)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000
    floats = np.concatenate((bits, ties, ties - 1, ties + 1, ties & 0xFFFF0000)).view(np.float32)
    found = _in_kernel(words.float_to_bf16, np.uint16, floats)
    nan = np.isnan(floats)
    assert (found[nan] == 0x7FFF).all()
    np.testing.assert_array_equal(found[~nan], reference.cast(floats[~nan], "f32", "bf16"))
    for x, want in zip(floats[::997], found[::997], strict=True):
        assert words.float_to_bf16(x) == want


def test_random_rounding_on_a_gpu_is_that_of_the_cpu() -> None:
    """Of what arithmetic on bfloat16 numbers gives; a NaN there has all bits set, and stays one."""
    generator = np.random.default_rng(6)
    bits = generator.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    floats = bits.view(np.float32)
    noise = generator.integers(0, 1 << 16, len(bits), dtype=np.uint32)
    there = _in_kernel(scalar.encode_bf16_of_bf16_random_gpu, np.uint16, floats, noise)
    here = _in_kernel(scalar.encode_bf16_of_bf16_random, np.uint16, floats, noise)
    nan = np.isnan(floats)
    np.testing.assert_array_equal(there[~nan], here[~nan])
    canonical = np.full(100, 0x7FFFFFFF, np.uint32).view(np.float32)
    assert (
        _in_kernel(scalar.encode_bf16_of_bf16_random_gpu, np.uint16, canonical, noise[:100])
        == 0x7FFF
    ).all()
