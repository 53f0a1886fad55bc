"""Checkpoints that cannot be averaged: named, in a sentence, before anything is written."""

from __future__ import annotations

import json
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastema.checkpoint import average, inspect, open_checkpoint
from fastema.errors import ArgumentError, CheckpointError

from .written import (
    STATES,
    assert_average,
    save_dcp,
    save_folder,
    save_sharded,
    two,
)

NEEDS = ("safetensors", "torch")

pytestmark = pytest.mark.usefixtures("inside")


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


@pytest.mark.parametrize("how", [torch.conj, lambda x: torch.conj(x).imag])
def test_a_tensor_that_torch_changes_when_it_is_read_is_refused(how: Any) -> None:
    torch.save({"w": how(torch.tensor([1 + 2j]))}, "c.pt")
    with pytest.raises(CheckpointError, match="is to be changed"):
        average(["c.pt"], [1.0], "c.safetensors")


def test_other_ties_and_one_name_for_two_tensors_are_refused() -> None:
    w, v = torch.ones(2), torch.zeros(2)
    torch.save({"a": w, "b": v, "c": w}, "u1.pt")
    torch.save({"a": w, "b": v, "c": v}, "u2.pt")
    with pytest.raises(CheckpointError, match="other names are tied in u1"):
        average(["u1.pt", "u2.pt"], [0.5, 0.5], "u.safetensors")
    torch.save({"a": {"b": w}, "a.b": v}, "k.pt")
    with pytest.raises(CheckpointError, match=r"two tensors are called 'a\.b'"):
        open_checkpoint("k.pt")


def test_outputs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    paths = two(tmp_path, {}, {})
    folders = [save_folder(tmp_path / f"f{i}", STATES[i]) for i in range(2)]
    (tmp_path / "link.safetensors").symlink_to(paths[0])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    before = paths[0].read_bytes()
    for given_, out, words in (
        (paths, paths[0], "one of the checkpoints"),
        (paths, tmp_path / "link.safetensors", "one of the checkpoints"),
        (paths, tmp_path / "folder", "is a folder"),
        (paths, tmp_path / "out.pt", "let its name end so"),
        (paths, tmp_path / "none" / "out.safetensors", "there is no folder"),
        (folders, tmp_path / "folder", "not empty"),
        (folders, folders[0], "one of the checkpoints"),
    ):
        with pytest.raises(CheckpointError, match=words):
            average(given_, [0.5, 0.5], out)
    assert paths[0].read_bytes() == before
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["notes.txt"]


def test_weights_are_exact_and_odd_ones_are_warned_of(tmp_path: Path) -> None:
    paths = two(tmp_path, {}, {})
    out = tmp_path / "out.safetensors"
    for weights, words in (([0.1, 1.0], r"sum to 1\.1, not to 1"), ([-1.0, 2.0], "negative")):
        with pytest.warns(UserWarning, match=words):
            average(paths, weights, out)
        assert_average(out, weights, STATES[:2])
    for weights, words in (
        ([1, 1, 1], "3 weights for 2 checkpoints"),
        ([float("nan"), 1.0], "finite"),
    ):
        with pytest.raises(ArgumentError, match=words):
            average(paths, weights, out)
    with pytest.raises(ArgumentError, match="no checkpoints"):
        average([], [], out)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_a_pickle_with_code_is_refused_by_name(inside: Path) -> None:
    path = inside / "1.pt"
    torch.save({"w": torch.ones(2), "args": Evil()}, path)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system|asks for nt\.system"):
        open_checkpoint(path)
    assert not Path("pwned").exists()
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def doubled() -> bytes:
    """Lists that hold the same list twice, forty times within each other."""
    puts = [b"q%c0](h%ch%ce" % (i, i, i) for i in range(40)]
    return b"\x80\x02}X\x01\x00\x00\x00a]" + b"".join(puts) + b"s."


PICKLES = {
    "lists that hold one twice": doubled(),
    "deep tuples": b"\x80\x02}N" + b"\x85" * 300_000 + b"K\x01s.",
    "tuples that hold one twice": b"\x80\x02})q\x00"
    + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    + b"K\x01s.",
    "what changes a function of ours": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b."
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_small_pickles_take_no_time_and_change_nothing_of_ours(name: str) -> None:
    with zipfile.ZipFile("x.pt", "w") as file:
        file.writestr("x/data.pkl", PICKLES[name])
    began = time.monotonic()
    with pytest.raises(CheckpointError):
        inspect("x.pt")
    assert time.monotonic() - began < 30
    torch.save({"w": torch.ones(2)}, "good.pt")
    assert list(open_checkpoint("good.pt").tensors) == ["w"]


@pytest.mark.parametrize(
    ("entry", "content", "words"),
    [
        ("data.pkl", None, "no data.pkl"),
        ("data/0", None, "the numbers of w"),
        ("data/0", b"12", "longer than what is"),
        ("byteorder", b"big", "big-endian"),
        ("deflated", None, "compressed"),
        ("transposed", None, "w is not row-major"),
        ("half of it", None, r"1\.pt"),
    ],
)
def test_torch_files_that_cannot_be_read(entry: str, content: bytes | None, words: str) -> None:
    w = torch.randn(5, 10)
    torch.save({"w": w.t() if entry == "transposed" else w}, "1.pt")
    with zipfile.ZipFile("1.pt") as archive:
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    how = zipfile.ZIP_DEFLATED if entry == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile("1.pt", "w", how) as archive:
        for name, old in entries.items():
            new = content if name.endswith(entry) else old
            if new is not None:
                archive.writestr(name, new)
    if entry == "half of it":
        whole = Path("1.pt").read_bytes()
        Path("1.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint("1.pt")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 5000, "\xff"],
    ids=range(7),
)
def test_a_damaged_index_is_one_sentence(content: str, inside: Path) -> None:
    (inside / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        CheckpointError, match=r"no index of a checkpoint|holds no tensors"
    ) as caught:
        open_checkpoint(inside)
    assert "\n" not in str(caught.value)


def test_parts_that_are_not_there(inside: Path) -> None:
    index = save_sharded(inside / "1", STATES[0]) / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    for change, words in (
        ({"ghost": where["half"]}, "'ghost' is not in the file that it names"),
        ({"half": "gone.safetensors"}, r"gone\.safetensors, which is not there"),
        ({"half": "../gone.safetensors"}, "is no file beside it"),
    ):
        index.write_text(json.dumps({"weight_map": {**where, **change}}))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint("1")
    next(save_dcp(inside / "2", {"w": torch.ones(2)}).glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="is not whole"):
        inspect("2")


def test_what_is_no_checkpoint(inside: Path) -> None:
    (inside / "empty").mkdir()
    os.mkfifo("pipe.safetensors")
    save_file({"a": torch.ones(1)}, "a.safetensors")
    save_file({"a": torch.ones(1)}, "b.safetensors")
    for path, words in (
        ("nothing", "No such file"),
        ("empty", "holds no checkpoint"),
        ("pipe.safetensors", "no file and no folder"),
        (".", "files that could be meant"),
        ("a\0b", "cannot read"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)
