"""Averages of NumPy arrays, without any other framework."""

from collections.abc import Callable
from typing import Any

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


def test_arrays_whose_indices_share_elements_are_refused_by_name() -> None:
    shared = np.lib.stride_tricks.as_strided(np.ones(1), (3,), (0,))
    with pytest.raises(LayoutError, match="b: several indices"):
        fastema.EMA({"a": np.ones(3), "b": shared})


class Exporting:
    """An array of an unknown framework."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)


def test_saved_arrays_of_an_unknown_framework_are_loaded_on_the_host() -> None:
    ema = fastema.EMA({"a": np.ones(3, np.float32)})
    state = ema.state_dict()
    state["shadow.0.a"] = Exporting(np.full(3, 7.0, np.float32))
    ema.load_state_dict(state)
    np.testing.assert_array_equal(ema.shadow["a"], np.full(3, 7.0, np.float32))
