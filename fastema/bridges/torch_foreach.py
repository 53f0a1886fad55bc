"""The kernels' operations in torch's own functions, slower, for devices without kernels.

``substitute`` cuts pairs into pieces of at most :data:`AT_ONCE` elements, so the memory needed does
not grow with the model. An operation is a function of a piece and of a run.

Differences from the kernels: products and sums are rounded one by one in the compute dtype. A
windowed mean is computed from its whole ring at every update. Stochastic rounding draws its numbers
from torch's generator, seeded with the seed and the step: it is as unbiased, but the bits differ
from the kernels', and from those of a run with other shards or another order of tensors. Updates
too small for float32 (below 2**-24 of the average) are lost. Float64 may be rounded to 16 bits by
way of float32. Formats and swaps are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastema.errors import DTypeError
from fastema.kernels.operations import OPERATIONS
from fastema.layout.device_context import LaunchArgs, Substitute
from fastema.layout.group import Pair, kernel_format

__all__ = ["AT_ONCE", "LaunchArgs", "substitute"]

AT_ONCE: Final = 1 << 22
"""Maximum elements per piece; with at most 64 bytes of temporaries for each that is 256 MB."""

_SPLIT: Final = "bf16+16"
_WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Piece(NamedTuple):
    """A part of a pair; complex numbers are pairs of reals, and operations on bits see integers.

    ``real`` is the compute dtype: float64 if either side is float64, otherwise float32; for
    operations on bits an integer dtype. ``form`` is that of :class:`Pair`. The first axis of
    ``ring`` is its slots.
    """

    row: int
    average_index: int
    real: torch.dtype
    form: str
    dst: Tensor
    src: Tensor
    residual: Tensor
    ring: Tensor


class _Run:
    """The arguments of one run, and a seeded generator for each device."""

    def __init__(self, args: LaunchArgs) -> None:
        self.args = args
        self._generators: dict[torch.device, torch.Generator] = {}

    def weight(self, piece: _Piece) -> float:
        """Return the weight of the new value, rounded to the compute dtype."""
        number = self.args.numbers[piece.average_index]
        return float(number if piece.real == torch.float64 else np.float32(number))

    def noise(self, like: Tensor, bits: int) -> Tensor:
        """Return random int32 numbers of this many bits, in the shape of a tensor."""
        generator = self._generators.get(like.device)
        if generator is None:
            seed = (self.args.seed * 0x9E3779B97F4A7C15 + self.args.step) % 2**63
            generator = torch.Generator(like.device).manual_seed(seed)
            self._generators[like.device] = generator
        return torch.randint(
            1 << bits, like.shape, generator=generator, dtype=torch.int32, device=like.device
        )


# -- forms -----------------------------------------------------------------------------------------


_STOCHASTIC: Final = {
    "f16~": (13, 2.0**-14, 65504.0),
    "bf16~": (16, 0.0, torch.finfo(torch.bfloat16).max),
}
"""By form: bits of a float32 that the format drops; its smallest normal number if float32 has
smaller ones, otherwise 0; its largest number."""


def _load(piece: _Piece) -> Tensor:
    """Return the written side in the compute dtype."""
    if piece.form == _SPLIT:
        return _unpark_bits(*_halves(piece)).view(torch.float32).to(piece.real)
    return piece.dst.to(piece.real)


def _store(piece: _Piece, values: Tensor, run: _Run) -> None:
    """Round values to the written side, to nearest or stochastically."""
    if piece.form == _SPLIT:
        bits = values.to(torch.float32).view(torch.int32)
        _store_halves(piece, bits, _round_high(bits))
    elif piece.form in _STOCHASTIC:
        piece.dst.copy_(_round_stochastically(piece.form, values.to(torch.float32), run))
    else:
        piece.dst.copy_(values)


def _round_stochastically(form: str, values: Tensor, run: _Run) -> Tensor:
    """Return one of the two nearest numbers of the form: a random one, with expectation ``values``.

    Values beyond the largest number are returned as they are, to be rounded to nearest.
    """
    dropped, lift, largest = _STOCHASTIC[form]
    size = values.abs()
    shift = (size < lift).to(torch.float32) * lift  # aligns the last places of subnormal results
    lifted = size + shift
    bits = lifted.view(torch.int32) + run.noise(values, dropped)
    rounded = (bits & -(1 << dropped)).view(torch.float32) - shift
    return torch.where(size < largest, rounded.copysign(values), values)


def _halves(piece: _Piece) -> tuple[Tensor, Tensor]:
    return piece.dst.to(torch.int32), piece.residual.to(torch.int32)


def _store_halves(piece: _Piece, bits: Tensor, high: Tensor) -> None:
    piece.dst.copy_(high)
    piece.residual.copy_(((bits & 0xFFFF) ^ 0x8000) - 0x8000)  # the low half as a signed number


# -- float32 and bfloat16 in 48 bits ---------------------------------------------------------------
# Halves are signed here: shifts are arithmetic and no value leaves its range.


def _round_high(bits: Tensor) -> Tensor:
    """Return ``fastema.kernels.scalar.park_model`` of the bits."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    high = bits >> 16
    quiet = ((high & 0x7F) == 0).to(torch.int32) * 0x40
    return torch.where(nan, high | quiet, (bits >> 15 & 1) + high)


