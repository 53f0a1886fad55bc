"""Consolidation of live and saved sharded averages into one Hugging Face folder."""

import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.checkpoint import dcp
from fastema.checkpoint.files import StoredTensor
from fastema.checkpoint.folder import Block, begin, pieces, plan, write_blocks
from fastema.distributed import consolidate
from fastema.errors import ArgumentError, CheckpointError
from fastema.layout.dtypes import dtype

from ..conftest import ROOT
from . import cases, merging
from .layouts import build_net

NEEDS = ("safetensors",)


Run = Callable[..., list[Any]]


@pytest.mark.each_value
@pytest.mark.parametrize("layout", ["fsdp 4", "tp 4", "fsdp on tp", "hsdp", "unsharded after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", cases.MAKE)
def test_folder_from_ranks_equals_the_state_of_one_process(
    run: Run, tmp_path: Path, kind: str, dtype: torch.dtype, layout: str
) -> None:
    run(merging.check_live, layout, kind, dtype, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["f32", "bf16", "split"])
def test_one_process_consolidates_a_sharded_checkpoint(run: Run, tmp_path: Path, kind: str) -> None:
    run(merging.save_checkpoint, kind, str(tmp_path / "dcp"), False)
    out = consolidate(tmp_path / "dcp", tmp_path / "out", file_bytes=400)
    want = cases.train_average(kind, build_net()).shadow
    got = merging.load_all(out)
    assert got.keys() == set(want)
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), name


def test_ranks_consolidate_a_checkpoint_and_rest_adds_frozen_weights(
    run: Run, tmp_path: Path
) -> None:
    run(merging.save_checkpoint, "f32", str(tmp_path / "dcp"), False)
    run(merging.check_saved, str(tmp_path / "dcp"), str(tmp_path / "out"))
    run(merging.save_checkpoint, "f32", str(tmp_path / "with model"), True)
    alone = merging.load_all(consolidate(tmp_path / "with model", tmp_path / "alone"))
    assert "lone.weight" not in alone
    both = merging.load_all(consolidate(tmp_path / "with model", tmp_path / "both", rest="model"))
    assert both.keys() == build_net().state_dict().keys()
    assert torch.equal(both["up.weight"], alone["up.weight"])
    assert torch.equal(both["lone.weight"], cases.weights(3)["lone.weight"])


def test_error_on_one_rank_is_raised_on_all_ranks(run: Run, tmp_path: Path) -> None:
    run(merging.check_refusals, str(tmp_path))


def test_pipeline_stages_write_one_folder(run: Run, tmp_path: Path) -> None:
    run(merging.check_stages, str(tmp_path / "out"))


def test_files_from_copies_a_models_other_files_but_no_weights(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    for name in ("config.json", "tokenizer.model", "LICENSE"):
        (origin / name).write_text(name)
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (origin / name).write_text("weights")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ema = fastema.EMA(model)
    out = consolidate(ema, tmp_path / "out", files_from=origin)
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "tokenizer.model", "LICENSE", "model.safetensors"}
    assert merging.load_all(out).keys() == {"0.weight", "0.bias", "1.bias"}
    with pytest.raises(CheckpointError, match="not empty"):
        consolidate(ema, out)
    with pytest.raises(CheckpointError, match="no such folder"):
        consolidate(ema, tmp_path / "new", files_from=tmp_path / "none")
    with pytest.raises(ArgumentError, match="key="):
        consolidate(ema, tmp_path / "new", key="ema")
    with pytest.raises(ArgumentError, match="max_bytes"):
        consolidate(ema, tmp_path / "new", max_bytes=3)
    assert {path.name for path in tmp_path.iterdir()} == {"origin", "out"}


