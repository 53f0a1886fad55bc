"""Checkpoints that cannot be averaged: named, in a sentence, before anything is written."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastema.checkpoint import average, open_checkpoint
from fastema.errors import ArgumentError, CheckpointError

from .written import (
    STATES,
    assert_average,
    save_folder,
    save_safetensors,
    save_sharded,
    save_torch,
    two,
)

NEEDS = ("safetensors", "torch")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"half": None}, "'half' is in 0.safetensors, not in 1.safetensors"),
        ({"more": torch.ones(2)}, "'more' is in 1.safetensors, not in 0.safetensors"),
        ({"half": torch.ones(8)}, r"'half' is \[7\] in 0.safetensors, \[8\] in 1.safetensors"),
        ({"half": torch.ones(7).int()}, "'half' is f16 in 0.safetensors, i32 in 1.safetensors"),
        ({"ids": torch.arange(9) + 1}, r"'ids', i64\[9\]: whole numbers that differ"),
        (
            {"scaled": torch.tensor([1, 2, 4]).to(torch.float8_e4m3fn)},
            r"'scaled', f8e4m3fn\[3\]: scaled or packed numbers that differ",
        ),
        ({"complex": torch.ones(3)}, "'complex' is complex in some"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    paths = two(tmp_path, {}, change)
    with pytest.raises(CheckpointError, match=words):
        average(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == paths


def test_outputs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    paths = two(tmp_path, {}, {})
    (tmp_path / "link.safetensors").symlink_to(paths[0])
    (tmp_path / "folder").mkdir()
    before = paths[0].read_bytes()
    for out, words in (
        (paths[0], "one of the checkpoints"),
        (tmp_path / "link.safetensors", "one of the checkpoints"),
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "out.pt", "let its name end so"),
        (tmp_path / "none" / "out.safetensors", "there is no folder"),
    ):
        with pytest.raises(CheckpointError, match=words):
            average(paths, [0.5, 0.5], out)
    folders = [save_folder(tmp_path / f"f{i}", STATES[i]) for i in range(2)]
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for out, words in ((tmp_path / "folder", "not empty"), (folders[0], "one of the checkpoints")):
        with pytest.raises(CheckpointError, match=words):
            average(folders, [0.5, 0.5], out)
    assert paths[0].read_bytes() == before
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["notes.txt"]


def test_weights_are_exact_and_odd_ones_are_warned_of(tmp_path: Path) -> None:
    paths = two(tmp_path, {}, {})
    out = tmp_path / "out.safetensors"
    with pytest.warns(UserWarning, match=r"sum to 1\.1, not to 1"):
        average(paths, [0.1, 1.0], out)
    assert_average(out, [0.1, 1.0], STATES[:2])
    with pytest.warns(UserWarning, match="negative"):
        average(paths, [-1.0, 2.0], out)
    assert_average(out, [-1.0, 2.0], STATES[:2])
    with pytest.raises(ArgumentError, match="3 weights for 2 checkpoints"):
        average(paths, [1, 1, 1], out)
    with pytest.raises(ArgumentError, match="finite"):
        average(paths, [float("nan"), 1.0], out)
    with pytest.raises(ArgumentError, match="no checkpoints"):
        average([], [], out)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/fastema-was-here",)


def test_a_pickle_with_code_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "1.pt"
    torch.save({"w": torch.ones(2), "args": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system|asks for nt\.system"):
        open_checkpoint(path)
    assert not Path("/tmp/fastema-was-here").exists()
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def rezipped(path: Path, change: Callable[[dict[str, bytes]], None], **options: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_damaged_torch_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "1.pt"

    def fresh() -> bytes:
        torch.save({"w": torch.randn(50), "t": torch.randn(4, 3).t()}, path)
        return path.read_bytes()

    fresh()
    with pytest.raises(CheckpointError, match="t is not row-major"):
        open_checkpoint(path)
    torch.save({"w": torch.randn(50)}, path)
    whole = path.read_bytes()
    for change, words in (
        (lambda e: e.pop(next(n for n in e if n.endswith("data.pkl"))), "no data.pkl"),
        (lambda e: e.pop(next(n for n in e if n.endswith("data/0"))), "the numbers of w"),
        (lambda e: e.update({n: b"12" for n in e if n.endswith("data/0")}), "longer than what is"),
        (lambda e: e.update({n: b"big" for n in e if n.endswith("byteorder")}), "big-endian"),
    ):
        path.write_bytes(whole)
        rezipped(path, change)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)
    path.write_bytes(whole)
    rezipped(path, lambda entries: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"1\.pt"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 5000, "\xff"],
    ids=range(7),
)
def test_a_damaged_index_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        CheckpointError, match=r"no index of a checkpoint|holds no tensors"
    ) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_index_of_what_is_not_there(tmp_path: Path) -> None:
    save_sharded(tmp_path / "1", STATES[0])
    index = tmp_path / "1" / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**where, "ghost": where["half"]}}))
    with pytest.raises(CheckpointError, match="'ghost' is not in the file that it names"):
        open_checkpoint(tmp_path / "1")
    index.write_text(json.dumps({"weight_map": {**where, "half": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors, which is not there"):
        open_checkpoint(tmp_path / "1")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    for path, words in (
        (tmp_path / "nothing", "No such file"),
        (tmp_path / "empty", "holds no checkpoint"),
        (tmp_path / "pipe.safetensors", "no file and no folder"),
        (tmp_path, "files that could be meant"),
        ("a\0b", "cannot read"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)


@settings(max_examples=60)
@given(data=st.data())
def test_changed_bytes_are_an_error_or_a_checkpoint(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    save = data.draw(st.sampled_from([save_safetensors, save_torch]))
    path = save(folder / "1", {"w": torch.ones(3), "b": torch.zeros(2, 2).half()})
    content = bytearray(path.read_bytes())
    limit = len(content) if save is save_torch else 300
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(limit, len(content)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        found = open_checkpoint(path)
    except CheckpointError:
        return
    with found.opened() as read:
        for name, tensor in found.tensors.items():
            read(name, 0, memoryview(bytearray(tensor.nbytes)))
