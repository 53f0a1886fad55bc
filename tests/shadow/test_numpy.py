"""Averages of NumPy arrays, without any other framework."""

from collections.abc import Callable

import numpy as np
import pytest

import fastema
from fastema.errors import LayoutError

VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": lambda a: np.asfortranarray(a),
    "reversed": lambda a: a[::-1, ::-1],
    "columns": lambda a: a[:, 3:9],
    "steps": lambda a: a[::3, ::2],
    "transposed": lambda a: a.T,
    "flat": lambda a: a.reshape(-1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_averaged_and_swapped_in_place(view: str) -> None:
    whole = np.random.default_rng(0).normal(size=(30, 20)).astype(np.float32)
    weights = VIEWS[view](whole)
    ema = fastema.EMA([weights], 0.5)
    old = weights.copy()
    weights += 1
    rest = whole.copy()
    ema.update()
    np.testing.assert_allclose(ema.shadow["0"], old + 0.5, rtol=1e-6)
    np.testing.assert_array_equal(whole, rest)
    with ema.swapped():
        np.testing.assert_allclose(weights, old + 0.5, rtol=1e-6)
        weights += 1
        assert np.count_nonzero(whole != rest) == (weights.size if view != "fortran" else 0)
        weights -= 1
    np.testing.assert_array_equal(whole, rest)


def read_only() -> np.ndarray:
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    return array


def test_read_only_arrays_are_averaged_and_never_written() -> None:
    weights = {"fixed": read_only(), "free": np.full(2, 5.0)}
    ema = fastema.EMA(weights, 0.5)
    later = {"fixed": np.full(3, 2.0, np.float32), "free": np.full(2, 7.0)}
    later["fixed"].flags.writeable = False
    ema.update(later)
    with pytest.raises(LayoutError, match="fixed"):
        ema.apply_shadow()
    assert not ema.applied
    with ema.swapped() as held:
        np.testing.assert_array_equal(held["fixed"], np.full(3, 1.5, np.float32))
        np.testing.assert_array_equal(held["free"], np.full(2, 6.0))
        assert held["fixed"].flags.writeable
        assert held is not later
    np.testing.assert_array_equal(later["fixed"], np.full(3, 2.0, np.float32))
    np.testing.assert_array_equal(later["free"], np.full(2, 7.0))
    np.testing.assert_array_equal(weights["fixed"], np.ones(3, np.float32))
