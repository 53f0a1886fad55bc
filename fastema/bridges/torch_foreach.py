"""Every operation of the kernels in torch's own functions: slower but right, where there are none.

``substitute`` sorts pairs into batches of like pieces. An operation is a function of a batch and
the moment, in torch's functions on lists of tensors where there is one that does it, else on flat
copies of the pieces. No more than :data:`AT_ONCE` elements are worked on at a time, and none of
them takes more than :data:`BYTES` bytes besides: the memory needed does not grow with the model.

What differs from the kernels: multiplications and additions are not always fused, so that
``lerp``, ``lerp_measured`` and ``add`` may be off by a unit in the last place of the type they
compute in, at the size of the largest term; a windowed mean is computed from its whole ring at
every update. The random bits are the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastema.errors import DTypeError
from fastema.kernels.operations import OPERATIONS
from fastema.kernels.table import DISTANCE, MEASURES, SQUARE, STILL
from fastema.layout.dtypes import DType
from fastema.layout.group import Pair
from fastema.layout.home import Substitute
from fastema.layout.table import first_and_strides, tensor_key

__all__ = ["AT_ONCE", "BYTES", "Batch", "Moment", "batches", "substitute"]

AT_ONCE: Final = 1 << 22
"""Elements worked on at a time; with :data:`BYTES` for each that is 256 MB."""

BYTES: Final = 64
"""Most bytes of temporaries that an operation takes for an element."""

_SPLIT: Final = "bf16+16"
_WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HALVES: Final = (torch.float16, torch.bfloat16)


class Moment(NamedTuple):
    """What changes from run to run, see :class:`fastema.engine.moment.Moment`."""

    numbers: Sequence[float]
    seed: int
    step: int
    window: int
    slot: int
    turn: int


class Places(NamedTuple):
    """Where the elements of a piece are in their whole tensor, for random bits.

    Attributes
    ----------
    key : int
        Of the tensor.
    first : int
        Index of the first element of the pair.
    indices : Tensor
        Without memory: its strides and offset are those of the indices from there.
    """

    key: int
    first: int
    indices: Tensor


class Batch(NamedTuple):
    """Pieces of pairs alike in dtypes, form, device and number, side by side.

    Attributes
    ----------
    which : int
    real : torch.dtype
        What is computed in: float64 where either side is, else float32; for operations on bits, the
        integer that a word of the written side is.
    form : _Form
    rows : list of int
        The pair of each piece, by its place among all.
    places : list of Places
        Of each piece, where the form takes random bits.
    dst, src, low, ring : list of Tensor
        The pieces; ``low`` and ``ring`` are empty where they have no part. Complex numbers are
        pairs of reals, bits are integers, and a ring has its slots along the first axis.
    """

    which: int
    real: torch.dtype
    form: _Form
    rows: list[int]
    places: list[Places]
    dst: list[Tensor]
    src: list[Tensor]
    low: list[Tensor]
    ring: list[Tensor]


class _Form(NamedTuple):
    """How the written side is stored: the way to a flat tensor to compute with, and back."""

    load: Callable[[Batch], Tensor]
    store: Callable[[Batch, Tensor, Moment], None]


# -- lists of tensors and flat ones ----------------------------------------------------------------


def _parts(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of a flat tensor with the shapes of others, one after the other."""
    pieces = flat.split([one.numel() for one in like])
    return [piece.view(one.shape) for piece, one in zip(pieces, like, strict=True)]


