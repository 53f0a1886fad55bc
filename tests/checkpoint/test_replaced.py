"""Checkpoints that are replaced or rewritten while they are read, and tensors of any strides."""

import gc
import itertools
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dist_cp
from safetensors.torch import load_file, save_file

import fastema
from fastema.checkpoint import average, files, load_into, open_checkpoint, save, stretches
from fastema.checkpoint.source import Checkpoint
from fastema.errors import CheckpointError

NEEDS = ("safetensors", "torch")

pytestmark = [pytest.mark.usefixtures("inside"), pytest.mark.torch]

SHAPES = ((7,), (3, 5), (2, 3, 4), ())


def tensors(seed: int, names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: SHAPES[ord(name) % len(SHAPES)] for name in names}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_index(state: dict[str, torch.Tensor], path: Path) -> None:
    path.mkdir()
    places = {name: f"model-{k % 2}.safetensors" for k, name in enumerate(state)}
    for file in set(places.values()):
        save_file({name: state[name] for name in state if places[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_dcp(state: dict[str, torch.Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        dist_cp.save(state, checkpoint_id=path)


WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "safetensors": save_file,
    "torch": torch.save,
    "sharded safetensors": write_index,
    "torch.distributed": write_dcp,
}


def replace(kind: str, state: dict[str, torch.Tensor], path: Path) -> None:
    """Replace a checkpoint as careful trainers do: write beside it, then rename."""
    new = path.with_name("new")
    WRITERS[kind](state, new)
    if path.is_dir():
        path.rename(path.with_name("old"))
    new.rename(path)
    shutil.rmtree(path.with_name("old"), ignore_errors=True)


def read(found: Checkpoint) -> dict[str, torch.Tensor]:
    held = {}
    with found.opened() as fill:
        for name, stored in found.tensors.items():
            held[name] = torch.empty(stored.shape)
            fill(name, 0, held[name].reshape(-1).numpy().view(np.uint8).data)
    return held


@pytest.mark.parametrize("kind", WRITERS)
def test_checkpoint_is_read_as_it_was_when_it_was_opened(kind: str) -> None:
    path, before, after = Path("ck"), tensors(1, "abcd"), tensors(2, "zydcbax")
    replace(kind, before, path)
    found = open_checkpoint(path)
    replace(kind, after, path)
    torch.testing.assert_close(read(found), before, rtol=0, atol=0)
    torch.testing.assert_close(read(open_checkpoint(path)), after, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sharded safetensors", "torch.distributed"])
def test_files_of_one_moment_are_opened_together(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, after, opened = Path("ck"), tensors(2, "zydcbax"), []
    replace(kind, tensors(1, "abcd"), path)
    begin = files.OpenFile.__init__

    def open_and_replace(self: Any, path_: Path) -> None:
        begin(self, path_)
        opened.append(path_)
        if len(opened) == 1:  # after the list of files, before the files
            replace(kind, after, path)

    monkeypatch.setattr(files.OpenFile, "__init__", open_and_replace)
    torch.testing.assert_close(read(open_checkpoint(path)), after, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_file_rewritten_in_place_is_an_error(kind: str) -> None:
    path, before = Path("ck"), tensors(1, "abcd")
    WRITERS[kind](before, path)
    found = open_checkpoint(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, ns=(1, 1))
    with pytest.raises(files.FileChangedError, match="ck was changed while it was read"):
        read(found)


def test_of_many_files_the_later_ones_are_checked_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_OPEN", len(files.OpenFile._kept) + 1)
    path = Path("ck")
    save_file(tensors(1, "abcd"), path)
    first, second = open_checkpoint(path), open_checkpoint(path)
    torch.testing.assert_close(read(second), tensors(1, "abcd"), rtol=0, atol=0)
    replace("safetensors", tensors(2, "abcd"), path)
    torch.testing.assert_close(read(first), tensors(1, "abcd"), rtol=0, atol=0)
    with pytest.raises(files.FileChangedError):
        read(second)


def test_opened_files_are_closed_with_their_checkpoints() -> None:
    save_file(tensors(1, "abcd"), "ck")
    before = len(files.OpenFile._kept)
    found = [open_checkpoint("ck") for _ in range(3)]
    assert len(files.OpenFile._kept) == before + 3
    del found
    assert len(files.OpenFile._kept) == before


def test_average_and_load_into_beside_a_writer_that_replaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between any two files that are opened, the checkpoint is replaced."""
    path, states = Path("ck"), [{"ema": tensors(1, "abcd")}, {"ema": tensors(2, "dcba"), "step": 5}]
    model = torch.nn.ParameterDict(tensors(3, "abcd"))
    ema, turn, begin = fastema.EMA(model, decay=0.9), 0, files.OpenFile.__init__

    def open_and_replace(self: Any, path_: Path) -> None:
        nonlocal turn
        begin(self, path_)
        turn += 1
        replace("torch", states[turn % 2], path)  # type: ignore[arg-type]

    replace("torch", states[0], path)  # type: ignore[arg-type]
    monkeypatch.setattr(files.OpenFile, "__init__", open_and_replace)
    for _ in range(5):
        load_into(ema, path)
        held = dict(ema.shadow)
        wanted = [one["ema"] for one in states]
        assert any(all(torch.equal(held[n], one[n]) for n in held) for one in wanted)  # type: ignore[index]
        average([path, path], [0.5, 0.5], "mean.safetensors", key="ema")
        mean = load_file("mean.safetensors")
        possible = [
            {n: (a[n].double() + b[n].double()).div(2).float() for n in mean}  # type: ignore[index]
            for a in wanted
            for b in wanted
        ]
        assert any(all(torch.equal(mean[n], one[n]) for n in mean) for one in possible)


def strided(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "channels last": draw(5, 3, 4, 6).to(memory_format=torch.channels_last),
        "one image": draw(1, 3, 4, 6).to(memory_format=torch.channels_last),
        "volume": draw(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
        "transposed": draw(11, 7).t(),
        "permuted half": draw(3, 4, 5).permute(2, 0, 1).half(),
        "every other": draw(9, 8)[::2, 1::3],
        "expanded": draw(4, 1).expand(4, 6),
        "one number": draw(1).expand(2, 3),
        "empty": draw(0, 3).t(),
        "row": draw(12)[None],
        "plain": draw(3, 5),
    }


@pytest.mark.parametrize("band", [1 << 22, 48])
def test_tensors_of_any_strides_are_read_as_torch_reads_them(
    band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "_BAND", band)
    monkeypatch.setattr(stretches, "_RUN", band // 64)
    state = strided(torch.Generator().manual_seed(5))
    assert not state["channels last"].is_contiguous()
    torch.save(state, "ck.pt")
    found, chance = open_checkpoint("ck.pt"), np.random.default_rng(6)
    with found.opened() as fill:
        for name, tensor in state.items():
            whole = tensor.contiguous().numpy().tobytes()
            assert found.tensors[name].shape == tuple(tensor.shape)
            cuts = sorted({0, len(whole), *chance.integers(0, len(whole) + 1, 5).tolist()})
            for first, last in itertools.pairwise(cuts):  # in pieces, also within numbers
                piece = bytearray(b"\xff" * (last - first))
                fill(name, first, memoryview(piece))
                assert piece == whole[first:last], (name, first, last)


def test_strided_tensors_keep_no_file_open_and_little_memory() -> None:
    torch.save({"w": torch.randn(3000, 2000).t()}, "ck.pt")
    gc.collect()
    gc.disable()
    try:
        before = len(files.OpenFile._kept)
        found = open_checkpoint("ck.pt")
        piece = bytearray(1 << 18)
        with found.opened() as fill:
            fill("w", 1 << 20, memoryview(piece))
        (file,) = found.places["w"].files
        assert 1 << 18 <= file.kept[1].nbytes <= 1 << 22
        del found, fill, file
        assert len(files.OpenFile._kept) == before
    finally:
        gc.enable()


def test_strided_tensor_beyond_its_storage_is_refused() -> None:
    state = {"w": torch.randn(4, 4).t()}
    torch.save(state, "ck.pt")
    with zipfile.ZipFile("ck.pt") as archive:
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile("ck.pt", "w") as archive:
        for name, content in entries.items():  # the strides (1, 4) become (1, 7)
            archive.writestr(name, content.replace(b"K\x01K\x04\x86", b"K\x01K\x07\x86"))
    with pytest.raises(CheckpointError, match="longer than its storage"):
        open_checkpoint("ck.pt")


def test_average_of_a_channels_last_model_goes_through_its_own_files() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = fastema.EMA(model, decay=0.9)
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.5)
    ema.update()
    torch.save({"model": model.state_dict(), "ema": ema.state_dict()}, "ck.pt")
    other = fastema.EMA(model, decay=0.9)
    load_into(other, "ck.pt")
    for name, tensor in ema.shadow.items():
        assert torch.equal(other.shadow[name], tensor)
    average(["ck.pt", "ck.pt"], [0.5, 0.5], "mean.safetensors", key="ema")
    torch.testing.assert_close(load_file("mean.safetensors"), dict(ema.shadow), rtol=1e-6, atol=0)
    save(ema, "ema.safetensors")
    load_into(other, "ema.safetensors")
