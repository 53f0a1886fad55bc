"""Sums of files equal the sums of their arrays, whatever the sizes of pieces and buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastema.bridges.memory import allocate
from fastema.bridges.registry import describe
from fastema.checkpoint import files, sums
from fastema.layout.dtypes import dtype

NEEDS = ("safetensors",)


SHAPES = {"a": (3, 5), "b": (40_000,), "none": (0, 3), "c": (), "d": (17, 1_000), "e": (1,)}


def written(folder: Path, count: int, kind: str, seed: int) -> tuple[list[files.File], list[dict]]:
    generator = np.random.default_rng(seed)
    made, arrays = [], []
    for i in range(count):
        one = {n: generator.standard_normal(s).astype(kind) for n, s in SHAPES.items()}
        one["steps"] = np.array(10 * i)
        files.write(folder / f"{i}.safetensors", {n: describe(x) for n, x in one.items()})
        made.append(files.read(folder / f"{i}.safetensors"))
        arrays.append(one)
    return made, arrays


@pytest.mark.parametrize(("room", "together"), [(1_000, 2), (1 << 16, 16)])
@pytest.mark.parametrize(
    ("kind", "to"), [("float32", "f32"), ("float16", "f32"), ("float64", "f64"), ("float32", "f64")]
)
def test_sum(
    kind: str, to: str, room: int, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_ROOM", room)
    monkeypatch.setattr(sums, "_TOGETHER", together)
    made, arrays = written(tmp_path, 5, kind, seed=4)
    coefficients = [3.0, -2.5, 0.25, 1.5, -1.25]
    kinds = {name: dtype("i64" if name == "steps" else to) for name in (*SHAPES, "steps")}
    memories = allocate((describe(arrays[0][name]), code) for name, code in kinds.items())
    result = dict(zip(kinds, memories, strict=True))
    for array, _ in result.values():
        array[...] = 77
    seen: list[int] = []
    sums.weighted_sum(made, coefficients, result, list(SHAPES), seen.append)
    for name in SHAPES:
        want = sum(
            c * one[name].astype(np.float64) for c, one in zip(coefficients, arrays, strict=True)
        )
        got = result[name][0]
        tolerance = 2.0**-24 if to == "f32" else 2.0**-47
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * 1e-3 + 1e-15)
    assert result["steps"][0] == 40  # as in the last file
    assert sum(seen) == sum(one[name].nbytes for one in arrays for name in SHAPES)
