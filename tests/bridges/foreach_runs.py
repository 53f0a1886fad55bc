"""Pairs of tensors, and runs of PyTorch's functions beside the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch

from fastema.bridges import torch as bridge
from fastema.bridges import torch_foreach as foreach
from fastema.engine.program import Program
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DTYPES
from fastema.layout.group import Pair

from ..support import reference
from ..support.tolerance import exact_lerp, lerp_bound, unit_roundoff

REAL = [code for code, kind in DTYPES.items() if kind.real and kind.parts == 1]
COMPLEX = [code for code, kind in DTYPES.items() if kind.parts == 2]
PAIRS = [*product(REAL, REAL), *product(COMPLEX, COMPLEX)]
SPLIT = "bf16+16"
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

    def made_of(pair: Pair) -> tuple[Any, ...]:
        residual = None if pair.residual is None else copied(pair.residual.owner)
        ring = None if pair.ring is None else copied(pair.ring[0].owner)
        return copied(pair.dst.owner), copied(pair.src.owner), pair.name, residual, ring

    return [
        pair_of(*made_of(pair), form=pair.form, average_index=pair.average_index) for pair in pairs
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


def run_both(operation: str, pairs: Sequence[Pair], *arguments: Any):
    """The substitute on the pairs, and the kernels on their twins, which are returned."""
    others = twin(pairs)
    run(operation, pairs, *arguments)
    run_kernels(operation, others, *arguments)
    return others


def assert_same_bits(pairs: Sequence[Pair], others: Sequence[Pair]) -> None:
    """Every byte of their storages is equal, gaps included."""
    for pair, other in zip(pairs, others, strict=True):
        for sides in zip(owners(pair), owners(other), strict=True):
            one, two = (torch.ByteTensor().set_(side.untyped_storage()) for side in sides)
            assert torch.equal(one, two), pair.name


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


def kept_as(form: str) -> str:
    """The dtype code of the numbers that an average of a form stands for."""
    return "f32" if form == SPLIT else form.strip("~")


def average_pair(form: str, values: Array, src: Any, name: str = "t", **rest: Any) -> Pair:
    """A pair whose average has a form: a dtype code, one rounded by random bits, or two halves."""
    if form != SPLIT:
        written = tensor(values, kept_as(form))
        return pair_of(written, src, name, form=form if "~" in form else "", **rest)
    clean = np.where(np.isnan(values), np.float32(np.nan), values)
    bits = clean.view(np.uint32)
    up = np.where(np.isnan(clean), 0, bits >> 15 & 1)
    high = tensor(((bits >> 16) + up).astype(np.uint16), "bf16")
    low = tensor((bits & 0xFFFF).astype(np.uint16).view(np.int16), "i16")
    return pair_of(high, src, name, residual=low, form=SPLIT, **rest)


def average_of(pair: Pair) -> Array:
    """The average of a pair as stored; what two halves stand for by arithmetic on them."""
    if pair.form != SPLIT:
        return stored(pair.dst.owner)
    high = stored(pair.dst.owner).astype(np.uint32)
    residual = stored(pair.residual.owner).view(np.uint16).astype(np.uint32)
    up = np.where((high & 0x7FFF) > 0x7F80, 0, residual >> 15)
    return ((high - up << 16) | residual).astype(np.uint32).view(np.float32)


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
