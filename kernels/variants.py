"""The kernels that averages, swaps and copies use, which a wheel ships compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

FLOATS = ("f64", "f32", "f16", "bf16")
FORMS = (*FLOATS, "f16~", "bf16~", "bf16+16")
"""Formats that an average is stored in; a windowed mean is stored in all but the last."""

RAW = ("raw1", "raw2", "raw4", "raw8")
LAYOUTS = ("flat", "strided")
ENTRY = "fastema_kernel"
"""The name of every CPU kernel in its machine code."""

FUNCTIONS = ("check_tensors", "run_launches", "run_program", "rolling_mean", "ewm_mean")
"""CPU functions that do not work on pairs of tensors."""

CLOCK = "advance"
"""The kernel that advances a clock to the next update; it has no formats and no layout."""


_RINGS = {
    "f64": FLOATS,
    "f32": ("f32", "f16", "bf16"),
    "f16": ("f16",),
    "bf16": ("bf16",),
}
"""By format of the weights, formats of a window's ring: the same or a narrower one."""


class Variant(NamedTuple):
    """An operation, the formats of its streams, and the layout of its tables."""

    operation: str
    formats: tuple[str, ...]
    layout: str


def _formats() -> Iterator[tuple[str, ...]]:
    """Yield operations and their formats."""
    for dst in FORMS:
        for src in FLOATS:
            yield "lerp", dst, src
    for dst in (*FLOATS, "bf16+16"):
        for src in FLOATS:
            if dst != src:
                yield "copy", dst, src
                yield "cast_back", dst, src
    for dst in FLOATS:
        for src in FLOATS:
            if dst != src:
                yield "swap", dst, src
    for src in FLOATS:
        yield "finite", src, src
    for raw in RAW:
        yield "copy", raw, raw
        yield "cast_back", raw, raw
        yield "swap", raw, raw
    yield "swap", "bf16+16", "raw4"
    yield "park", "raw4", "raw2"
    yield "unpark", "raw4", "raw2"
    for dst in FORMS[:-1]:
        for src in FLOATS:
            for ring in _RINGS[src]:
                yield "window", dst, src, ring, "f64" if "f64" in (dst, src) else "f32"


def _of_pairs() -> list[Variant]:
    return [
        Variant(operation, tuple(formats), layout)
        for operation, *formats in dict.fromkeys(_formats())
        for layout in LAYOUTS
    ]


def gpu_variants() -> list[Variant]:
    """Return every GPU kernel of a wheel, with that of the clock last."""
    return [*_of_pairs(), Variant(CLOCK, (), "")]


def cpu_variants() -> list[Variant]:
    """Return every CPU kernel of a wheel, with those that do not work on pairs last."""
    return [*_of_pairs(), *(Variant(name, (), "") for name in FUNCTIONS)]
