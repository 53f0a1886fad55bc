"""Windowed means of weights: correct at every step, in every dtype."""

import tracemalloc

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import StateError
from fastema.layout.flat import HUGE_PAGE

from ..support import reference
from ..support.states import nested
from ..support.tolerance import cast_bound, unit_roundoff
from .kinds import PARTS, full_state
from .stored import CODES, exact
from .weights import refresh_, train_

pytestmark = pytest.mark.torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def to_reals(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's numbers as float64, complex ones as pairs."""
    return exact(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


def assert_windowed_mean(got: np.ndarray, seen: list[np.ndarray], window: int, code: str) -> None:
    """Assert that an average is the mean of the last values, to its dtype's documented error."""
    narrow = code in ("f16", "bf16")
    want = reference.windowed_mean(np.array(seen[-window:]), window)
    u = unit_roundoff("f32" if narrow else code)
    once = (2 if narrow else 1) * cast_bound(np.abs(want).astype(float), code)
    # The documented bound, plus the rounding of the remainder of a 16-bit mean.
    largest = np.abs(seen[-2 * window :]).max()
    slack = 8 * window * u**2 * largest + 2.0**-62 * window * largest + 2 * window * u * once.max()
    np.testing.assert_array_less(np.abs(got - want).astype(float), once * (1 + 1e-3) + slack)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: CODES[dtype])
def test_sma_equals_the_mean_of_the_window(dtype: torch.dtype, window: int) -> None:
    weights = {
        "odd": torch.empty(131, dtype=dtype),
        "matrix": torch.empty(40, 7, dtype=dtype).t(),
        "gaps": torch.empty(200, dtype=dtype)[1::3],
    }
    refresh_(weights, 99)
    sma = fastema.SMA(weights, window)
    code = "f32" if dtype.is_complex else CODES[dtype]
    seen: dict[str, list[np.ndarray]] = {name: [] for name in weights}
    for step in range(1, 2 * window + 6):
        train_(weights, [step], sma)
        for name, values in seen.items():
            values.append(to_reals(weights[name]))
            assert_windowed_mean(to_reals(sma.shadow[name]), values, window, code)
    assert sma.num_updates == 2 * window + 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nonfinite_weights_are_forgotten_within_two_windows(dtype: torch.dtype, bad: float) -> None:
    window = 4
    weights, clean = ({"w": torch.empty(5000, dtype=dtype)} for _ in range(2))
    sma, mirror = (fastema.SMA(one, window, rounding="nearest") for one in (weights, clean))
    for step in range(30):
        refresh_(weights, step)
        if step == 11:
            weights["w"][::2] = bad
        sma.update()
        train_(clean, [step], mirror)
        got, want = exact(sma.shadow["w"]), exact(mirror.shadow["w"])
        np.testing.assert_array_equal(got[1::2], want[1::2])
        if 11 <= step < 11 + window:
            assert not np.isfinite(got[::2]).any()
        if not 11 <= step < 11 + 2 * window:
            np.testing.assert_array_equal(got, want)
    assert full_state(sma) == full_state(mirror)


@pytest.mark.parametrize("window", [3, 10])
def test_sma_takes_the_memory_of_window_plus_two_models(window: int) -> None:
    arrays = [np.ones((500, 1000), np.float32), np.ones(300_000, np.float32)]
    fastema.SMA([np.ones(10, np.float32)], window).update()  # compiles the kernel
    nbytes = sum(array.nbytes for array in arrays)
    expected = (window + 2) * nbytes
    tracemalloc.start()
    sma = fastema.SMA(arrays, window)
    for _ in range(2):
        sma.update()
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    state = nested(sma.state_dict(copy=False))
    assert sum(one.nbytes for part in PARTS for one in state[part][0].values()) == expected
    # Traced are addresses: the ring begins with a huge page, and what lies before is never touched.
    assert expected <= held <= most < expected + 0.1 * nbytes + HUGE_PAGE


def test_sync_is_refused() -> None:
    sma = fastema.SMA([np.zeros(2)], window=3)
    sma.update()
    with pytest.raises(StateError, match="windowed mean"):
        sma.sync()
