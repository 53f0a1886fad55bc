"""The steps: the work of each operation on one element, shared by CPU and GPU.

A step is a function of stored values, written in words, without addresses or loops:

``apply(d, residual, s, r, w, word) -> (d, residual, s, r, found)``

It takes the written side, its residual, the other side, the ring's slot, the row's number and 32
random bits. It returns the values to store and a number to sum. Streams that a step does not
touch are neither loaded nor stored. Each function here builds the step of one entry of
:data:`fastema.kernels.operations.OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastema.kernels import scalar
from fastema.kernels.formats import FORMATS, access
from fastema.kernels.jit import device_fn
from fastema.kernels.words import bits32, nan_to_zero, narrow16

_NOTHING = np.float32(0)
"""What a step finds that looks for nothing."""


class Formats(NamedTuple):
    """Formats of a step's streams; None for a stream that it lacks."""

    dst: str
    src: str
    residual: str | None = None
    ring: str | None = None


class Step(NamedTuple):
    """One operation on one set of formats, computed in ``real``; the module describes ``apply``.

    ``number`` converts a row's float64 number to what ``apply`` takes.
    ``reads`` and ``writes`` name the streams that it touches: ``d`` for the written side, ``l`` for
    its residual, ``s`` for the other side and ``r`` for the ring.
    """

    formats: Formats
    real: Callable[..., Any]
    apply: Callable[..., Any]
    reads: str
    writes: str
    number: Callable[..., Any]


def _step(
    dst: str,
    src: str,
    apply: Any,
    reads: str,
    writes: str,
    real: Any = np.float32,
    number: Any = None,
) -> Step:
    """Return a step on two sides, which also touches the residual of a split written side."""
    residual = FORMATS[dst].residual
    if residual is not None:
        reads, writes = reads.replace("d", "dl"), writes.replace("d", "dl")
    return Step(Formats(dst, src, residual), real, apply, reads, writes, number or real)


def lerp(dst: str, src: str, device: str) -> Step:
    """Return the step ``dst += w * (src - dst)``, equal to ``tests.support.reference.lerp``.

    Memory traffic per element: the source once, the average twice.
    """
    real, read, write, read_src, _, number, mean, _ = access(dst, src, device)

    @device_fn
    def apply(d, residual, s, r, w, word):
        new, rest = write(mean(read(d, residual), read_src(s), w, word), word)
        return new, rest, s, r, _NOTHING

    return _step(dst, src, apply, "ds", "d", real, number)


def add(dst: str, src: str, device: str) -> Step:
    """Return the step ``dst += w * src``, for weighted sums, one term per call or row."""
    # Named a second time, an average excludes encodings for means: a sum may leave their range.
    real, read, write, read_src, _, number, _, total = access(dst, src, device, dst)

    @device_fn
    def apply(d, residual, s, r, w, word):
        new, rest = write(total(read(d, residual), read_src(s), w, word), word)
        return new, rest, s, r, _NOTHING

    return _step(dst, src, apply, "ds", "d", real, number)


def copy(dst: str, src: str, device: str) -> Step:
    """Return the step ``dst = src``, converted as ``tests.support.reference.cast`` does."""
    real, _, write, read_src, *_ = access(dst, src, device)

    @device_fn
    def apply(d, residual, s, r, w, word):
        new, rest = write(read_src(s), word)
        return new, rest, s, r, _NOTHING

    return _step(dst, src, apply, "s", "d", real)


def cast_back(dst: str, src: str, device: str) -> Step:
    """Return the step ``src = dst``, converted to the format of ``src``; ``dst`` may be split.

    A float32 average becomes the bfloat16 that :data:`park` puts into the weights, or the high half
    that it is stored as: the nearest, ties away from zero.
    """
    if src == "bf16" and dst in ("f32", "bf16+16"):
        return _export_bf16(dst, src, device)
    real, read, _, _, write_src, *_ = access(dst, src, device)

    @device_fn
    def apply(d, residual, s, r, w, word):
        return d, residual, write_src(read(d, residual)), r, _NOTHING

    return _step(dst, src, apply, "d", "s", real)


def _export_bf16(dst: str, src: str, device: str) -> Step:
    real, read, *_ = access(dst, src, device)

    @device_fn
    def apply(d, residual, s, r, w, word):
        return d, residual, scalar.park_model(bits32(read(d, residual))), r, _NOTHING

    return _step(dst, src, apply, "d", "s", real)


def finite(dst: str, src: str, device: str) -> Step:
    """Return the step that counts NaN and infinite elements of the source.

    It writes nothing. Memory traffic: the source once.
    """
    real, _, _, read_src, *_ = access(dst, src, device)
    largest = real(np.finfo(np.float64 if "f64" in (dst, src) else np.float32).max)

    @device_fn
    def apply(d, residual, s, r, w, word):
        x = read_src(s)
        bad = real(0) if abs(x) <= largest else real(1)
        return d, residual, s, r, bad

    return _step(dst, src, apply, "s", "", real)