def _unpark_bits(model: Tensor, parked: Tensor) -> Tensor:
    """Return the float32 whose :func:`_round_high` is ``model``; ``parked`` has its low half."""
    nan = (model & 0x7FFF) > 0x7F80
    return (model - (parked >> 15 & 1).masked_fill(nan, 0)) * (1 << 16) | parked & 0xFFFF


def _stow_bits(bits: Tensor) -> Tensor:
    """Return ``fastema.kernels.scalar.stow_high`` of the bits."""
    nan = (bits & 0x7FFFFFFF) > 0x7F80FFFF
    high = bits >> 16
    rounded = (bits >> 15 & 1) + high
    rounded = torch.where((rounded & 0x7FFF) == 0x7F81, high & -0x8000, rounded)
    return torch.where(nan, high, rounded)


def _unstow_bits(high: Tensor, residual: Tensor) -> Tensor:
    """Return ``fastema.kernels.scalar.unstow`` of two halves."""
    beyond = ((high & 0x7FFF) == 0).logical_and(residual < 0)
    wide = (high | 0x7F80) << 16 | residual & 0xFFFF
    return torch.where(beyond, wide, _unpark_bits(high, residual))


def _park(piece: _Piece, run: _Run) -> None:
    avg, weight = piece.dst, piece.src.to(torch.int32)
    weight = weight * (1 << 16) | avg & 0xFFFF
    piece.src.copy_(_round_high(avg))
    piece.dst.copy_(weight)


def _unpark(piece: _Piece, run: _Run) -> None:
    average = _unpark_bits(piece.src.to(torch.int32), piece.dst)
    piece.src.copy_(piece.dst >> 16)
    piece.dst.copy_(average)


# -- averages --------------------------------------------------------------------------------------


def _lerp(piece: _Piece, run: _Run) -> None:
    w, x = run.weight(piece), piece.src.to(piece.real)
    if w != 1:
        avg = _load(piece)
        x = avg + (x - avg) * w
    _store(piece, x, run)


def _add(piece: _Piece, run: _Run) -> None:
    _store(piece, _load(piece) + piece.src.to(piece.real) * run.weight(piece), run)


def _window(piece: _Piece, run: _Run) -> None:
    args = run.args
    piece.ring[args.slot].copy_(piece.src)
    count = int(args.numbers[piece.average_index])
    device = piece.dst.device  # the ring may be on the host
    wide = torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
    total = torch.zeros(piece.dst.shape, dtype=wide, device=device)
    for age in range(count):
        total += piece.ring[(args.slot - age) % args.window].to(device).to(wide)
    mean = total / count
    _store(piece, mean, run)
    rest = mean - piece.dst.to(wide)
    piece.residual.copy_(rest.masked_fill(rest.isnan(), 0))  # that of an infinity is NaN


def _finite(piece: _Piece, run: _Run) -> Tensor:
    return piece.src.isfinite().logical_not().sum()


# -- copies ----------------------------------------------------------------------------------------


def _copy(piece: _Piece, run: _Run) -> None:
    if piece.form:
        _store(piece, piece.src.to(piece.real), run)
    else:
        piece.dst.copy_(piece.src)


def _cast_back(piece: _Piece, run: _Run) -> None:
    if piece.form == _SPLIT and piece.src.dtype == torch.bfloat16:
        piece.src.view(torch.int16).copy_(piece.dst)
    elif piece.src.dtype == torch.bfloat16 and piece.dst.dtype == torch.float32:
        # As a swap does: ties go away from zero, since ties to even could not be undone.
        piece.src.view(torch.int16).copy_(_round_high(piece.dst.view(torch.int32)))
    else:
        piece.src.copy_(_load(piece) if piece.form else piece.dst)


