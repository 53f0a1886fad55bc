"""Averages of finished checkpoints: any layout in, the sum of float64 out, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastema.checkpoint import average, dcp, merge, open_checkpoint, weights
from fastema.checkpoint.files import StoredTensor
from fastema.checkpoint.select import select
from fastema.errors import ArgumentError, CheckpointError, StorageError
from fastema.layout.dtypes import dtype

from ..conftest import ROOT
from .conftest import files_up_to
from .written import (
    SAVED,
    STATES,
    WEIGHTS,
    assert_average,
    save_dcp,
    save_folder,
    save_safetensors,
    save_torch,
    two,
)

NEEDS = ("safetensors", "torch")


@pytest.mark.parametrize("layout", SAVED)
def test_an_average_is_the_sum_in_float64_of_any_layout(layout: str, tmp_path: Path) -> None:
    save, kind = SAVED[layout]
    paths = [save(tmp_path / f"step-{100 * i}", one) for i, one in enumerate(STATES)]
    found = open_checkpoint(paths[2])
    assert found.format == kind
    assert found.step == (7 if layout == "Lightning" else 200)
    folder = paths[0].is_dir()
    out = tmp_path / ("out" if folder else "out.safetensors")
    read: list[int] = []
    assert average(paths, WEIGHTS, out, advance=read.append) == out
    assert_average(out, WEIGHTS)
    assert sum(read) == merge.prepare([open_checkpoint(path) for path in paths]).nbytes
    if folder:
        expected = {file.name for file in paths[-1].glob("*.json")}
        if layout == "sharded safetensors":
            expected |= {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        else:
            expected = (expected - {"pytorch_model.bin.index.json"}) | {"model.safetensors"}
        assert {file.name for file in out.iterdir()} == expected


def test_layouts_and_dtypes_may_be_mixed_and_the_newest_decides(tmp_path: Path) -> None:
    wide = {name: t.double() if t.dtype == torch.float32 else t for name, t in STATES[1].items()}
    first = save_dcp(tmp_path / "a", STATES[0])
    paths = [first, save_torch(tmp_path / "b", wide), save_safetensors(tmp_path / "c", STATES[2])]
    out = average(paths, [0.5, 0.25, 0.25], tmp_path / "out.safetensors")
    assert_average(out, [0.5, 0.25, 0.25], [STATES[0], wide, STATES[2]])


def test_several_averages_are_made_in_one_pass(tmp_path: Path) -> None:
    paths = [save_folder(tmp_path / f"{i}", one) for i, one in enumerate(STATES)]
    read: list[int] = []
    made = merge.prepare([open_checkpoint(path) for path in paths])
    merge.merge(made, {tmp_path / "one": WEIGHTS, tmp_path / "other": [0.2] * 5}, read.append)
    assert_average(tmp_path / "one", WEIGHTS)
    assert_average(tmp_path / "other", [0.2] * 5)
    assert sum(read) == made.nbytes


def test_parts_of_rows_in_a_distributed_folder_are_put_in_order(tmp_path: Path) -> None:
    """Blocks divided along the second axis, as tensor parallel writes them."""
    whole = np.arange(6 * 10, dtype=np.float32).reshape(6, 10)
    chunks = []
    for i, (rows, columns) in enumerate([((0, 4), (0, 3)), ((4, 6), (0, 3)), ((0, 6), (3, 10))]):
        path, part = tmp_path / f"{i}.distcp", whole[slice(*rows), slice(*columns)]
        torch.save(torch.tensor(part), path)
        corner = rows[0], columns[0]
        chunks.append(dcp._Chunk(corner, part.shape, path, 0, path.stat().st_size))
    found = dcp.stretches_of("w", dcp.Chunked(StoredTensor(dtype("f32"), (6, 10)), chunks))
    for first, count in ((0, 240), (8, 100), (36, 4), (200, 40)):
        got = bytearray(count)
        for path, offset, at, size in found.within(first, count):
            got[at : at + size] = path.read_bytes()[offset : offset + size]
        assert bytes(got) == whole.tobytes()[first : first + count]


def test_tied_names_are_averaged_once_and_named_in_the_metadata(tmp_path: Path) -> None:
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    for i, path in enumerate(paths):
        one = torch.full((3,), float(i))
        torch.save({"emb": one, "head": one, "rest": torch.ones(2)}, path)
    out = average(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    found = {name: t.tolist() for name, t in load_file(out).items()}
    assert found == {"emb": [0.5] * 3, "rest": [1.0] * 2}
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["head"] == "emb"  # as safetensors.torch.load_model reads it
        assert opened.metadata()["fastema.average"] == "0.5 * 0.pt; 0.5 * 1.pt"


@pytest.mark.usefixtures("inside")
def test_flat_names_of_a_folder_that_begin_like_a_mapping_stay() -> None:
    tensors = {"model.embed.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}
    save_dcp(Path("flat"), tensors, flat=True)
    average(["flat"], [1.0], "out")
    assert load_file("out/model.safetensors").keys() == tensors.keys()


@pytest.mark.usefixtures("inside")
def test_a_checkpoint_of_no_weight_has_no_part() -> None:
    save_file({"a": torch.tensor([float("nan")])}, "1.safetensors")
    save_file({"a": torch.ones(1)}, "2.safetensors")
    average(["1.safetensors", "2.safetensors"], [0.0, 1.0], "mean.safetensors")
    assert load_file("mean.safetensors")["a"].item() == 1.0


def test_shards_of_any_ending_are_not_copied_over_the_average(inside: Path) -> None:
    for value in (1.0, 2.0):
        folder = inside / f"{value:g}"
        folder.mkdir()
        for name in "ab":
            save_file({name: torch.full((2,), value)}, folder / f"{name}.sft")
        index = json.dumps({"weight_map": {name: f"{name}.sft" for name in "ab"}})
        (folder / "model.safetensors.index.json").write_text(index)
    average(["1", "2"], [0.5, 0.5], "out")
    assert load_file("out/a.sft")["a"].tolist() == [1.5, 1.5]


def test_checkpoints_of_a_folder_are_chosen_by_step(tmp_path: Path) -> None:
    steps = (900, 100, 500, 450, 1000)
    for step in steps:
        save_file({"w": torch.ones(1)}, tmp_path / f"model-v2-step_{step:06d}.safetensors")
    (tmp_path / "notes.txt").write_text("")

    def chosen(**options: Any) -> list[int | None]:
        return [one.step for one in select(tmp_path, **options)]

    assert chosen() == sorted(steps)
    assert chosen(last=2) == [900, 1000]
    assert chosen(window=500) == [900, 1000]
    assert chosen(window=501) == [500, 900, 1000]
    assert chosen(min_spacing=200) == [100, 500, 1000]
    assert chosen(min_spacing=100, last=3) == [500, 900, 1000]
    with pytest.raises(ArgumentError, match="last=9: 5 checkpoints"):
        chosen(last=9)
    average([one.path for one in select(tmp_path)], [0.2] * 5, tmp_path / "mean.safetensors")
    assert chosen() == sorted(steps)  # an average is no checkpoint of the run
    save_file({"w": torch.ones(1)}, tmp_path / "final.safetensors")
    with pytest.raises(CheckpointError, match=r"step is not known.*\n.*final\.safetensors"):
        chosen()


STEPS = [100, 200, 450, 500, 900]


@pytest.mark.parametrize(
    ("found", "want"),
    [
        (weights.swa(5), [0.2] * 5),
        (weights.sma(5, 2), [0, 0, 0, 0.5, 0.5]),
        (weights.wma(5), [1 / 15, 2 / 15, 3 / 15, 4 / 15, 5 / 15]),
        (weights.wsm(5, "linear"), [0.2] * 5),
        (weights.wsm(5, "1-sqrt"), np.diff(np.sqrt([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))),
        # Each stands for the steps since the one before, as for an EMA that sees it at all of them.
        (weights.ema(STEPS, 0.99), np.diff([0.0, *0.99 ** (900 - np.array(STEPS))])),
    ],
    ids=["swa", "sma", "wma", "linear", "1-sqrt", "ema"],
)
def test_weights_of_five_unevenly_spaced_checkpoints(found: list[float], want: list[float]) -> None:
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_weights_that_cannot_be() -> None:
    for call, words in (
        (lambda: weights.sma(3, 4), "sma=4: there are 3"),
        (lambda: weights.ema([1, 1], 0.9), "rising steps"),
        (lambda: weights.ema([1, 2], 1.0), r"ema=1\.0: expected a decay"),
        (lambda: weights.wsm(3, "cubic"), "expected one of linear, cosine, 1-sqrt"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()


SLOWLY = """
import sys
from fastema.checkpoint import average
print("ready", flush=True)
average(sys.argv[1:4], [0.5, 0.25, 0.25], sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("folder", [False, True])
def test_a_killed_average_leaves_nothing_that_looks_finished(folder: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    save = save_folder if folder else save_safetensors
    big = [{"w": torch.randn(6_000_000), "half": torch.ones(3).half()} for _ in range(3)]
    paths = [save(tmp_path / f"{i}", one) for i, one in enumerate(big)]
    killed = 0
    for trial in range(12):
        out = tmp_path / (f"out{trial}" if folder else f"out{trial}.safetensors")
        command = [sys.executable, "-c", SLOWLY, *map(str, paths), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.0, 0.6))
            process.kill()
        killed += not out.exists()
        if out.exists():
            assert_average(out, [0.5, 0.25, 0.25], big)
    assert killed


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    paths = two(tmp_path, {}, {})
    with files_up_to(100_000), pytest.raises(StorageError, match="cannot write"):
        average(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.slow
def test_memory_stays_below_its_bound(tmp_path: Path, python: Callable[..., str]) -> None:
    for i in range(40):
        save_file({"w": torch.randn(4_000_000)}, tmp_path / f"{i}.safetensors")
    grown = python(
        """
        import resource, sys
        from pathlib import Path
        from fastema.checkpoint import average
        paths = sorted(Path(sys.argv[1]).iterdir())
        average(paths[:2], [0.5, 0.5], sys.argv[2])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        average(paths, [1 / 40] * 40, sys.argv[2])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """,
        str(tmp_path),
        str(tmp_path.with_suffix(".safetensors")),
    )
    assert int(grown) < 150 << 10  # of 640 MB
