"""Checkpoint files: atomic writes, exact reads, and errors for damage."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fastema.bridges.memory import allocate
from fastema.bridges.registry import describe
from fastema.checkpoint import files, sums
from fastema.errors import CheckpointError, StorageError
from fastema.layout.dtypes import dtype

from ..support.damage import header_of, replace_header

NEEDS = ("safetensors",)


def draw_arrays(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "layer.weight": generator.standard_normal((3, 5)).astype(np.float32),
        "layer.bias": generator.standard_normal(7),
        "half": generator.standard_normal((2, 1, 3)).astype(np.float16),
        "count": np.array(generator.integers(1, 1000)),
        "mask": generator.integers(0, 2, 5).astype(bool),
        "empty": np.empty((0, 4), np.float32),
    }


def test_safetensors_reads_the_written_file(tmp_path: Path) -> None:
    arrays = draw_arrays(1)
    path = tmp_path / "a.safetensors"
    files.write(path, {name: describe(array) for name, array in arrays.items()}, note="x", n="3")
    loaded = safetensors_numpy.load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    assert files.read(path).metadata == {"note": "x", "n": "3"}


def test_unsupported_tensors_are_refused_before_a_file_exists(tmp_path: Path) -> None:
    for array in (np.ones((4, 6)).T, np.ones(8)[::2], np.ones(3, np.complex128)):
        with pytest.raises(CheckpointError, match="x: "):
            files.write(tmp_path / "a.safetensors", {"x": describe(array)})
    with pytest.raises(CheckpointError, match="name"):
        files.write(tmp_path / "a.safetensors", {"\ud800": describe(np.ones(3))})
    assert list(tmp_path.iterdir()) == []


DAMAGES: dict[str, dict[str, Any]] = {
    "far": {"data_offsets": [10**6, 10**6 + 60]},
    "size": {"shape": [3, 6]},
    "dtype": {"dtype": "F4"},
    "negative": {"data_offsets": [-60, 0]},
    "overlapping": {"data_offsets": [4, 64]},
}
CUTS = {"empty": 0, "few": 5, "head": 40, "data": -3}


@pytest.mark.parametrize("kind", [*DAMAGES, *CUTS, "entry", "twice"])
def test_damaged_header_is_detected_on_reading(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write(path, {name: describe(array) for name, array in draw_arrays(3).items()})
    whole = path.read_bytes()
    header = header_of(whole)
    header["layer.weight"] = (
        3 if kind == "entry" else header["layer.weight"] | DAMAGES.get(kind, {})
    )
    text = json.dumps(header)
    if kind == "twice":
        text = text.replace("layer.weight", "layer.bias")
    damaged = whole[: CUTS[kind]] if kind in CUTS else replace_header(whole, text.encode())
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        files.read(path)


ENDED = """
import os, sys
import numpy as np
from fastema.bridges.registry import describe
from fastema.checkpoint import files
files.fsync = lambda path: os._exit(9)
files.write(sys.argv[1], {"x": describe(np.arange(1000.0))})
"""


def test_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write(path, {"x": describe(np.arange(3.0))})
    before = path.read_bytes()
    assert subprocess.run([sys.executable, "-c", ENDED, path], check=False).returncode != 0
    assert path.read_bytes() == before
    assert sorted(tmp_path.glob("*.safetensors")) == [path]
    assert len(list(tmp_path.iterdir())) == 2
    for days, left in ((0.9, 1), (1.1, 0)):  # a partial file may be one that is being written
        for one in tmp_path.iterdir():
            os.utime(one, (then := time.time() - days * 24 * 3600, then))
        files.write(tmp_path / "b.safetensors", {"x": describe(np.arange(4.0))})
        assert len(list(tmp_path.glob(".*.part"))) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert path.read_bytes() == before


SAVER = """
import sys, numpy as np
from fastema.bridges.registry import describe
from fastema.checkpoint import files
for k in range(60):
    files.write(sys.argv[1], {"x": describe(np.full(300, float(sys.argv[2])))})
"""


def test_many_processes_save_into_one_folder(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", SAVER, tmp_path / f"{k // 2}.safetensors", str(k)])
        for k in range(6)
    ]
    assert [one.wait() for one in running] == [0] * 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{k}.safetensors" for k in range(3)
    ]
    for k in range(3):
        found = files.read(tmp_path / f"{k}.safetensors")
        held = np.empty(300)
        with found.opened() as read:
            read("x", 0, held.view(np.uint8).data)
        assert held[0] in (2 * k, 2 * k + 1)
        assert (held == held[0]).all()


def test_folder_that_is_finished_while_it_is_removed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, final = files.partial_path(tmp_path / "mean"), tmp_path / "mean"
    partial.mkdir()
    (partial / "weights").write_bytes(b"all of them")
    for one in (partial / "weights", partial):
        os.utime(one, (1.0, 1.0))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (rename(partial, final), rename(*names)))
    files.remove_abandoned(tmp_path)  # the other process renames it a moment before
    assert [path.name for path in tmp_path.iterdir()] == ["mean"]
    assert (final / "weights").read_bytes() == b"all of them"


def test_full_disk_is_a_storage_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write(path, {"x": describe(np.arange(3.0))})
    before = path.read_bytes()
    large = np.random.default_rng(0).standard_normal(100_000)
    said = r"cannot write .*a\.safetensors: .*[Ff]ile too large"
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(StorageError, match=said):
            files.write(path, {"x": describe(large)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


SHAPES = {"a": (3, 5), "b": (40_000,), "none": (0, 3), "c": (), "d": (17, 1_000), "e": (1,)}


@pytest.mark.parametrize(("room", "together"), [(1_000, 2), (1 << 16, 16)])
@pytest.mark.parametrize(
    ("kind", "to"), [("float32", "f32"), ("float16", "f32"), ("float64", "f64"), ("float32", "f64")]
)
def test_weighted_sum_equals_float64(
    kind: str, to: str, room: int, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_ROOM", room)
    monkeypatch.setattr(sums, "_TOGETHER", together)
    generator = np.random.default_rng(4)
    made, arrays = [], []
    for i in range(5):
        one = {n: generator.standard_normal(s).astype(kind) for n, s in SHAPES.items()}
        one |= {n: np.full(s, np.nan, kind) for n, s in SHAPES.items() if i == 2}
        arrays.append(one | {"steps": np.array(10 * i)})
        path = tmp_path / f"{i}.safetensors"
        files.write(path, {n: describe(x) for n, x in arrays[i].items()})
        made.append(files.read(path))
    coefficients = [3.0, -2.5, 0.0, 1.5, -1.25]  # a file with coefficient 0 has no part
    kinds = {name: dtype("i64" if name == "steps" else to) for name in arrays[0]}
    memories = allocate((describe(arrays[0][name]), code) for name, code in kinds.items())
    result = dict(zip(kinds, memories, strict=True))
    for array, _ in result.values():
        array[...] = 77
    seen: list[int] = []
    sums.weighted_sum(made, coefficients, result, list(SHAPES), seen.append)
    tolerance = 2.0**-24 if to == "f32" else 2.0**-47
    for name in SHAPES:
        each = zip(coefficients, arrays, strict=True)
        want = sum(c * one[name].astype(np.float64) for c, one in each if c)
        got = result[name][0]
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * 1e-3 + 1e-15)
    assert result["steps"][0] == 40  # from the last file
    assert sum(seen) == sum(one[name].nbytes for one in arrays for name in SHAPES)