def swap(dst: str, src: str, device: str) -> Step:
    """Return the step that exchanges the sides, each rounded to the other's format.

    Raw formats are not rounded. A float32 split in two halves is exchanged with 32 raw bits. Memory
    traffic per element: both sides read and written.
    """
    if FORMATS[dst].residual is not None and src == "raw4":
        return _on_bits(_swap_halves)(dst, src, device)
    real, read, write, read_src, write_src, *_ = access(dst, src, device)

    @device_fn
    def apply(d, residual, s, r, w, word):
        new, rest = write(read_src(s), word)
        return new, rest, write_src(read(d, residual)), r, _NOTHING

    return _step(dst, src, apply, "ds", "ds", real)


def _on_bits(moved: Any, writes: str = "ds") -> Callable[[str, str, str], Step]:
    """Return a maker of steps that apply ``moved(d, residual, s) -> (d, residual, s)`` to bits."""

    @device_fn
    def apply(d, residual, s, r, w, word):
        d, residual, s = moved(d, residual, s)
        return d, residual, s, r, _NOTHING

    return lambda dst, src, device: _step(dst, src, apply, "ds", writes)


@device_fn
def _swap_halves(d, residual, s):
    return scalar.stow_high(s), narrow16(s), scalar.unstow(d, residual)


@device_fn
def _park_bits(d, residual, s):
    return scalar.park_shadow(d, s), residual, scalar.park_model(d)


@device_fn
def _unpark_bits(d, residual, s):
    return scalar.unpark_shadow(s, d), residual, scalar.unpark_model(d)


@device_fn
def _xor_bits(d, residual, s):
    return d ^ s, residual, s


park = _on_bits(_park_bits)
"""The step that puts a float32 average (``raw4``) into bfloat16 weights (``raw2``), losing no bit.

Until ``unpark`` the average's storage holds the raw weights and the bits that the model lacks."""

unpark = _on_bits(_unpark_bits)

read_read_write = _on_bits(_xor_bits, writes="d")
"""The step ``dst ^= src``: a yardstick with the traffic of an update and minimal arithmetic."""


class WindowSteps(NamedTuple):
    """The steps of a windowed mean; a row's number is the number of values in the mean."""

    slide: Step  # adds the newest value, subtracts the oldest and overwrites it
    grow: Step  # adds the newest value while the ring has room
    put: Step  # stores the newest value, leaves the mean unchanged
    begin: Step  # restarts the mean from one slot
    fold: Step  # adds one more slot


def window(dst: str, src: str, ring: str, residual: str, device: str) -> WindowSteps:
    """Return the steps of the mean of the last values of ``src``, rounded to the ring's format.

    The mean is a sum of two floats; the residual, f32 or f64, holds the second.
    """
    real, read, write, read_src, *_ = access(dst, src, device, ring)
    recall = FORMATS[ring].decode
    keep = FORMATS[ring].encode_wide if real is np.float64 else FORMATS[ring].encode
    as_rest = np.float64 if residual == "f64" else np.float32

    @device_fn
    def moved(d, residual, x, old, old_rest, n, word):
        """Return mean and residual after ``mean += (x - old) / n``."""
        mean, left = scalar.mean_step(
            read(d, residual), real(residual), x, old, old_rest, n, real(1) / n
        )
        new, _ = write(mean, word)
        return new, as_rest(nan_to_zero((mean - read(new, residual)) + left))

    @device_fn
    def slide(d, residual, s, r, n, word):
        stored = keep(read_src(s), word)
        new, rest = moved(d, residual, real(recall(stored)), real(recall(r)), real(0), n, word)
        return new, rest, s, stored, _NOTHING

    @device_fn
    def grow(d, residual, s, r, n, word):
        stored = keep(read_src(s), word)
        new, rest = moved(
            d, residual, real(recall(stored)), read(d, residual), real(residual), n, word
        )
        return new, rest, s, stored, _NOTHING

    @device_fn
    def put(d, residual, s, r, n, word):
        return d, residual, s, keep(read_src(s), word), _NOTHING

    @device_fn
    def begin(d, residual, s, r, n, word):
        x = real(recall(r))
        new, _ = write(x, word)
        return new, as_rest(nan_to_zero(x - read(new, residual))), s, r, _NOTHING

    @device_fn
    def fold(d, residual, s, r, n, word):
        new, rest = moved(d, residual, real(recall(r)), read(d, residual), real(residual), n, word)
        return new, rest, s, r, _NOTHING

    formats = Formats(dst, src, residual, ring)
    return WindowSteps(
        Step(formats, real, slide, "dlsr", "dlr", real),
        Step(formats, real, grow, "dls", "dlr", real),
        Step(formats, real, put, "s", "r", real),
        Step(formats, real, begin, "r", "dl", real),
        Step(formats, real, fold, "dlr", "dl", real),
    )
