"""The mean of all weights, and the mean between two of its states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastema

from .truth import Loop


def weights_at(step: int, dtype: Any = float) -> np.ndarray:
    values = np.random.default_rng(step).normal(3, 1, (2, 100))
    return (values[0] + 1j * values[1] if np.dtype(dtype).kind == "c" else values[0]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.complex64])
@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 4), (5, 1), (6, 3)])
def test_it_is_the_mean_of_what_it_saw(start: int, every: int, dtype: Any) -> None:
    x = weights_at(0, dtype)
    swa = fastema.SWA([x], start_after=start, update_every=every)
    real = np.empty(0, dtype).real.dtype
    code = {"float32": "f32", "float64": "f64", "float16": "f16"}[real.name]

    def fresh() -> Loop:
        return Loop(x.view(real), code, "f64" if code == "f64" else "f32", random=code == "f16")

    loop, seen = fresh(), [x.copy()]
    for step in range(1, 81):
        x[:] = weights_at(step, dtype)
        swa.update()
        n = step - start
        if n <= 0:
            loop, seen = fresh(), [x.copy()]
        elif n % every == 0:
            seen = [*(seen if n > every else []), x.copy()]
            loop.step(x.view(real), 1 / len(seen))
        loop.check(swa.shadow["0"].view(real))
    mean = np.mean([one.view(real) for one in seen], axis=0, dtype=np.float64)
    np.testing.assert_allclose(loop.value, mean, rtol=1e-12)


# -- between two states ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
@pytest.mark.parametrize(("m", "n"), [(1, 2), (10, 11), (40, 100), (99, 100)])
def test_any_window_from_two_means(m: int, n: int, dtype: Any) -> None:
    weights = {"a": weights_at(0, dtype), "count": np.arange(3)}
    wide = np.complex128 if np.dtype(dtype).kind == "c" else np.float64
    swa = fastema.SWA(weights, shadow_dtype="float64")
    seen = []
    for step in range(1, n + 1):
        weights["a"][:] = weights_at(step, dtype)
        weights["count"][:] = step
        swa.update()
        seen.append(weights["a"].astype(wide))
        if step == m:
            earlier = swa.state_dict()["shadow"][0]
    got = fastema.mean_between(swa.shadow, n, earlier, m)
    assert set(got) == {"a"}
    assert got["a"].dtype == wide
    want = np.mean(seen[m:], axis=0)
    # Some units in the last place of a float64, as many as the windows differ.
    np.testing.assert_allclose(got["a"], want, rtol=0, atol=8 * n / (n - m) * n * 2.0**-53)
