"""Averages of finished checkpoints: any layout in, the sum of float64 out, whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastema.checkpoint import average, merge, open_checkpoint, weights
from fastema.checkpoint.select import select
from fastema.errors import ArgumentError, CheckpointError, StorageError

from ..conftest import ROOT
from ..support.requirements import require

NEEDS = ("safetensors", "torch")

WEIGHTS = [0.1, 0.2, 0.3, 0.15, 0.25]
State = dict[str, torch.Tensor]


def state(seed: int) -> State:
    """Tensors of many dtypes and sizes, one larger than a piece."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "emb.weight": random(700, 131),
        "out.weight": random(40, 30).bfloat16(),
        "bn.running_mean": random(5).double(),
        "bn.num_batches_tracked": torch.tensor(seed),
        "half": random(7).half(),
        "ids": torch.arange(9),
        "scaled": torch.tensor([1, 2, 3]).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
        "scalar": random(),
        "complex": torch.complex(random(3), random(3)),
    }


STATES = [state(seed) for seed in range(5)]


def save_safetensors(path: Path, one: State) -> Path:
    save_file(one, file := path.with_name(f"{path.name}.safetensors"))
    return file


def save_torch(path: Path, one: State) -> Path:
    torch.save({"model": one, "lr": 0.1, "names": ["a", None]}, file := path.with_suffix(".pt"))
    return file


def save_lightning(path: Path, one: State) -> Path:
    torch.save({"state_dict": one, "global_step": 7}, file := path.with_suffix(".ckpt"))
    return file


