"""Pairs of tensors: which may be worked on together, and what may not lie where.

Nothing here touches memory; every refusal names the tensor and comes before the first write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.errors import DTypeError, LayoutError
from fastema.layout.spec import TensorSpec

__all__ = [
    "Guard",
    "Pair",
    "check_pair",
    "refuse_overlap",
    "refuse_shared_elements",
    "refuse_unwritable",
    "unique",
]


class Pair(NamedTuple):
    """A tensor that is written and the tensor it is written from, under one name.

    Attributes
    ----------
    name : str
    dst, src : TensorSpec
    form : str
        The kernel format of ``dst`` where it is not that of its dtype: rounded by random bits, or
        completed by ``low``.
    low : TensorSpec, optional
        A companion of ``dst``, with its shape and strides.
    ring : (TensorSpec, int), optional
        The first slot of a ring that lies as ``dst`` does, and the bytes from slot to slot.
    which : int
        Which of the averages that are updated together this is.
    """

    name: str
    dst: TensorSpec
    src: TensorSpec
    form: str = ""
    low: TensorSpec | None = None
    ring: tuple[TensorSpec, int] | None = None
    which: int = 0


def check_pair(pair: Pair) -> None:
    """Refuse a pair that no kernel can work on.

    Raises
    ------
    LayoutError
        If shapes or devices differ, or either side names one element by several indices where it
        would be written.
    DTypeError
        If one side is complex and the other is not, or an integer meets another dtype.
    BridgeError
        If the written side is read-only.
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
    if dst.kind.parts != src.kind.parts:
        raise DTypeError(f"{name}: {dst.dtype} and {src.dtype} mix complex and real numbers")
    if dst.dtype != src.dtype and (dst.kind.real is None or src.kind.real is None):
        raise DTypeError(
            f"{name}: {src.dtype} cannot become {dst.dtype}; integers and booleans are only "
            "copied and swapped within their own dtype"
        )


def refuse_unwritable(name: str, spec: TensorSpec) -> None:
    """Refuse to write where the framework, or the strides, do not allow it."""
    if not spec.writable:
        raise LayoutError(
            f"{name}: {spec} is read-only (so are all arrays of JAX, and tensors of TensorFlow); "
            "pass a writable copy"
        )
    refuse_shared_elements(name, spec)


def refuse_shared_elements(name: str, spec: TensorSpec) -> None:
    """Refuse a tensor of which several indices are one element: it cannot take an average."""
    if spec.overlaps_itself:
        raise LayoutError(
            f"{name}: several indices of {spec} share one element (expanded, or strides "
            f"{list(spec.strides)}); call .clone() or .contiguous() on it"
        )


def unique(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs without repetitions of the same memory (tied weights), first name kept."""
    kept: dict[tuple[TensorSpec, TensorSpec], Pair] = {}
    for pair in pairs:
        kept.setdefault((pair.dst, pair.src), pair)
    return list(kept.values())


class _Array:
    """A spec as NumPy sees memory, for its exact overlap test."""

    def __init__(self, spec: TensorSpec) -> None:
        itemsize = spec.kind.itemsize
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{itemsize}",
            "shape": spec.shape,
            "strides": tuple(s * itemsize for s in spec.strides),
            "data": (spec.address, True),
        }


def _share_an_element(one: TensorSpec, other: TensorSpec) -> bool:
    if one.dense and other.dense:
        return True
    if one.device != "cpu":
        return True  # cannot be looked at cheaply: refuse rather than corrupt
    return np.shares_memory(np.asarray(_Array(one)), np.asarray(_Array(other)))


def refuse_overlap(
    written: Sequence[tuple[str, TensorSpec]], read: Sequence[tuple[str, TensorSpec]] = ()
) -> None:
    """Refuse tensors of which one is written where another is written or read.

    Raises
    ------
    LayoutError
        Naming both tensors.
    """
    entries = [(spec.device, *spec.span(), True, name, spec) for name, spec in written]
    entries += [(spec.device, *spec.span(), False, name, spec) for name, spec in read]
    entries = sorted((e for e in entries if e[2] > e[1]), key=lambda e: e[:3])
    for i, (device, _, end, writes, name, spec) in enumerate(entries):
        for other in entries[i + 1 :]:
            if other[0] != device or other[1] >= end:
                break
            if (writes or other[3]) and _share_an_element(spec, other[5]):
                raise LayoutError(
                    f"{name} ({spec}) and {other[4]} ({other[5]}) overlap in memory; "
                    "give each its own storage (.clone())"
                )


class Guard:
    """Notices, in a few NumPy calls, that tensors which moved may lie where others are written.

    Parameters
    ----------
    written, read : sequence of (str, TensorSpec)
    """

    def __init__(
        self,
        written: Sequence[tuple[str, TensorSpec]],
        read: Sequence[tuple[str, TensorSpec]],
    ) -> None:
        self._written, self._read = _Spans(written), _Spans(read)

    def touched(self, written: Mapping[str, int] | None, read: Mapping[str, int] | None) -> bool:
        """Whether spans of the two sides meet: there the exact test has to decide.

        Parameters
        ----------
        written, read : mapping of str to int, optional
            Addresses by name; a side that is not given is where it was.
        """
        begin, end = self._written.now(written)
        order = np.argsort(begin)
        begin, end = begin[order], np.maximum.accumulate(end[order])
        low, high = self._read.now(read)
        # The last of those that begin before the end of what is read.
        before = np.searchsorted(begin, high) - 1
        return bool(np.any((before >= 0) & (end[before] > low))) if len(end) else False


class _Spans:
    """First byte, and byte after the last, of the tensors of the host that have elements."""

    def __init__(self, specs: Sequence[tuple[str, TensorSpec]]) -> None:
        kept = [(name, spec) for name, spec in specs if spec.size and spec.device == "cpu"]
        self._names = [name for name, _ in kept]
        spans = np.array([spec.span() for _, spec in kept], np.int64).reshape(-1, 2)
        addresses = np.array([spec.address for _, spec in kept], np.int64)
        self._begin, self._end = spans[:, 0], spans[:, 1]
        self._low, self._high = self._begin - addresses, self._end - addresses

    def now(
        self, addresses: Mapping[str, int] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if addresses is None:
            return self._begin, self._end
        first = np.array([addresses[name] for name in self._names], np.int64)
        return first + self._low, first + self._high
