"""The kernels of the CPU: every operation's step, in the loop that suits it."""

from __future__ import annotations

from fastema.kernels import steps
from fastema.kernels.cpu_loops import WALKS, elementwise, measuring, over_rows, weight
from fastema.kernels.jit import device_fn
from fastema.kernels.table import COLUMNS, MEASURING, SLOT, TURN, WINDOW
from fastema.kernels.words import load


def kernel(operation: str, formats: tuple[str, ...], layout: str):
    """Compile one operation for the formats of the written side, the other side, and so on."""
    if operation == "window":
        dst, src, ring, low = formats
        return _window(steps.window(dst, src, ring, low, "cpu"), layout)
    loop = measuring if operation in MEASURING else elementwise
    return loop(getattr(steps, operation)(*formats, device="cpu"), layout)


def _window(parts: steps.Window, layout: str):
    """The windowed mean: one pass over weights, mean and the oldest slot of a ring.

    At every update one in ``WINDOW`` rows is computed afresh from the whole ring, so that what
    rounding left behind is forgotten.

    Bytes moved per element, f32 throughout: 4 weights, 8 slot, 8 mean, 8 its companion, and 4 for
    the rows computed afresh: 32, whatever the window.
    """
    slide, grow, put, begin, fold = (WALKS[layout](step) for step in parts)
    real = parts.slide.real

    @device_fn
    def body(cells, at, numbers, settings):
        n = real(weight(cells, at, numbers))
        slots, slot = load(settings, WINDOW), load(settings, SLOT)
        turn = load(settings, TURN)
        if turn == 1:  # whatever the mean held before
            put(cells, at, n, settings, slot)
            begin(cells, at, n, settings, slot)
        elif turn <= slots:
            grow(cells, at, n, settings, slot)
        elif (at // COLUMNS + turn) % slots:
            slide(cells, at, n, settings, slot)
        else:
            put(cells, at, n, settings, slot)
            begin(cells, at, n, settings, 0)
            for other in range(1, slots):
                fold(cells, at, real(other + 1), settings, other)

    return over_rows(body)