def _swap(piece: _Piece, run: _Run) -> None:
    if piece.form == _SPLIT and piece.src.dtype == torch.float32:
        weights = piece.src.view(torch.int32)
        bits = weights.clone()
        weights.copy_(_unstow_bits(*_halves(piece)))
        _store_halves(piece, bits, _stow_bits(bits))
        return
    average = _load(piece) if piece.form else piece.dst.clone()
    _copy(piece, run)
    piece.src.copy_(average)


# -- pairs into pieces -----------------------------------------------------------------------------

_FUNCTIONS: Final[dict[str, Callable[[_Piece, _Run], Tensor | None]]] = {
    name: globals()[f"_{name}"] for name, one in OPERATIONS.items() if one.in_torch
}


def _pieces(operation: str, row: int, pair: Pair) -> Iterator[_Piece]:
    """Yield the parts of a pair. Raises a DTypeError for averages of integers."""
    kind = OPERATIONS[operation]
    form = kernel_format(operation, kind.moves_bits, pair)
    reals = (pair.dst.kind.real, pair.src.kind.real)
    real = torch.float64 if "f64" in reals else torch.float32
    specs: list[Any] = [pair.dst, pair.src]
    if kind.needs_ring:
        assert pair.ring is not None
        specs += [pair.residual, pair.ring[0]]
    elif form == _SPLIT:
        specs.append(pair.residual)
    tensors = [spec.tensor.detach() for spec in specs]
    tensors = [torch.view_as_real(one) if one.is_complex() else one for one in tensors]
    if form is None:
        real = _WORDS[tensors[0].element_size()]
        tensors = [one.view(_WORDS[one.element_size()]) for one in tensors]
    elif form == _SPLIT:
        tensors[0] = tensors[0].view(torch.int16)
    special = form if form in _STOCHASTIC or form == _SPLIT else ""
    for parts in _split(tensors):
        empty = [parts[0]] * (4 - len(parts))  # not read
        yield _Piece(row, pair.average_index, real, special or "", *parts, *empty)


def _split(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield corresponding parts, at most :data:`AT_ONCE` elements each, along the last axes."""
    shape, size = tensors[0].shape, tensors[0].numel()
    if size <= AT_ONCE:
        yield from [tensors] if size else []
        return
    axis, length = next((i - len(shape), n) for i, n in enumerate(shape) if n > 1)
    step = max(AT_ONCE * length // size, 1)
    for first in range(0, length, step):
        count = min(step, length - first)
        yield from _split([one.narrow(axis, first, count) for one in tensors])


def _is_plain(piece: _Piece) -> bool:
    return not piece.form and piece.dst.dtype == piece.src.dtype == piece.real


def substitute(operation: str, pairs: Sequence[Pair]) -> Substitute:
    """Return a function that runs a kernel operation on checked pairs, in place.

    The owner of a ring's spec must be the whole ring, ``[slots, ...]``. Only an operation that
    counts waits for the device; it returns ``float64[pairs]``. Raises a DTypeError for an unknown
    operation, and for averages of integers.
    """
    function = _FUNCTIONS.get(operation)
    if function is None:
        known = ", ".join(_FUNCTIONS)
        raise DTypeError(f"{operation}: torch has no functions for it; known operations: {known}")
    pieces = [piece for row, pair in enumerate(pairs) for piece in _pieces(operation, row, pair)]
    pieces.sort(key=lambda piece: piece.average_index)  # several may write the same weights
    plain = [piece for piece in pieces if operation == "lerp" and _is_plain(piece)]
    if plain:
        pieces = [piece for piece in pieces if not _is_plain(piece)]

    def run(args: LaunchArgs) -> NDArray[np.float64] | None:
        now = _Run(args)
        with torch.inference_mode():  # inference tensors may be written only here
            _lerp_together(plain, now)
            found = [(piece.row, function(piece, now)) for piece in pieces]
        if not OPERATIONS[operation].counts:
            return None
        counts = np.zeros(len(pairs))
        for row, count in found:
            assert count is not None
            counts[row] += count.item()
        return counts

    return run


def _lerp_together(pieces: Sequence[_Piece], run: _Run) -> None:
    """Update averages in the weights' own dtype, with few calls."""
    together: dict[tuple[Any, ...], tuple[float, list[Tensor], list[Tensor]]] = {}
    for piece in pieces:
        w = run.weight(piece)
        if abs(w) >= 0.5:  # torch interpolates from the new value: infinities would differ
            _lerp(piece, run)
            continue
        key = piece.average_index, piece.real, piece.dst.device
        _, dst, src = together.setdefault(key, (w, [], []))
        dst.append(piece.dst)
        src.append(piece.src)
    for w, dst, src in together.values():
        torch._foreach_lerp_(dst, src, w)
