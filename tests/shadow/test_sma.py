"""The windowed mean of weights: that of the window, at every step, for every dtype."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch

import fastema

from ..support import reference
from ..support.tolerance import cast_bound, unit_roundoff
from .kinds import all_of
from .stored import CODES, exact
from .weights import refresh_

pytestmark = pytest.mark.torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def reals(tensor: torch.Tensor) -> np.ndarray:
    """The float64 numbers of a tensor, a complex one's in pairs."""
    return exact(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


class History:
    """What went into the ring, and what the mean of it may be off by."""

    def __init__(self, window: int, average: str, arithmetic: str, random: bool) -> None:
        self.window, self.average = window, average
        self.u, self.share = unit_roundoff(arithmetic), 2 if random else 1
        self.seen: list[np.ndarray] = []

    def check(self, got: np.ndarray) -> None:
        want = reference.windowed_mean(np.array(self.seen[-self.window :]), self.window)
        once = self.share * cast_bound(np.abs(want).astype(float), self.average)
        # As documented, and what rounding the remainder of a 16-bit mean costs.
        largest = np.abs(self.seen[-2 * self.window :]).max()
        slack = 8 * self.window * self.u**2 * largest + 2.0**-62 * self.window * largest
        slack += 2 * self.window * self.u * once.max()
        np.testing.assert_array_less(np.abs(got - want).astype(float), once * (1 + 1e-3) + slack)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: CODES[dtype])
def test_it_is_the_mean_of_the_window(dtype: torch.dtype, window: int) -> None:
    weights = {
        "odd": torch.empty(131, dtype=dtype),
        "matrix": torch.empty(40, 7, dtype=dtype).t(),
        "gaps": torch.empty(200, dtype=dtype)[1::3],
    }
    refresh_(weights, 99)
    sma = fastema.SMA(weights, window)
    code = {"c64": "f32"}.get(CODES[dtype], CODES[dtype])
    narrow = code in ("f16", "bf16")
    arithmetic = "f32" if narrow else code
    histories = {name: History(window, code, arithmetic, narrow) for name in weights}
    for step in range(1, 2 * window + 6):
        refresh_(weights, step)
        sma.update()
        for name, history in histories.items():
            history.seen.append(reals(weights[name]))
            history.check(reals(sma.shadow[name]))
    assert sma.num_updates == 2 * window + 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_forgotten_within_two_windows(dtype: torch.dtype, bad: float) -> None:
    window = 4
    weights, clean = ({"w": torch.empty(5000, dtype=dtype)} for _ in range(2))
    sma, mirror = (fastema.SMA(one, window, rounding="nearest") for one in (weights, clean))
    for step in range(30):
        refresh_(weights, step)
        refresh_(clean, step)
        if step == 11:
            weights["w"][::2] = bad
        sma.update()
        mirror.update()
        got, want = exact(sma.shadow["w"]), exact(mirror.shadow["w"])
        np.testing.assert_array_equal(got[1::2], want[1::2])
        if 11 <= step < 11 + window:
            assert not np.isfinite(got[::2]).any()
        if not 11 <= step < 11 + 2 * window:
            np.testing.assert_array_equal(got, want)
    assert all_of(sma) == all_of(mirror)


@pytest.mark.parametrize(("window", "expected"), [(3, 5), (10, 12)])
def test_memory_is_that_of_the_window_and_two_more(window: int, expected: int) -> None:
    arrays = [np.ones((500, 1000), np.float32), np.ones(300_000, np.float32)]
    fastema.SMA([np.ones(10, np.float32)], window).update()  # the kernel is compiled before
    nbytes = sum(array.nbytes for array in arrays)
    gc.collect()
    tracemalloc.start()
    sma = fastema.SMA(arrays, window)
    for _ in range(2):
        sma.update()
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert expected * nbytes <= held < (expected + 0.1) * nbytes
    assert most < (expected + 0.1) * nbytes
    state = sma.state_dict(copy=False)
    parts = [
        state[part][0][name] for part in ("shadow", "residual", "ring") for name in state[part][0]
    ]
    assert sum(part.nbytes for part in parts) == expected * nbytes


CHANGED = """
    import torch
    import fastema

    # Sizes that fill their memory, so that what is written beyond is somebody else's.
    for before, after in (("float32", "float64"), ("float64", "float32")):
        model = {"w": torch.zeros(4096, dtype=getattr(torch, before))}
        several = [fastema.SMA(model, 3, shadow_dtype="float32") for _ in range(8)]
        for step in range(1, 14):
            if step == 6:
                model["w"] = model["w"].to(getattr(torch, after))
            model["w"].fill_(step)
            for one in several:
                one.update()
            for one in several:
                mean = one.shadow["w"]
                want = sum(range(max(step - 2, 1), step + 1)) / min(step, 3)
                assert torch.equal(mean, torch.full_like(mean, want)), (before, after, step)
    print("done")
"""


def test_a_model_that_changes_its_dtype(python: Callable[..., str]) -> None:
    """What a mean keeps beside itself does not become wider, and is not written as if it did."""
    assert python(CHANGED).strip() == "done"