def save_sharded(path: Path, one: State) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "optimizer.pt").write_bytes(b"")
    names, half = list(one), len(one) // 2
    where = {}
    for number, some in enumerate((names[:half], names[half:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: one[name] for name in some}, path / file)
        where |= dict.fromkeys(some, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


def save_sharded_torch(path: Path, one: State) -> Path:
    path.mkdir()
    names, half = list(one), len(one) // 2
    where = {}
    for number, some in enumerate((names[:half], names[half:]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: one[name] for name in some}, path / file)
        where |= dict.fromkeys(some, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return path


def save_folder(path: Path, one: State) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("[]")
    save_file(one, path / "model.safetensors")
    return path


def save_dcp(path: Path, one: State) -> Path:
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"model": one, "step": torch.tensor(3)}, checkpoint_id=str(path))
    return path


SAVED: dict[str, tuple[Callable[[Path, State], Path], str]] = {
    "safetensors": (save_safetensors, "safetensors"),
    "torch.save": (save_torch, "torch"),
    "Lightning": (save_lightning, "torch"),
    "sharded safetensors": (save_sharded, "sharded safetensors"),
    "sharded torch": (save_sharded_torch, "sharded torch"),
    "Hugging Face folder": (save_folder, "safetensors"),
    "torch.distributed": (save_dcp, "torch.distributed"),
}


def loaded(out: Path) -> State:
    found: State = {}
    for file in sorted(out.glob("*.safetensors")) if out.is_dir() else [out]:
        found |= load_file(file)
    return found


def assert_average(out: Path, coefficients: list[float], states: list[State] = STATES) -> None:
    """Assert that a result is the sum in float64, rounded once; the rest is the newest's."""
    got = loaded(out)
    assert got.keys() == states[-1].keys()
    for name, tensor in states[-1].items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        if tensor.dtype in (torch.int64, torch.float8_e4m3fn):
            assert torch.equal(got[name].float(), tensor.float()), name
            continue
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        want = sum(c * one[name].to(wide) for c, one in zip(coefficients, states, strict=True))
        half_ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(tensor.dtype, 2.0**-24)
        error = (got[name].to(wide) - want).abs()
        assert (error <= want.abs() * 1.01 * half_ulp + 1e-12).all(), name


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
        expected = {file.name for file in paths[-1].glob("*.json")} - {
            "pytorch_model.bin.index.json"
        }
        weights_of = {
            "sharded safetensors": {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
        }
        expected |= weights_of.get(layout, {"model.safetensors"})
        assert {file.name for file in out.iterdir()} == expected


def test_the_model_of_a_folder_is_taken_and_not_what_lies_beside_it(tmp_path: Path) -> None:
    paths = [save_folder(tmp_path / f"checkpoint-{i}", one) for i, one in enumerate(STATES)]
    for path in paths:  # as the Trainer and our callback leave them
        save_file({"other": torch.ones(1)}, path / "ema.safetensors")
        torch.save({"state": {}}, path / "optimizer.pt")
    out = average(paths, WEIGHTS, tmp_path / "out")
    assert_average(out, WEIGHTS)
    assert not (out / "ema.safetensors").exists()


def test_layouts_and_dtypes_may_be_mixed_and_the_newest_decides(tmp_path: Path) -> None:
    wide = {name: t.double() if t.dtype == torch.float32 else t for name, t in STATES[1].items()}
    first = save_dcp(tmp_path / "a", STATES[0])
    paths = [first, save_torch(tmp_path / "b", wide), save_safetensors(tmp_path / "c", STATES[2])]
    out = average(paths, [0.5, 0.25, 0.25], tmp_path / "out.safetensors")
    assert_average(out, [0.5, 0.25, 0.25], [STATES[0], wide, STATES[2]])


@pytest.mark.parametrize("together", [2, 16])
def test_many_checkpoints_take_turns_in_the_same_buffers(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastema.checkpoint import source, sums

    monkeypatch.setattr(sums, "_TOGETHER", together)
    monkeypatch.setattr(source, "_MOST_OPEN", together)
    states = [state(seed) for seed in range(20)]
    paths = [save_safetensors(tmp_path / f"{i}", one) for i, one in enumerate(states)]
    coefficients = np.random.default_rng(0).dirichlet(np.ones(20)).tolist()
    assert_average(average(paths, coefficients, tmp_path / "o.safetensors"), coefficients, states)


def test_several_averages_are_made_in_one_pass(tmp_path: Path) -> None:
    paths = [save_folder(tmp_path / f"{i}", one) for i, one in enumerate(STATES)]
    outputs = {tmp_path / "one": WEIGHTS, tmp_path / "other": [0.2] * 5}
    read: list[int] = []
    made = merge.prepare([open_checkpoint(path) for path in paths])
    merge.merge(made, outputs, read.append)
    for out, coefficients in outputs.items():
        assert_average(out, coefficients)
    assert sum(read) == made.nbytes


def test_parts_of_rows_in_a_distributed_folder_are_put_in_order(tmp_path: Path) -> None:
    """Blocks divided along the second axis, as tensor parallel writes them."""
    from fastema.checkpoint import dcp
    from fastema.checkpoint.files import StoredTensor
    from fastema.layout.dtypes import dtype

    whole = np.arange(6 * 10, dtype=np.float32).reshape(6, 10)
    chunks = []
    for i, (rows, columns) in enumerate([((0, 4), (0, 3)), ((4, 6), (0, 3)), ((0, 6), (3, 10))]):
        torch.save(
            torch.tensor(whole[slice(*rows), slice(*columns)].copy()), tmp_path / f"{i}.distcp"
        )
        size = (tmp_path / f"{i}.distcp").stat().st_size
        shape = rows[1] - rows[0], columns[1] - columns[0]
        chunks.append(dcp._Chunk((rows[0], columns[0]), shape, tmp_path / f"{i}.distcp", 0, size))
    stored = dcp.Chunked(StoredTensor(dtype("f32"), (6, 10)), chunks)
    found = dcp.stretches_of("w", stored)
    for first, count in ((0, 240), (8, 100), (36, 4), (200, 40)):
        got = bytearray(count)
        for path, offset, at, size in found.within(first, count):
            got[at : at + size] = path.read_bytes()[offset : offset + size]
        assert bytes(got) == whole.tobytes()[first : first + count]


def test_tied_names_are_averaged_once_and_named_in_the_metadata(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        one = torch.full((3,), float(i))
        torch.save({"emb": one, "head": one, "rest": torch.ones(2)}, path := tmp_path / f"{i}.pt")
        paths.append(path)
    out = average(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    assert {name: t.tolist() for name, t in load_file(out).items()} == {
        "emb": [0.5] * 3,
        "rest": [1.0] * 2,
    }
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["head"] == "emb"  # as safetensors.torch.load_model reads it
        assert opened.metadata()["fastema.average"] == "0.5 * 0.pt; 0.5 * 1.pt"


# -- what is refused -------------------------------------------------------------------------------


def two(tmp_path: Path, *changes: dict[str, Any]) -> list[Path]:
    made = []
    for i, change in enumerate(changes):
        one = {name: t for name, t in {**STATES[i], **change}.items() if t is not None}
        made.append(save_safetensors(tmp_path / f"{i}", one))
    return made


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


@pytest.mark.parametrize("name", ["../0.safetensors", "/etc/passwd", "a/b", "..", "", "a\0b"])
def test_an_index_names_files_beside_it_alone(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(STATES[0], tmp_path / "0.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"half": name}}))
    with pytest.raises(CheckpointError, match="is no file beside it"):
        open_checkpoint(folder)


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


# -- which, and with what weights ------------------------------------------------------------------


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
        (
            weights.wsm(5, "1-sqrt"),
            [0.2**0.5, 0.4**0.5 - 0.2**0.5, 0.6**0.5 - 0.4**0.5, 0.8**0.5 - 0.6**0.5, 1 - 0.8**0.5],
        ),
        (
            weights.ema(STEPS, 0.99),
            [
                0.99**800,
                0.99**700 - 0.99**800,
                0.99**450 - 0.99**700,
                0.99**400 - 0.99**450,
                1 - 0.99**400,
            ],
        ),
    ],
    ids=["swa", "sma", "wma", "linear", "1-sqrt", "ema"],
)
def test_weights_of_five_unevenly_spaced_checkpoints(found: list[float], want: list[float]) -> None:
    np.testing.assert_allclose(found, want, rtol=1e-12)
    assert sum(found) == pytest.approx(1.0)


def test_an_exponential_average_of_checkpoints_is_that_of_their_steps() -> None:
    """As an EMA that sees each checkpoint at every step since the one before."""
    value, last = 0.0, STEPS[0]
    for i, step in enumerate(STEPS):
        for _ in range(step - last):
            value = 0.99 * value + 0.01 * (10.0 + i)
        value = 10.0 if not i else value
        last = step
    found = weights.ema(STEPS, 0.99)
    assert sum(w * (10.0 + i) for i, w in enumerate(found)) == pytest.approx(value, rel=1e-12)


def test_weights_that_cannot_be(tmp_path: Path) -> None:
    for call, words in (
        (lambda: weights.sma(3, 4), "sma=4: there are 3"),
        (lambda: weights.ema([1, 1], 0.9), "rising steps"),
        (lambda: weights.ema([1, 2], 1.0), r"ema=1\.0: expected a decay"),
        (lambda: weights.wsm(3, "cubic"), "expected one of linear, cosine, 1-sqrt"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()


# -- what does not end well ------------------------------------------------------------------------

SLOWLY = """
import sys, time
from fastema.checkpoint import average, sums
print("ready", flush=True)
average(sys.argv[1:4], [0.5, 0.25, 0.25], sys.argv[4])
print("done", flush=True)
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
        arguments = [sys.executable, "-c", SLOWLY, *map(str, paths), str(out)]
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += not out.exists()
        if out.exists():
            assert_average(out, [0.5, 0.25, 0.25], big)
    assert killed


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    require(hasattr(resource, "RLIMIT_FSIZE"), "a limit of file sizes")
    paths = two(tmp_path, {}, {})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            average(paths, [0.5, 0.5], tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
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