def _flat(tensors: list[Tensor], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """The elements of tensors in one flat copy, by default where they are."""
    size = sum(one.numel() for one in tensors)
    flat = torch.empty(size, dtype=dtype, device=device or tensors[0].device)
    torch._foreach_copy_(_parts(flat, tensors), tensors)
    return flat


def _assign(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy, rounding once to nearest even where the target is narrower."""
    if sources[0].dtype == torch.float64 and targets[0].dtype in _HALVES:
        odd = _to_odd(_flat(sources, torch.float64))  # torch goes by way of float32, rounding twice
        sources = _parts(odd, sources)
    torch._foreach_copy_(targets, sources)


def _to_odd(values: Tensor) -> Tensor:
    """Float64 as float32, an inexact result forced to an odd last bit: safe to round again."""
    nearest = values.to(torch.float32)
    back = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    wrong = (back != values).logical_and_((bits & 1) == 0)  # a NaN stays one with any odd bits
    # One step of the bits is one step away from zero, whatever the sign.
    bits.add_(wrong)
    bits.add_(wrong.logical_and_(back.abs_() > values.abs()), alpha=-2)
    return nearest


# -- forms -----------------------------------------------------------------------------------------


def _load_plain(batch: Batch) -> Tensor:
    return _flat(batch.dst, batch.real)


def _store_plain(batch: Batch, values: Tensor, moment: Moment) -> None:
    _assign(batch.dst, _parts(values, batch.dst))


_LOW: Final = 0xFFFFFFFF


def _mixed(x: int) -> int:
    """As ``fastema.kernels.scalar.mix32``."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor & _LOW
    return x ^ x >> 16


def _keys(moment: Moment, tensor: int, high: int) -> tuple[int, int]:
    """As ``fastema.kernels.scalar.random_key``, and the second key."""
    key = moment.seed & _LOW ^ 0x9E3779B9
    for number in (moment.seed >> 32, moment.step & _LOW, moment.step >> 32, tensor, high):
        key = _mixed(key) ^ number
    key = _mixed(key)
    return key, _mixed(key)


def _random_words(places: Places, moment: Moment, device: torch.device) -> Tensor:
    """As ``fastema.kernels.scalar.random_word``, in integers of 64 bits, whose products wrap."""
    shape, strides = places.indices.shape, places.indices.stride()
    start = places.first + int(places.indices.storage_offset())
    index = torch.full((), start, dtype=torch.int64, device=device)
    for n, stride in zip(shape, strides, strict=True):
        index = index.unsqueeze(-1) + torch.arange(n, device=device).mul_(stride)
    x = index.reshape(-1)
    last = start + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    first: int | Tensor
    second: int | Tensor
    first, second = _keys(moment, places.key, start >> 32)
    if last >> 32 != start >> 32:
        high = x >> 32
        first, second = torch.full_like(x, first), torch.full_like(x, second)
        for half in range((start >> 32) + 1, (last >> 32) + 1):
            for keys, key in zip((first, second), _keys(moment, places.key, half), strict=True):
                keys.masked_fill_(high == half, key)
    x = x.bitwise_and_(_LOW).bitwise_xor_(first).mul_(0x7FEB352D).bitwise_and_(_LOW)
    x.bitwise_xor_(x >> 16).bitwise_xor_(second)
    x.mul_((x << 1).bitwise_or_(1)).bitwise_and_(_LOW)
    return x.bitwise_right_shift_(16)


def _words(batch: Batch, moment: Moment, bits: int) -> Tensor:
    """So many random bits for every element, the kernels'."""
    device = batch.dst[0].device
    words = torch.empty(sum(one.numel() for one in batch.dst), dtype=torch.int32, device=device)
    parts = words.split([one.numel() for one in batch.dst])
    for part, places in zip(parts, batch.places, strict=True):
        part.copy_(_random_words(places, moment, device).bitwise_right_shift_(16 - bits))
    return words


def _store_random(dropped: int, lift: float, largest: float) -> Callable[..., None]:
    """Rounding to one of the two neighbours, each as likely as the other one is far.

    Parameters
    ----------
    dropped : int
        Bits of a float32 that the format has no room for.
    lift : float
        The smallest normal number where float32 has smaller ones: added below it, it lines the bits
        of a subnormal result up.
    largest : float
        Beyond it a number is rounded to nearest.
    """
    rest = (1 << dropped) - 1
    beyond = int(np.float32(largest).view(np.int32)) | rest

    def store(batch: Batch, values: Tensor, moment: Moment) -> None:
        values = _to_odd(values) if values.dtype == torch.float64 else values
        size = values.abs()
        shift = (size < lift).to(torch.float32).mul_(lift)
        lifted = size + shift
        bits = lifted.view(torch.int32)
        bits.add_(_words(batch, moment, dropped)).clamp_(max=beyond).bitwise_and_(~rest)
        rounded = lifted.sub_(shift).copysign_(values)
        _assign(batch.dst, _parts(torch.where(size <= largest, rounded, values), batch.dst))

    return store


def _load_split(batch: Batch) -> Tensor:
    return _unparked(*_halves(batch)).view(torch.float32).to(batch.real)


def _store_split(batch: Batch, values: Tensor, moment: Moment) -> None:
    bits = values.to(torch.float32).view(torch.int32)
    _take_apart(batch, bits, torch.where(values.isnan(), bits >> 16 | 0x40, _high(bits)))


def _halves(batch: Batch) -> tuple[Tensor, Tensor]:
    return _flat(batch.dst, torch.int32), _flat(batch.low, torch.int32)


def _take_apart(batch: Batch, bits: Tensor, high: Tensor) -> None:
    _assign(batch.dst, _parts(high, batch.dst))
    low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000  # the low half as a signed number
    _assign(batch.low, _parts(low, batch.low))


_PLAIN: Final = _Form(_load_plain, _store_plain)

_FORMS: Final = {
    **dict.fromkeys(("", "f64", "f32", "f16", "bf16"), _PLAIN),
    "f16~": _Form(_load_plain, _store_random(13, 2.0**-14, 65504.0)),
    "bf16~": _Form(_load_plain, _store_random(16, 0.0, torch.finfo(torch.float32).max)),
    _SPLIT: _Form(_load_split, _store_split),
}


# -- float32 and bfloat16 in 48 bits ---------------------------------------------------------------
# Halves are signed here, so that shifts are arithmetic and nothing leaves its range.


def _high(bits: Tensor) -> Tensor:
    """As ``fastema.kernels.scalar.park_model``."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    high = bits >> 16
    nearest = ((bits >> 15) & 1).add_(high)
    quiet = ((high & 0x7F) == 0).to(torch.int32).mul_(0x40)
    return torch.where(nan, high.bitwise_or_(quiet), nearest)


def _unparked(model: Tensor, parked: Tensor) -> Tensor:
    """The float32 of which :func:`_high` is the model, and the parked one has the low half."""
    nan = (model & 0x7FFF) > 0x7F80
    up = ((parked >> 15) & 1).masked_fill_(nan, 0)
    return torch.sub(model, up, out=up).mul_(1 << 16).bitwise_or_(parked & 0xFFFF)


def _stowed(bits: Tensor) -> Tensor:
    """As ``fastema.kernels.scalar.stowed_high``."""
    nan = (bits & 0x7FFFFFFF) > 0x7F80FFFF
    high = bits >> 16
    rounded = ((bits >> 15) & 1).add_(high)
    rounded = torch.where((rounded & 0x7FFF) == 0x7F81, high & -0x8000, rounded)
    return torch.where(nan, high, rounded)


def _unstowed(high: Tensor, low: Tensor) -> Tensor:
    """As ``fastema.kernels.scalar.unstowed``."""
    beyond = ((high & 0x7FFF) == 0).logical_and_(low < 0)
    return torch.where(beyond, (high | 0x7F80) << 16 | low & 0xFFFF, _unparked(high, low))


def _park(batch: Batch, moment: Moment) -> None:
    avg, weight = _flat(batch.dst, torch.int32), _flat(batch.src, torch.int32)
    _assign(batch.src, _parts(_high(avg), batch.src))
    parked = weight.mul_(1 << 16).bitwise_or_(avg & 0xFFFF)
    _assign(batch.dst, _parts(parked, batch.dst))


def _unpark(batch: Batch, moment: Moment) -> None:
    parked, model = _flat(batch.dst, torch.int32), _flat(batch.src, torch.int32)
    _assign(batch.src, _parts(parked >> 16, batch.src))
    _assign(batch.dst, _parts(_unparked(model, parked), batch.dst))


# -- averages --------------------------------------------------------------------------------------


def _weight(batch: Batch, moment: Moment) -> float:
    """The batch's number, rounded as the arithmetic has it."""
    number = moment.numbers[batch.which]
    return float(number if batch.real == torch.float64 else np.float32(number))


def _source(batch: Batch) -> list[Tensor]:
    """The source in the type of the arithmetic: itself where it is of that type."""
    if batch.src[0].dtype == batch.real:
        return batch.src
    return _parts(_flat(batch.src, batch.real), batch.src)


def _lerp(batch: Batch, moment: Moment) -> None:
    w = _weight(batch, moment)
    plain, dtype = batch.form is _PLAIN, batch.dst[0].dtype
    # Beyond 1/2 torch counts back from the new value: infinities would come out otherwise.
    if plain and abs(w) < 0.5 and dtype == batch.src[0].dtype:
        torch._foreach_lerp_(batch.dst, batch.src, w)
    elif plain and abs(w) < 0.5 and dtype == batch.real:
        torch._foreach_lerp_(batch.dst, _source(batch), w)
    else:
        x = _flat(batch.src, batch.real)
        if w != 1:
            avg = batch.form.load(batch)
            x = avg.add_(x.sub_(avg), alpha=w)
        batch.form.store(batch, x, moment)


def _lerp_measured(batch: Batch, moment: Moment) -> Tensor:
    before = batch.form.load(batch)
    _lerp(batch, moment)
    after, x = batch.form.load(batch), _flat(batch.src, batch.real)
    still = before == after
    distance = x.sub_(after)
    return _sums(batch, {DISTANCE: distance.square_(), SQUARE: after.square_(), STILL: still})


def _add(batch: Batch, moment: Moment) -> None:
    w = _weight(batch, moment)
    if batch.form is _PLAIN and batch.dst[0].dtype == batch.real:
        torch._foreach_add_(batch.dst, _source(batch), alpha=w)
    else:
        total = batch.form.load(batch).add_(_flat(batch.src, batch.real), alpha=w)
        batch.form.store(batch, total, moment)


def _finite(batch: Batch, moment: Moment) -> Tensor:
    bad = torch.isfinite(_flat(batch.src, batch.real)).logical_not_()
    return _sums(batch, {DISTANCE: bad} if bad.any() else {})


def _sums(batch: Batch, measures: dict[int, Tensor]) -> Tensor:
    """The sums over every piece, by the column of each measure: ``[pieces, MEASURES]``."""
    sizes = [one.numel() for one in batch.dst]
    device = batch.dst[0].device
    found = torch.zeros(len(sizes), MEASURES, dtype=torch.float64, device=device)
    for column, values in measures.items():
        sums = [part.sum(dtype=torch.float64) for part in values.split(sizes)]
        found[:, column] = torch.stack(sums)
    return found


# -- copies ----------------------------------------------------------------------------------------


def _copy(batch: Batch, moment: Moment) -> None:
    if batch.form is _PLAIN:
        _assign(batch.dst, batch.src)
    else:
        batch.form.store(batch, _flat(batch.src, batch.real), moment)


def _give(batch: Batch, moment: Moment) -> None:
    plain = batch.form is _PLAIN
    _assign(batch.src, batch.dst if plain else _parts(batch.form.load(batch), batch.src))


def _swap(batch: Batch, moment: Moment) -> None:
    if batch.low and batch.src[0].dtype == torch.float32:
        weights = [one.view(torch.int32) for one in batch.src]
        bits = _flat(weights, torch.int32)
        _assign(weights, _parts(_unstowed(*_halves(batch)), weights))
        _take_apart(batch, bits, _stowed(bits))
        return
    given = _parts(batch.form.load(batch), batch.src)
    _copy(batch, moment)
    _assign(batch.src, given)


# -- windowed means --------------------------------------------------------------------------------


def _window(batch: Batch, moment: Moment) -> None:
    _assign([slots[moment.slot] for slots in batch.ring], batch.src)
    count = int(moment.numbers[batch.which])
    filled = [(moment.slot - age) % moment.window for age in range(count)]
    device = batch.dst[0].device  # a ring may be on the host
    history = (_flat([slots[i] for slots in batch.ring], torch.float64, device) for i in filled)
    exact = batch.real == torch.float64
    mean, left = (_exact_mean if exact else _mean)(history, count)
    batch.form.store(batch, mean, moment)
    rest = left.add_(mean.sub_(batch.form.load(batch)))
    _assign(batch.low, _parts(_numbers_only(rest), batch.low))


def _numbers_only(values: Tensor) -> Tensor:
    """Zero in the place of NaN: what is left out beside an infinity."""
    return values.masked_fill_(values.isnan(), 0)


def _mean(history: Iterator[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The mean of float32 numbers, given as float64, as a sum of two of them."""
    total = next(history)
    for x in history:
        total.add_(x)
    mean = total.div_(count).to(torch.float32)
    return mean, total.sub_(mean).to(torch.float32)


def _exact_mean(history: Iterator[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The mean of float64 numbers as a sum of two."""
    total = next(history)
    left = torch.zeros_like(total)
    for x in history:
        total, error = _two_sum(total, x)
        left.add_(error)
    mean = total / count
    # What the division left out: mean * count in two parts that are exact (Dekker).
    high = mean * (2.0**27 + 1)
    high.sub_(high - mean)
    residue = total.sub_(high * count).sub_((mean - high).mul_(count))
    return _two_sum(mean, _numbers_only(left.add_(residue).div_(count)))


def _two_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x + y`` rounded, and exactly what the rounding left out (Knuth); overwrites both."""
    total = x + y
    part = total - x
    y.sub_(part)
    x.sub_(torch.sub(total, part, out=part))
    return total, x.add_(y)


# -- pairs into batches ----------------------------------------------------------------------------

_STAND_INS: Final[dict[str, Callable[[Batch, Moment], Tensor | None]]] = {
    name: globals()[f"_{name}"] for name, one in OPERATIONS.items() if one.in_torch
}


def _word(kind: DType) -> torch.dtype:
    """The integer as wide as a dtype's elements, or the parts of complex ones."""
    return _WORDS[kind.itemsize // kind.parts]


def _arithmetic(operation: str, pair: Pair) -> tuple[torch.dtype, str]:
    """What a pair is computed in, and the form of its written side.

    Raises
    ------
    DTypeError
        If the operation averages and the dtype is an integer.
    """
    dst, src = pair.dst.kind, pair.src.kind
    moves_bits = OPERATIONS[operation].moves_bits
    equal = dst == src and pair.form != _SPLIT
    if moves_bits == "always" or (moves_bits == "if equal" and equal):
        return _word(dst), ""
    if dst.real is None or src.real is None:
        raise DTypeError(
            f"{operation}: {dst.code} is not averaged, only copied and swapped ({pair.name})"
        )
    read = [dst.real, src.real] + ([] if pair.ring is None else [pair.ring[0].kind.real])
    real = torch.float64 if "f64" in read else torch.float32
    # A copy is best rounded to nearest.
    return real, pair.form.removesuffix("~") if moves_bits == "if equal" else pair.form


def _streams(operation: str, pair: Pair, real: torch.dtype, form: str) -> list[Tensor]:
    """The tensors of a pair: both sides, and what the operation needs besides.

    Last, where random bits are used, one without memory whose strides are those of the indices.
    Axes are in the order of the written side's memory, and one where all lie alike.
    """
    specs = [pair.dst, pair.src]
    needs_ring = OPERATIONS[operation].needs_ring
    if form == _SPLIT or needs_ring:
        assert pair.low is not None
        specs.append(pair.low)
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


def _cut(streams: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """The same pieces of all tensors, of at most so many elements."""
    shape = streams[0].shape
    size = streams[0].numel()
    if size <= most:
        yield streams
        return
    axis, length = next((i - len(shape), n) for i, n in enumerate(shape) if n > 1)
    step = max(most * length // size, 1)
    for first in range(0, length, step):
        piece = [one.narrow(axis, first, min(step, length - first)) for one in streams]
        yield from _cut(piece, most)


def batches(operation: str, pairs: Sequence[Pair], most: int) -> list[Batch]:
    """Pairs in pieces, like with like, of at most ``most`` elements together.

    Pieces of one average keep their order, and averages follow each other: what several pairs write
    is written in the order of their numbers.

    Raises
    ------
    DTypeError
        If the operation averages and a dtype is an integer.
    """
    found: list[Batch] = []
    latest: dict[tuple[object, ...], Batch] = {}
    room: dict[tuple[object, ...], int] = {}
    for row, pair in enumerate(pairs):
        real, form = _arithmetic(operation, pair)
        if not pair.dst.size:
            continue
        streams = _streams(operation, pair, real, form)
        key = (pair.which, pair.dst.device, real, form, *(one.dtype for one in streams))
        for piece in _cut(streams, most):
            size = piece[0].numel()
            if size > room.get(key, 0):
                latest[key] = Batch(pair.which, real, _FORMS[form], [], [], [], [], [], [])
                room[key] = most
                found.append(latest[key])
            room[key] -= size
            batch = latest[key]
            batch.rows.append(row)
            if form.endswith("~"):
                first, _ = first_and_strides(pair)
                batch.places.append(Places(tensor_key(pair), first, piece.pop()))
            for held, one in zip(batch[5:], piece, strict=False):
                held.append(one)
    return sorted(found, key=lambda batch: batch.which)


def substitute(operation: str, pairs: Sequence[Pair]) -> Substitute:
    """An operation over pairs of torch tensors, in torch's own functions.

    Parameters
    ----------
    operation : str
        As the kernels': ``lerp``, ``lerp_measured``, ``add``, ``copy``, ``give``, ``swap``,
        ``finite``, ``park``, ``unpark`` or ``window``.
    pairs : sequence of Pair
        Checked pairs, of any dtypes and devices. The owners of their descriptions are the tensors,
        that of a ring the whole of it, ``[slots, ...]``.

    Returns
    -------
    function
        ``run(numbers, seed, step, window, slot, turn)``, the fields of a moment; in place. Of an
        operation that measures it returns ``float64[pairs, MEASURES]`` and waits for the device,
        of any other None, and waits for nothing.

    Raises
    ------
    DTypeError
        For an operation that is none of these, or averages integers.
    """
    function = _STAND_INS.get(operation)
    if function is None:
        known = ", ".join(_STAND_INS)
        raise DTypeError(f"{operation}: torch has no functions for it, only for {known}")
    prepared = batches(operation, pairs, AT_ONCE)

    def run(
        numbers: Sequence[float],
        seed: int = 0,
        step: int = 0,
        window: int = 0,
        slot: int = 0,
        turn: int = 0,
    ) -> NDArray[np.float64] | None:
        moment = Moment(numbers, seed, step, window, slot, turn)
        with torch.inference_mode():  # where its tensors may be written too
            sums = [function(batch, moment) for batch in prepared]
        if not OPERATIONS[operation].measures:
            return None
        found = np.zeros((len(pairs), MEASURES))
        for batch, some in zip(prepared, sums, strict=True):
            assert some is not None
            np.add.at(found, batch.rows, some.cpu().numpy())
        return found

    return run
