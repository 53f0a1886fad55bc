"""The kernels' operations in torch's own functions, slower, for devices without kernels.

``substitute`` cuts pairs into pieces, and puts pieces with equal dtypes and formats into a
:class:`PieceBatch`. An operation is a function of a batch and the arguments of a run. It uses
torch's functions on lists of tensors if there is one for it, otherwise flat copies of the pieces.
It works on at most :data:`AT_ONCE` elements at a time, with at most :data:`BYTES` bytes of
temporaries per element, so the memory needed does not grow with the model.

Differences from the kernels: multiplications and additions are not always fused, so ``lerp``
and ``add`` may be off by one unit in the last place of the compute dtype, at the
magnitude of the largest term. A windowed mean is computed from its whole ring at every update. The
random bits are the same.
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
from fastema.layout.table import first_and_strides, tensor_key

__all__ = ["AT_ONCE", "BYTES", "LaunchArgs", "PieceBatch", "batch_pairs", "substitute"]

AT_ONCE: Final = 1 << 22
"""Maximum elements per batch; with :data:`BYTES` bytes per element that is 256 MB."""

BYTES: Final = 64
"""Maximum bytes of temporaries per element."""

_SPLIT: Final = "bf16+16"
_LOW: Final = 0xFFFFFFFF
_WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HALVES: Final = (torch.float16, torch.bfloat16)


class PieceBatch(NamedTuple):
    """Pieces of pairs with equal dtypes, form, device and average index.

    ``real`` is the compute dtype: float64 if either side is float64, otherwise float32; for
    operations on bits, the integer dtype as wide as a word of the written side. ``rows`` holds the
    index of each piece's pair. ``places``, for random bits, holds for each piece the key of its
    tensor, the index of the pair's first element in the full tensor, and a meta tensor with the
    strides and offset of the piece's indices. ``residual`` and ``ring`` may be empty. The first
    axis of a ring is its slots. Complex numbers are pairs of reals, bits are integers.
    """

    average_index: int
    real: torch.dtype
    form: _Form
    rows: list[int]
    places: list[tuple[int, int, Tensor]]
    dst: list[Tensor]
    src: list[Tensor]
    residual: list[Tensor]
    ring: list[Tensor]


class _Form(NamedTuple):
    """How to load the written side into a flat tensor to compute with, and store it back.

    A form that rounds stochastically uses the ``used`` highest bits of a random word, as many as a
    float32 has more. Its averages at or below ``least`` have the same last place.
    """

    load: Callable[[PieceBatch], Tensor]
    store: Callable[[PieceBatch, Tensor, Tensor | None], None]
    used: int = 0
    least: float = 0.0


def _parts(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return consecutive views of a flat tensor with the shapes of the tensors in ``like``."""
    pieces = flat.split([one.numel() for one in like])
    return [piece.view(one.shape) for piece, one in zip(pieces, like, strict=True)]