def test_overlapping_chunks_are_detected() -> None:
    def chunk(offset: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        return dcp._Chunk(offset, shape, Path("x"), 0, 0)

    rows = [chunk((0, 0), (3, 4)), chunk((3, 0), (3, 4))]
    assert not dcp._has_overlap(rows)
    assert not dcp._has_overlap([chunk((0,), (0,)), chunk((0,), (4,))])
    assert dcp._has_overlap([rows[0], chunk((2, 3), (1, 1))])
    assert dcp._has_overlap([rows[0], rows[0]])
    assert dcp._has_overlap([chunk((), ()), chunk((), ())])


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_damaged_or_hostile_checkpoint_folders_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(merging.save_checkpoint, "two", str(tmp_path / "dcp"), False)
    with pytest.raises(CheckpointError, match=r"key='trainer.ema', which=0, .*which=1"):
        consolidate("dcp", "out")
    with pytest.raises(CheckpointError, match="holds 0 averages"):
        consolidate("dcp", "out", key="other")
    with pytest.raises(CheckpointError, match="nothing at 'model'"):
        consolidate("dcp", "out", which=0, rest="model")
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        consolidate(tmp_path, "out")
    description = (tmp_path / "dcp" / ".metadata").read_bytes()
    data = next((tmp_path / "dcp").glob("*.distcp"))
    whole = data.read_bytes()

    def spoilt(**files: bytes) -> Path:
        folder = tmp_path / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "dcp", folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    for content in (b"", b"garbage", description[: len(description) // 2], pickle.dumps(_Evil())):
        with pytest.raises(CheckpointError, match="cannot be read"):
            consolidate(spoilt(**{".metadata": content}), "out", which=0)
    for content in (b"", whole[:40], bytes(len(whole))):
        with pytest.raises(CheckpointError):
            consolidate(spoilt(**{data.name: content}), "out", which=0)
    escaped = description.replace(data.name.encode(), b"../" + data.name.encode()[3:])
    assert escaped != description
    with pytest.raises(CheckpointError, match="not a file in the folder"):
        consolidate(spoilt(**{".metadata": escaped}), "out", which=0)
    # Pickles that would allocate gigabytes, pipes that would block, and random damage.
    doubled = b"\x80\x02cpathlib\nPosixPath\nX\x40\x00\x00\x00" + b"x" * 64
    doubled += b"q\x00" + b"cpathlib\nPosixPath\nh\x00h\x00\x86Rq\x00" * 30 + b"."
    far = b"\x80\x02]r\x00\x00\x00\x10."
    for content in (doubled, far):
        with pytest.raises(CheckpointError):
            consolidate(spoilt(**{".metadata": content}), "out", which=0)
    folder = spoilt()
    for name in (".metadata", data.name):
        folder = spoilt()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match="is not a file"):
            consolidate(folder, "out", which=0)
        (folder / name).unlink()
    generator = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(description)
        for at in generator.integers(0, len(content), 3):
            content[at] = generator.integers(256)
        shutil.rmtree("out", ignore_errors=True)
        with suppress(CheckpointError):
            consolidate(spoilt(**{".metadata": bytes(content)}), "out", which=0)
    assert not (tmp_path / "evil").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"dcp", "spoilt", "out"}


def test_code_of_the_page_on_sharded_training_runs(run: Run, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "sharded.md").read_text(encoding="utf-8")
    run(merging.run_page, text, str(tmp_path))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_written_in_pieces_fill_the_tensor(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = tuple(int(n) for n in generator.integers(1, 7, generator.integers(0, 5)))
    whole = generator.normal(size=shape).astype(np.float32)
    cuts = [sorted({0, n, int(generator.integers(0, n + 1))}) for n in shape]
    blocks: list[tuple[tuple[int, int], ...]] = [()]
    for points in cuts:
        spans = list(pairwise(points))
        blocks = [(*block, span) for block in blocks for span in spans]
    tensors = {"w": StoredTensor(dtype("f32"), shape)}
    files = plan(tensors, 1000, {})
    partial = begin(tmp_path / "out", files)

    def block(spans: tuple[tuple[int, int], ...]) -> Block:
        index = tuple(slice(*span) for span in spans)
        part = whole[index]
        offset = tuple(first for first, _ in spans)
        return Block("w", offset, part.shape, lambda piece: np.ascontiguousarray(part[piece]))

    write_blocks(partial, files, tensors, map(block, blocks), int(generator.integers(4, 200)))
    got = np.fromfile(partial / "model.safetensors", np.float32, offset=files.places["w"][1])
    np.testing.assert_array_equal(got, whole.reshape(-1))
    for most in (4, 16, 100):
        parts = [whole[piece].reshape(-1) for piece in pieces(shape, 4, most)]
        assert all(part.nbytes <= most for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), whole.reshape(-1))
