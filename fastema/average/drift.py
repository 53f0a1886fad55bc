"""The distance between an average and the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.bridges import numpy as host
from fastema.bridges.registry import bridge_of, memory_by
from fastema.engine.program import Program
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

__all__ = ["DRIFT_OF_PARTS", "Drift", "measure"]

DRIFT_OF_PARTS: Final = (
    "drift(): these weights are divided among ranks, and one rank has only its part; measure a "
    "model that is gathered on one rank"
)

AT_ONCE: Final = 1 << 21
"""Maximum elements that are compared at once; buffers take at most 64 bytes for each."""


class Drift(NamedTuple):
    """Distance between an average and the weights.

    Attributes
    ----------
    distance : float
        Euclidean norm of ``weights - average``, over all averaged tensors.
    relative : float
        ``distance`` divided by the norm of the average; infinite if only that norm is 0.
    """

    distance: float
    relative: float


def measure(pairs: Sequence[Pair]) -> Drift:
    """Return the distance of all pairs of an average and weights.

    Parts of both sides are converted into buffers by the kernels of swaps and copies, so any
    dtype, memory order and device will do.
    """
    distance = square = 0.0
    for batch in _batches(pairs):
        average, weights = (one.astype(np.float64) for one in _read(batch))
        with np.errstate(all="ignore"):  # infinities and NaNs show in the result
            square += float(np.vdot(average, average))
            average -= weights
            distance += float(np.vdot(average, average))
    norm, size = math.sqrt(distance), math.sqrt(square)
    return Drift(norm, norm / size if size else math.inf if norm else 0.0)


def _batches(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Yield parts of all pairs, at most :data:`AT_ONCE` elements at a time, with one device each.

    All parts of a batch are converted to the same dtype.
    """
    latest: dict[tuple[str, str], list[Pair]] = {}
    for piece in (piece for pair in pairs if pair.dst.size for piece in _pieces(pair)):
        batch = latest.setdefault((piece.dst.device, _common_dtype(piece)), [])
        if sum(one.dst.size for one in batch) + piece.dst.size > AT_ONCE:
            yield [*batch]
            batch.clear()
        batch.append(piece)
    yield from filter(None, latest.values())


def _common_dtype(pair: Pair) -> str:
    wide = "f64" in (pair.dst.kind.real, pair.src.kind.real)
    return {(1, False): "f32", (1, True): "f64", (2, False): "c64", (2, True): "c128"}[
        pair.dst.kind.parts, wide
    ]


def _pieces(pair: Pair) -> Iterator[Pair]:
    """Yield the pair cut along its longest axes into parts of at most :data:`AT_ONCE` elements."""
    if pair.dst.size <= AT_ONCE:
        yield pair
        return
    axis = max(range(len(pair.dst.shape)), key=pair.dst.shape.__getitem__)
    length = pair.dst.shape[axis]
    step = max(1, AT_ONCE * length // pair.dst.size)
    for first in range(0, length, step):
        dst, src, residual = (
            one and _narrow(one, axis, first, min(step, length - first))
            for one in (pair.dst, pair.src, pair.residual)
        )
        assert dst is not None
        assert src is not None
        yield from _pieces(pair._replace(dst=dst, src=src, residual=residual))


def _narrow(spec: TensorSpec, axis: int, first: int, count: int) -> TensorSpec:
    shape, owner = (*spec.shape[:axis], count, *spec.shape[axis + 1 :]), spec.owner
    if spec.context is not None:  # without kernels, the framework's functions work on the owner
        owner = spec.tensor[(*[slice(None)] * axis, slice(first, first + count))]
    return spec.part(owner, first * spec.strides[axis], shape, spec.strides)


def _read(batch: Sequence[Pair]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the elements of both sides in two flat arrays of reals, in host memory."""
    code, of = _common_dtype(batch[0]), batch[0].dst
    bridge = host if of.context is None else memory_by(bridge_of(of.owner))
    offsets = [0, *accumulate(pair.dst.size for pair in batch)]
    flats = [bridge.zeros(offsets[-1], code, of.device) for _ in range(2)]

    def buffers(flat: Any) -> list[TensorSpec]:
        return [
            bridge.describe(flat[offset : offset + pair.dst.size].reshape(pair.dst.shape))
            for offset, pair in zip(offsets, batch, strict=False)
        ]

    averages = [
        Pair(str(n), pair.dst, buffer, pair.form, pair.residual)
        for n, (pair, buffer) in enumerate(zip(batch, buffers(flats[0]), strict=True))
    ]
    weights = [
        Pair(str(n), buffer, pair.src)
        for n, (pair, buffer) in enumerate(zip(batch, buffers(flats[1]), strict=True))
    ]
    Program({"averages": averages, "weights": weights}).run(
        {"averages": "cast_back", "weights": "copy"}
    )
    read = host.alias if of.context is None else of.context.download
    real = np.float64 if code in ("f64", "c128") else np.float32
    return read(flats[0]).view(real), read(flats[1]).view(real)