def _flat(tensors: list[Tensor], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return the elements of tensors in one flat copy, by default on their own device."""
    size = sum(one.numel() for one in tensors)
    flat = torch.empty(size, dtype=dtype, device=device or tensors[0].device)
    torch._foreach_copy_(_parts(flat, tensors), tensors)
    return flat


def _rounds_twice(source: Tensor, target: Tensor) -> bool:
    """Return whether torch would cast by way of float32, rounding twice."""
    return source.dtype == torch.float64 and target.dtype in _HALVES


def _assign(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors, rounding once to nearest even if the targets are narrower."""
    if _rounds_twice(sources[0], targets[0]):
        _unflatten(_flat(sources, torch.float64), targets)
    else:
        torch._foreach_copy_(targets, sources)


def _unflatten(flat: Tensor, targets: list[Tensor]) -> None:
    """Copy the elements of a flat tensor into ``targets``, rounding as :func:`_assign` does."""
    flat = _to_odd(flat) if _rounds_twice(flat, targets[0]) else flat
    torch._foreach_copy_(targets, _parts(flat, targets))


def _to_odd(values: Tensor) -> Tensor:
    """Round float64 to float32, with an odd last bit if inexact: safe to round again."""
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    wrong = (back != values).logical_and_((bits & 1) == 0)  # NaNs stay NaNs
    # Adding 1 to the bits moves the value away from zero, for either sign.
    bits.add_(wrong)
    bits.add_(wrong.logical_and_(back.abs_() > values.abs()), alpha=-2)
    return nearest


# -- forms -----------------------------------------------------------------------------------------


def _mix32(x: Any) -> Any:
    """Return ``fastema.kernels.scalar.mix32`` of an int, or of an int64 tensor in place."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> shift
        x *= factor
        x &= _LOW
    x ^= x >> 16
    return x


def _random_words(place: tuple[int, int, Tensor], args: LaunchArgs, device: Any) -> Tensor:
    """Return the kernels' random word (see ``random_word``) for every element of a piece."""
    tensor, first, indices = place
    start = first + int(indices.storage_offset())
    last, index = start, torch.full((), start, dtype=torch.int64, device=device)
    for n, stride in zip(indices.shape, indices.stride(), strict=True):
        index = index.unsqueeze(-1) + torch.arange(n, device=device).mul_(stride)
        last += (n - 1) * stride
    x = index.reshape(-1)
    key: Any = args.seed & _LOW ^ 0x9E3779B9
    for number in (args.seed >> 32, args.step & _LOW, args.step >> 32, tensor):
        key = _mix32(key) ^ number
    high = start >> 32
    key = _mix32(_mix32(key) ^ (high if last >> 32 == high else x >> 32))
    x = x.bitwise_and_(_LOW).add_(key).mul_(0x7FEB352D).bitwise_and_(_LOW)
    x.bitwise_xor_(x >> 16).bitwise_xor_(_mix32(key))
    return x.mul_((x << 1).bitwise_or_(1))


def _draw_words(batch: PieceBatch, args: LaunchArgs) -> Tensor | None:
    """Return the random word of each element as int32, or None if the form needs none."""
    if not batch.form.used:
        return None
    sizes = [one.numel() for one in batch.dst]
    words = torch.empty(sum(sizes), dtype=torch.int32, device=batch.dst[0].device)
    for part, place in zip(words.split(sizes), batch.places, strict=True):
        part.copy_(_signed(_random_words(place, args, words.device)))
    return words


def _signed(words: Tensor) -> Tensor:
    """Return the low 32 bits of int64 numbers as a signed number, in place."""
    return words.add_(1 << 31).bitwise_and_(_LOW).sub_(1 << 31)


_DITHER: Final = 2.0**-55 * (1 - 2.0**-20)


def _noise_and_power(form: _Form, values: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signed float32 made of the unused bits, and the power of two at each value."""
    noise = words.bitwise_left_shift(form.used).to(torch.float32)
    bits = values.to(torch.float32).view(torch.int32) & 0x7F800000
    least = int(np.float32(form.least).view(np.int32))
    return noise, bits.clamp_(least, 0x7F000000).view(torch.float32)


def _add_dithered(form: _Form, avg: Tensor, half: Tensor, w: float, words: Tensor) -> Tensor:
    """Return ``fastema.kernels.scalar.fma_dithered``, in the place of ``avg``; overwrite both."""
    noise, power = _noise_and_power(form, avg, words)
    scale = np.float32(_DITHER / 2) / np.float32(max(abs(w), 2.0**-24))
    plain, still = avg.mul(0.5).add_(half, alpha=w).mul_(2), half == 0
    dithered = half.add_(noise.mul_(float(scale)).mul_(power))
    base = power * 0.75
    step = dithered.mul_(w).add_(base).sub_(base)
    large = step.abs() > power.mul_(0.25)
    mean = torch.where(large, plain, avg + 2 * step)
    return torch.where(still, avg, mean)


def _narrow_dithered(form: _Form, values: Tensor, words: Tensor) -> Tensor:
    """Return ``fastema.kernels.scalar.narrow_dithered`` of float64 numbers."""
    noise, power = _noise_and_power(form, values, words)
    place = power.to(torch.float64)
    noisy = noise.to(torch.float64).mul_(place * _DITHER).add_(values)
    large = place.mul_(1.5 * 2.0**29)
    narrow = noisy.add_(large).sub_(large).to(torch.float32).copysign_(values)
    most = torch.finfo(torch.float32).max
    return torch.where(values.isinf(), narrow, narrow.clamp_(-most, most))


def _store_random(dropped: int, lift: float, largest: float) -> Callable[..., None]:
    """Return a store function that rounds stochastically to one of the two nearest numbers.

    A neighbor's probability is proportional to the distance of the other one.

    Parameters
    ----------
    dropped : int
        Bits of a float32 that the format drops.
    lift : float
        The format's smallest normal number if float32 has smaller ones, otherwise 0. It is added to
        smaller values, to align the bits of a subnormal result.
    largest : float
        Values beyond it are rounded to nearest.
    """
    rest = (1 << dropped) - 1
    beyond = int(np.float32(largest).view(np.int32)) | rest

    def store(batch: PieceBatch, values: Tensor, words: Tensor | None) -> None:
        assert words is not None
        if values.dtype == torch.float64:
            values = _narrow_dithered(batch.form, values, words)
        size = values.abs()
        shift = (size < lift).to(torch.float32).mul_(lift)
        lifted = size + shift
        bits = lifted.view(torch.int32)
        noise = words.bitwise_right_shift(32 - dropped).bitwise_and_(rest)
        bits.add_(noise).clamp_(max=beyond).bitwise_and_(~rest)
        rounded = lifted.sub_(shift).copysign_(values)
        _unflatten(torch.where(size <= largest, rounded, values), batch.dst)

    return store


def _store_split(batch: PieceBatch, values: Tensor, words: Tensor | None) -> None:
    bits = values.to(torch.float32).view(torch.int32)
    _store_halves(batch, bits, torch.where(values.isnan(), bits >> 16 | 0x40, _round_high(bits)))


def _halves(batch: PieceBatch) -> tuple[Tensor, Tensor]:
    return _flat(batch.dst, torch.int32), _flat(batch.residual, torch.int32)


def _store_halves(batch: PieceBatch, bits: Tensor, high: Tensor) -> None:
    _unflatten(high, batch.dst)
    _unflatten(
        ((bits & 0xFFFF) ^ 0x8000) - 0x8000, batch.residual
    )  # the low half as a signed number


_PLAIN: Final = _Form(
    lambda batch: _flat(batch.dst, batch.real),
    lambda batch, values, words: _unflatten(values, batch.dst),
)
_FORMS: Final = {
    **dict.fromkeys(("", "f64", "f32", "f16", "bf16"), _PLAIN),
    "f16~": _Form(_PLAIN.load, _store_random(13, 2.0**-14, 65504.0), 13, 2.0**-14),
    "bf16~": _Form(
        _PLAIN.load, _store_random(16, 0.0, torch.finfo(torch.float32).max), 16, 2.0**-125
    ),
    _SPLIT: _Form(
        lambda batch: _unpark_bits(*_halves(batch)).view(torch.float32).to(batch.real), _store_split
    ),
}


# -- float32 and bfloat16 in 48 bits ---------------------------------------------------------------
# Halves are signed here: shifts are arithmetic and no value leaves its range.


def _round_high(bits: Tensor) -> Tensor:
    """Return ``fastema.kernels.scalar.park_model`` of the bits."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    high = bits >> 16
    nearest = ((bits >> 15) & 1).add_(high)
    quiet = ((high & 0x7F) == 0).to(torch.int32).mul_(0x40)
    return torch.where(nan, high.bitwise_or_(quiet), nearest)


def _unpark_bits(model: Tensor, parked: Tensor) -> Tensor:
    """Return the float32 whose :func:`_round_high` is ``model``; ``parked`` has its low half."""
    nan = (model & 0x7FFF) > 0x7F80
    up = ((parked >> 15) & 1).masked_fill_(nan, 0)
    return torch.sub(model, up, out=up).mul_(1 << 16).bitwise_or_(parked & 0xFFFF)


def _stow_bits(bits: Tensor) -> Tensor:
    """Return ``fastema.kernels.scalar.stow_high`` of the bits."""
    nan = (bits & 0x7FFFFFFF) > 0x7F80FFFF
    high = bits >> 16
    rounded = ((bits >> 15) & 1).add_(high)
    rounded = torch.where((rounded & 0x7FFF) == 0x7F81, high & -0x8000, rounded)
    return torch.where(nan, high, rounded)


def _unstow_bits(high: Tensor, residual: Tensor) -> Tensor:
    """Return ``fastema.kernels.scalar.unstow`` of two halves."""
    beyond = ((high & 0x7FFF) == 0).logical_and_(residual < 0)
    return torch.where(
        beyond, (high | 0x7F80) << 16 | residual & 0xFFFF, _unpark_bits(high, residual)
    )


def _park(batch: PieceBatch, args: LaunchArgs) -> None:
    avg, weight = _flat(batch.dst, torch.int32), _flat(batch.src, torch.int32)
    _unflatten(_round_high(avg), batch.src)
    _unflatten(weight.mul_(1 << 16).bitwise_or_(avg & 0xFFFF), batch.dst)


def _unpark(batch: PieceBatch, args: LaunchArgs) -> None:
    parked, model = _flat(batch.dst, torch.int32), _flat(batch.src, torch.int32)
    _unflatten(parked >> 16, batch.src)
    _unflatten(_unpark_bits(model, parked), batch.dst)


# -- averages --------------------------------------------------------------------------------------


def _weight(batch: PieceBatch, args: LaunchArgs) -> float:
    """Return the batch's weight of the new value, rounded to the compute dtype."""
    number = args.numbers[batch.average_index]
    return float(number if batch.real == torch.float64 else np.float32(number))


def _source(batch: PieceBatch, dtype: torch.dtype) -> list[Tensor]:
    """Return the source tensors in a dtype, without a copy if they already have it."""
    if batch.src[0].dtype == dtype:
        return batch.src
    return _parts(_flat(batch.src, dtype), batch.src)


def _lerp(batch: PieceBatch, args: LaunchArgs) -> None:
    w, dtype = _weight(batch, args), batch.dst[0].dtype
    in_place = batch.form is _PLAIN and dtype in (batch.src[0].dtype, batch.real)
    # From 1/2 on, torch interpolates from the new value: infinities would differ.
    if in_place and abs(w) < 0.5:
        torch._foreach_lerp_(batch.dst, _source(batch, dtype), w)
    else:
        x, words = _flat(batch.src, batch.real), _draw_words(batch, args)
        if w != 1:
            avg = batch.form.load(batch)
            if words is None or batch.real == torch.float64:
                x = avg.add_(x.sub_(avg), alpha=w)
            else:
                x = _add_dithered(batch.form, avg, x.mul_(0.5).sub_(avg, alpha=0.5), w, words)
        batch.form.store(batch, x, words)


def _add(batch: PieceBatch, args: LaunchArgs) -> None:
    w = _weight(batch, args)
    if batch.form is _PLAIN and batch.dst[0].dtype == batch.real:
        torch._foreach_add_(batch.dst, _source(batch, batch.real), alpha=w)
    else:
        avg, x = batch.form.load(batch), _flat(batch.src, batch.real)
        words = _draw_words(batch, args)
        if words is None or batch.real == torch.float64:
            total = avg.add_(x, alpha=w)
        else:
            total = _add_dithered(batch.form, avg, x.mul_(0.5), w, words)
        batch.form.store(batch, total, words)


def _finite(batch: PieceBatch, args: LaunchArgs) -> Tensor:
    bad = torch.isfinite(_flat(batch.src, batch.real)).logical_not_()
    return torch.stack([part.sum() for part in bad.split([one.numel() for one in batch.dst])])


# -- copies ----------------------------------------------------------------------------------------


def _copy(batch: PieceBatch, args: LaunchArgs) -> None:
    if batch.form is _PLAIN:
        _assign(batch.dst, batch.src)
    else:
        batch.form.store(batch, _flat(batch.src, batch.real), _draw_words(batch, args))


def _cast_back(batch: PieceBatch, args: LaunchArgs) -> None:
    if batch.src[0].dtype == torch.bfloat16 and (
        batch.residual or batch.dst[0].dtype == torch.float32
    ):
        bits = batch.form.load(batch).to(torch.float32).view(torch.int32)
        _unflatten(_round_high(bits), [one.view(torch.int16) for one in batch.src])
    elif batch.form is _PLAIN:
        _assign(batch.src, batch.dst)
    else:
        _unflatten(batch.form.load(batch), batch.src)


def _swap(batch: PieceBatch, args: LaunchArgs) -> None:
    if batch.residual and batch.src[0].dtype == torch.float32:
        weights = [one.view(torch.int32) for one in batch.src]
        bits = _flat(weights, torch.int32)
        _unflatten(_unstow_bits(*_halves(batch)), weights)
        _store_halves(batch, bits, _stow_bits(bits))
        return
    average = batch.form.load(batch)
    _copy(batch, args)
    _unflatten(average, batch.src)


# -- windowed means --------------------------------------------------------------------------------


def _window(batch: PieceBatch, args: LaunchArgs) -> None:
    _assign([slots[args.slot] for slots in batch.ring], batch.src)
    count = int(args.numbers[batch.average_index])
    filled = [(args.slot - age) % args.window for age in range(count)]
    device = batch.dst[0].device  # the ring may be on the host
    history = (_flat([slots[i] for slots in batch.ring], torch.float64, device) for i in filled)
    mean, residual = (_exact_mean if batch.real == torch.float64 else _mean)(history, count)
    batch.form.store(batch, mean, _draw_words(batch, args))
    residual.add_(mean.sub_(batch.form.load(batch)))
    _unflatten(_replace_nan(residual), batch.residual)


def _replace_nan(values: Tensor) -> Tensor:
    """Replace NaN by 0: the residual of an infinity is NaN."""
    return values.masked_fill_(values.isnan(), 0)


def _mean(history: Iterator[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of float32 numbers, passed as float64, as a sum of two float32 tensors."""
    total = next(history)
    for x in history:
        total.add_(x)
    mean = total.div_(count).to(torch.float32)
    return mean, total.sub_(mean).to(torch.float32)


def _exact_mean(history: Iterator[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of float64 numbers as a sum of two float64 tensors."""
    total = next(history)
    residual = torch.zeros_like(total)
    for x in history:
        total, error = _two_sum(total, x)
        residual.add_(error)
    mean = total / count
    # The remainder of the division, with mean * count as a sum of two exact products (Dekker).
    high = mean * (2.0**27 + 1)
    high.sub_(high - mean)
    remainder = total.sub_(high * count).sub_((mean - high).mul_(count))
    return _two_sum(mean, _replace_nan(residual.add_(remainder).div_(count)))


def _two_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x + y`` rounded, and the exact rounding error (Knuth); overwrite both inputs."""
    total = x + y
    part = total - x
    y.sub_(part)
    x.sub_(torch.sub(total, part, out=part))
    return total, x.add_(y)


# -- pairs into batches ----------------------------------------------------------------------------

_STAND_INS: Final[dict[str, Callable[[PieceBatch, LaunchArgs], Tensor | None]]] = {
    name: globals()[f"_{name}"] for name, one in OPERATIONS.items() if one.in_torch
}


def _arithmetic(operation: str, pair: Pair) -> tuple[torch.dtype, str]:
    """Return the compute dtype of a pair and the format of its written side."""
    dst = pair.dst.kind
    form = kernel_format(operation, OPERATIONS[operation].moves_bits, pair)
    if form is None:
        return _WORDS[dst.itemsize // dst.parts], ""
    ring = None if pair.ring is None else pair.ring[0].kind.real
    wide = "f64" in (dst.real, pair.src.kind.real, ring)
    return torch.float64 if wide else torch.float32, form


def _streams(operation: str, pair: Pair, real: torch.dtype, form: str) -> list[Tensor]:
    """Return a pair's tensors: both sides, and the residual and ring if the operation needs them.

    For random bits, a meta tensor with the strides of the indices comes last. Axes are in the
    memory order of the written side. Tensors are flattened if all of them are contiguous then.
    """
    specs = [pair.dst, pair.src]
    needs_ring = OPERATIONS[operation].needs_ring
    if form == _SPLIT or needs_ring:
        assert pair.residual is not None
        specs.append(pair.residual)
    if needs_ring:
        assert pair.ring is not None
        specs.append(pair.ring[0])
    tensors = [spec.tensor.detach() for spec in specs]
    tensors = [torch.view_as_real(one) if one.is_complex() else one for one in tensors]
    if not real.is_floating_point:
        tensors = [one.view(_WORDS[one.element_size()]) for one in tensors]
    elif form == _SPLIT:
        tensors[0] = tensors[0].view(torch.int16)
    if form.endswith("~"):
        _, strides = first_and_strides(pair)
        tensors.append(torch.empty_strided(pair.dst.shape, strides, device="meta"))
    if not tensors[0].dim():
        tensors = [one.unsqueeze(-1) for one in tensors]
    axes = tensors[0].dim()
    order = sorted(range(-axes, 0), key=lambda axis: -tensors[0].stride()[axis])
    tensors = [one.permute(*range(one.dim() - axes), *order) for one in tensors]
    if all((one if one.dim() == axes else one[0]).is_contiguous() for one in tensors):
        return [one.view(*one.shape[: one.dim() - axes], -1) for one in tensors]
    return tensors


def _split_tensors(streams: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield the tensors cut into corresponding pieces of at most ``most`` elements."""
    shape = streams[0].shape
    size = streams[0].numel()
    if size <= most:
        yield streams
        return
    axis, length = next((i - len(shape), n) for i, n in enumerate(shape) if n > 1)
    step = max(most * length // size, 1)
    for first in range(0, length, step):
        piece = [one.narrow(axis, first, min(step, length - first)) for one in streams]
        yield from _split_tensors(piece, most)


def batch_pairs(operation: str, pairs: Sequence[Pair], most: int) -> list[PieceBatch]:
    """Sort the pieces of pairs by dtypes into batches of at most ``most`` elements.

    Batches are in the order of their averages, and the pieces of an average keep their order: pairs
    that write the same tensor do so in the order of their ``average_index``. Raises a DTypeError
    for averages of integers.
    """
    found: list[PieceBatch] = []
    latest: dict[tuple[object, ...], tuple[PieceBatch, int]] = {}
    for row, pair in enumerate(pairs):
        real, form = _arithmetic(operation, pair)
        if not pair.dst.size:
            continue
        streams = _streams(operation, pair, real, form)
        key = (pair.average_index, pair.dst.device, real, form, *(one.dtype for one in streams))
        for piece in _split_tensors(streams, most):
            batch, room = latest.get(key, (None, 0))
            size = piece[0].numel()
            if batch is None or size > room:
                batch = PieceBatch(pair.average_index, real, _FORMS[form], [], [], [], [], [], [])
                room = most
                found.append(batch)
            latest[key] = batch, room - size
            batch.rows.append(row)
            if form.endswith("~"):
                batch.places.append((tensor_key(pair), first_and_strides(pair)[0], piece.pop()))
            for tensors, one in zip(batch[5:], piece, strict=False):
                tensors.append(one)
    return sorted(found, key=lambda batch: batch.average_index)


def substitute(operation: str, pairs: Sequence[Pair]) -> Substitute:
    """Return a function that runs a kernel operation on checked pairs, in place.

    The owner of a ring's spec must be the whole ring, ``[slots, ...]``. Only an operation that
    counts waits for the device; it returns ``float64[pairs]``. Raises a DTypeError for
    an unknown operation, and for averages of integers.
    """
    function = _STAND_INS.get(operation)
    if function is None:
        known = ", ".join(_STAND_INS)
        raise DTypeError(f"{operation}: torch has no functions for it; known operations: {known}")
    prepared = batch_pairs(operation, pairs, AT_ONCE)

    def run(args: LaunchArgs) -> NDArray[np.float64] | None:
        with torch.inference_mode():  # inference tensors may be written only here
            sums = [function(batch, args) for batch in prepared]
        if not OPERATIONS[operation].counts:
            return None
        found = np.zeros(len(pairs))
        for batch, some in zip(prepared, sums, strict=True):
            assert some is not None
            np.add.at(found, batch.rows, some.cpu().numpy())
        return found

    return run
