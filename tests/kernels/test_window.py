"""The windowed mean in one pass: exact at every step."""

from typing import NamedTuple

import numpy as np
import pytest

from fastema.kernels import table as abi
from fastema.kernels.table import BLOCK

from ..support import reference
from ..support.arrays import GuardedArray, bits, lay_out_guarded, numbers
from ..support.tolerance import cast_bound, unit_roundoff
from .rows import Row, run

# Formats of the mean, the weights, the ring and the remainder.
FORMATS = [
    ("f32", "f32", "f32", "f32"),
    ("f64", "f64", "f64", "f64"),
    ("f32", "bf16", "bf16", "f32"),
    ("bf16", "bf16", "bf16", "f32"),
    ("bf16~", "bf16", "bf16", "f32"),
    ("f16~", "f16", "f16", "f32"),
    ("f64", "f32", "f32", "f64"),
    ("f32", "f32", "bf16", "f32"),
    ("f32", "f64", "f32", "f32"),
]
FAST = FORMATS[0], FORMATS[4]

Array = np.ndarray


class Mean(NamedTuple):
    """The arrays and table rows of a windowed mean."""

    mean: Array
    rest: Array
    ring: Array  # (window, size)
    rows: list[Row]
    formats: tuple[str, ...]
    watched: list[GuardedArray]

    def step(self, turn: int) -> None:
        window = len(self.ring)
        args = {"window": window, "slot": (turn - 1) % window, "turn": turn, "step": turn}
        layout = "flat" if self.rows[0].dst_step == 1 else "strided"
        number = float(min(turn, window))
        run("window", self.formats, self.rows, [number], layout=layout, seed=1, **args)


def make_mean(
    formats: tuple[str, ...], x: Array, window: int, rows: int = 3, step: int = 1, of_step: int = 1
) -> Mean:
    """Allocate a mean filled with sevens, since the first update must not read old contents."""
    n = x.size
    dst, _, ring_format, rest_format = (code.strip("~") for code in formats)
    sevens = [np.full(n, 7, reference.FLOATS[code].storage) for code in (dst, rest_format)]
    watched = [lay_out_guarded(seven, 1, (step,)) for seven in sevens]
    slots = np.full((window, n), 7, reference.FLOATS[ring_format].storage)
    watched.append(lay_out_guarded(slots, 2, (step * n + 5, step)))
    mean, rest, ring = (one.array for one in watched)
    cuts = [slice(i * n // rows, (i + 1) * n // rows) for i in range(rows)]
    places = [(mean[c], x[c], rest[c], ring[0, c], c.start) for c in cuts]
    stride = ring.strides[0]
    table = [
        Row(a, b, step, of_step, residual=r, ring=slot, ring_stride=stride, index=start)
        for a, b, r, slot, start in places
    ]
    return Mean(mean, rest, ring, table, formats, watched)


# A windowed-mean kernel takes three seconds to compile, so most formats are slow tests.
@pytest.mark.each_value
@pytest.mark.parametrize("window", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "formats",
    [
        pytest.param(one, id="-".join(one), marks=[] if one in FAST else pytest.mark.slow)
        for one in FORMATS
    ],
)
def test_mean_and_remainder_equal_the_ring_mean(formats: tuple[str, ...], window: int) -> None:
    dst, src, ring, rest = formats
    code, size = dst.strip("~"), 3 * (BLOCK + 5)
    x = numbers(size, src, 0)
    held = make_mean(formats, x, window)
    seen: list[Array] = []
    u = unit_roundoff("f64" if "f64" in (dst, src) else "f32")
    for turn in range(1, 2 * window + 9):
        x[:] = numbers(size, src, turn)
        seen.append(reference.decode(reference.cast(x, src, ring), ring))
        held.step(turn)
        want = reference.windowed_mean(np.array(seen[-window:]), window)
        got = reference.decode(held.mean, code)
        # The joint error of mean and remainder: what arithmetic drops, and the rounding of the
        # remainder, over two windows of updates. Long doubles have 64 bits.
        largest = np.abs(np.array(seen[-2 * window :])).max()
        once = cast_bound(np.abs(want).astype(float), code) * (2 if "~" in dst else 1)
        slack = 8 * window * u * u * largest + 2 * window * unit_roundoff(rest) * once.max()
        slack += 2.0**-62 * window * largest
        pair = got + reference.decode(held.rest, rest).astype(np.longdouble)
        assert np.abs(pair - want).max() <= slack
        np.testing.assert_array_less(np.abs(got - want).astype(float), once * (1 + 1e-3) + slack)
        slots = reference.decode(held.ring, ring)
        for age, values in enumerate(reversed(seen[-window:])):
            np.testing.assert_array_equal(slots[(turn - 1 - age) % window], values)
    for side in held.watched:
        side.assert_rest_untouched()


@pytest.mark.slow
@pytest.mark.parametrize("formats", FAST, ids="-".join)
def test_strided_means_equal_dense_ones_to_the_bit(formats: tuple[str, ...]) -> None:
    n = 70
    of = lay_out_guarded(numbers(n, formats[1], 1), 0, (2,))
    spaced = make_mean(formats, of.array, 3, 1, step=3, of_step=2)
    x = of.array.copy()
    dense = make_mean(formats, x, 3, 1)
    for turn in range(1, 9):
        of.array[:] = x[:] = numbers(n, formats[1], turn)
        spaced.step(turn)
        dense.step(turn)
        for one, other in zip(spaced[:3], dense[:3], strict=True):
            np.testing.assert_array_equal(bits(one), bits(other))
    for side in spaced.watched:
        side.assert_rest_untouched()


WINDOW, SLOT, TURN, NEXT = abi.WINDOW, abi.SLOT, abi.TURN, abi.NEXT
