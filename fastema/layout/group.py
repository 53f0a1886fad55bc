"""Pairs of tensors, and checks that kernels can process them and that none overlap.

Nothing here reads or writes tensors. Every error names the tensor and precedes the first write.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.errors import DTypeError, LayoutError
from fastema.layout.spec import TensorSpec

__all__ = [
    "OverlapGuard",
    "Pair",
    "check_pair",
    "drop_repeated",
    "kernel_format",
    "refuse_overlap",
    "refuse_shared_elements",
    "refuse_unwritable",
]


class Pair(NamedTuple):
    """A tensor that is written and the tensor it is written from, under one name.

    ``form`` is the kernel format of ``dst`` if it is not that of its dtype: rounded stochastically,
    or completed by ``residual``, a companion tensor with the shape and strides of ``dst``. ``ring``
    is the first slot of a ring with the strides of ``dst``, and the bytes from slot to slot.
    ``average_index`` is the index of the average among those that are updated together.
    """

    name: str
    dst: TensorSpec
    src: TensorSpec
    form: str = ""
    residual: TensorSpec | None = None
    ring: tuple[TensorSpec, int] | None = None
    average_index: int = 0


def check_pair(pair: Pair) -> None:
    """Raise an error if no kernel can process a pair.

    Raises a LayoutError if shapes or devices differ, or if both sides are shards but not the same
    one. Raises a DTypeError if only one side is complex, or if dtypes differ and one is an integer.
    """
    name, dst, src = pair.name, pair.dst, pair.src
    if dst.shape != src.shape:
        raise LayoutError(
            f"{name}: shapes differ, {list(dst.shape)} is written from {list(src.shape)}; "
            "both sides must have the same shape"
        )
    if dst.device != src.device:
        raise LayoutError(
            f"{name}: the average is on {dst.device}, the weights on {src.device}; "
            "move one of them (ema.to(device=...))"
        )
    if dst.whole and src.whole and (dst.whole, dst.offset) != (src.whole, src.offset):
        raise LayoutError(
            f"{name}: the average is the part at {dst.offset} of {list(dst.whole)}, the weights "
            f"are the part at {src.offset} of {list(src.whole)}; both sides must be the same part"
        )
    if dst.dtype == src.dtype:
        return
    if dst.kind.parts != src.kind.parts:
        raise DTypeError(f"{name}: {dst.dtype} and {src.dtype} mix complex and real numbers")
    if dst.kind.real is None or src.kind.real is None:
        raise DTypeError(
            f"{name}: {src.dtype} cannot become {dst.dtype}; integers, booleans and floats of 8 "
            "bits are only copied and swapped within their own dtype"
        )


def kernel_format(operation: str, moves_bits: str, pair: Pair) -> str | None:
    """Return the kernel format of the written side; None if the operation copies bits unchanged.

    ``moves_bits`` is that of the operation: "never", "always", or "if equal" (dtypes). Raises a
    DTypeError if integers would be averaged.
    """
    dst, src = pair.dst.kind, pair.src.kind
    equal = dst == src and "+" not in pair.form
    if moves_bits == "always" or (moves_bits == "if equal" and equal):
        return None
    if dst.real is None or src.real is None:
        raise DTypeError(
            f"{operation}: {dst.code} is not averaged, only copied and swapped ({pair.name})"
        )
    form = pair.form or dst.real
    return form.removesuffix("~") if moves_bits == "if equal" else form  # copies round to nearest


def refuse_unwritable(name: str, spec: TensorSpec) -> None:
    """Raise a LayoutError for a tensor that is read-only, or whose indices share elements."""
    if not spec.writable:
        raise LayoutError(
            f"{name}: {spec} is read-only (so are all arrays of JAX, and tensors of TensorFlow); "
            "pass a writable copy"
        )
    refuse_shared_elements(name, spec)


def refuse_shared_elements(name: str, spec: TensorSpec) -> None:
    """Raise a LayoutError if indices of a tensor share elements: it cannot hold an average."""
    if spec.overlaps_itself:
        raise LayoutError(
            f"{name}: several indices of {spec} share one element (expanded, or strides "
            f"{list(spec.strides)}); call .clone() or .contiguous() on it"
        )


def drop_repeated(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs, only the first of those with the same memory (tied weights)."""
    kept: dict[tuple[TensorSpec, TensorSpec], Pair] = {}
    for pair in pairs:
        kept.setdefault((pair.dst, pair.src), pair)
    return list(kept.values())


def _view(spec: TensorSpec) -> NDArray[np.void]:
    """Return a NumPy view of a tensor's memory, for NumPy's exact overlap test."""
    itemsize = spec.kind.itemsize
    first, end = spec.span()
    memory = memoryview((ctypes.c_char * (end - first)).from_address(first)).cast("B")
    strides = [s * itemsize for s in spec.strides]
    return np.ndarray(spec.shape, f"V{itemsize}", memory, spec.address - first, strides)


def _spans(specs: Sequence[TensorSpec]) -> NDArray[np.int64]:
    """Return the addresses of each tensor's first byte and after its last byte."""
    ends = chain.from_iterable(spec.span() for spec in specs)
    return np.fromiter(ends, np.int64, 2 * len(specs)).reshape(-1, 2)


class _Use(NamedTuple):
    """A tensor that is read or written."""

    name: str
    spec: TensorSpec
    writes: bool


def _share_an_element(one: TensorSpec, other: TensorSpec) -> bool:
    """Return whether two tensors on the same device share an element, or may share one."""
    (first, end), (other_first, other_end) = one.span(), other.span()
    if first >= other_end or other_first >= end:
        return False
    if one.dense and other.dense:
        return True
    if one.device != "cpu":
        return True  # an exact test would be slow: refuse rather than corrupt
    return np.shares_memory(_view(one), _view(other))


def refuse_overlap(
    written: Sequence[tuple[str, TensorSpec]], read: Sequence[tuple[str, TensorSpec]] = ()
) -> None:
    """Raise a LayoutError if a written tensor overlaps another one that is written or read.

    The time is linear in the number of tensors, plus the number of elements of interleaved tensors,
    such as the columns of one matrix. The error names both tensors.
    """
    sides = [*written, *read]
    numbers: dict[str, list[int]] = {}
    for number, (_, spec) in enumerate(sides):
        if spec.size:
            numbers.setdefault(spec.device, []).append(number)
    for on_device in numbers.values():
        spans = _spans([sides[number][1] for number in on_device])
        order = np.argsort(spans[:, 0], kind="stable")
        begin, end = spans[order].T
        placed = np.array(on_device)[order]
        # Where all earlier spans have ended, no later tensor shares memory with an earlier one.
        cuts = np.flatnonzero(begin[1:] >= np.maximum.accumulate(end)[:-1]) + 1
        bounds = np.concatenate([[0], cuts, [len(order)]])
        for i in np.flatnonzero(np.diff(bounds) > 1):
            part = slice(bounds[i], bounds[i + 1])
            uses = [_Use(sides[k][0], sides[k][1], k < len(written)) for k in placed[part].tolist()]
            _refuse_sharing(uses, begin[part], end[part])


_MARKED_FOR_A_TEST: Final = 1 << 14
"""Elements that can be marked in the time of one exact test of two tensors."""


def _refuse_sharing(uses: Sequence[_Use], begin: NDArray[np.int64], end: NDArray[np.int64]) -> None:
    """Raise a LayoutError if tensors with connected spans, sorted by first byte, overlap."""
    if not any(use.writes for use in uses):
        return
    within = np.searchsorted(begin, end)  # tensors that begin before the end of each
    tests = int(np.sum(within - np.arange(1, len(uses) + 1)))
    elements = sum(use.spec.size for use in uses)
    if uses[0].spec.device == "cpu" and tests > len(uses) + elements // _MARKED_FOR_A_TEST:
        _refuse_marked(uses, begin, end)
        return
    for i, one in enumerate(uses):
        for other in uses[i + 1 : within[i]]:
            if (one.writes or other.writes) and _share_an_element(one.spec, other.spec):
                raise _overlap(one, other)


def _refuse_marked(uses: Sequence[_Use], begin: NDArray[np.int64], end: NDArray[np.int64]) -> None:
    """Raise a LayoutError like :func:`_refuse_sharing`, by marking every written element."""
    sizes = [use.spec.kind.itemsize for use in uses]
    cell = int(np.gcd.reduce(np.concatenate([begin - begin[0], sizes])))
    marks = np.zeros((int(end.max()) - int(begin[0])) // cell, np.bool_)
    written: list[_Use] = []
    for use in sorted(uses, key=lambda use: not use.writes):
        spec, cells = use.spec, use.spec.kind.itemsize // cell
        # Skip axes of stride 0: their indices share elements.
        axes = [(n, s * cells) for n, s in zip(spec.shape, spec.strides, strict=True) if s]
        shape, strides = zip(*axes, (cells, 1), strict=True)
        first = (spec.address - int(begin[0])) // cell
        its = np.ndarray(shape, np.bool_, marks, first, strides)
        if its.any():
            others = (one for one in written if _share_an_element(one.spec, spec))
            raise _overlap(next(others), use)
        if use.writes:
            its[...] = True
            written.append(use)


def _overlap(one: _Use, other: _Use) -> LayoutError:
    return LayoutError(
        f"{one.name} ({one.spec}) and {other.name} ({other.spec}) overlap in memory; "
        "give each its own storage (.clone())"
    )


class OverlapGuard:
    """Detects, in a few NumPy calls, whether tensors that moved may overlap written ones."""

    def __init__(
        self, written: Sequence[tuple[str, TensorSpec]], read: Sequence[tuple[str, TensorSpec]]
    ) -> None:
        self._written, self._read = _Spans(written), _Spans(read)

    def may_overlap(
        self, written: Mapping[str, int] | None, read: Mapping[str, int] | None
    ) -> bool:
        """Return whether spans of the two sides overlap, so that an exact test is needed.

        ``written`` and ``read`` map names to current addresses; None means that none has moved.
        """
        begin, end = self._written.current_spans(written)
        order = np.argsort(begin)
        begin, end = begin[order], np.maximum.accumulate(end[order])
        low, high = self._read.current_spans(read)
        # The last written tensor that begins before the end of each read one.
        before = np.searchsorted(begin, high) - 1
        return bool(np.any((before >= 0) & (end[before] > low))) if len(end) else False


class _Spans:
    """Addresses of the first and after the last byte of non-empty host tensors."""

    def __init__(self, specs: Sequence[tuple[str, TensorSpec]]) -> None:
        kept = [(name, spec) for name, spec in specs if spec.size and spec.device == "cpu"]
        self._names = [name for name, _ in kept]
        spans = _spans([spec for _, spec in kept])
        addresses = np.array([spec.address for _, spec in kept], np.int64)
        self._begin, self._end = spans[:, 0], spans[:, 1]
        self._low, self._high = self._begin - addresses, self._end - addresses

    def current_spans(
        self, addresses: Mapping[str, int] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if addresses is None:
            return self._begin, self._end
        first = np.array([addresses[name] for name in self._names], np.int64)
        return first + self._low, first + self._high
