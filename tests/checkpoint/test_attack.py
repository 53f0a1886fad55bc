"""What an attack on checkpoints found: each of these was wrong once."""

from __future__ import annotations

import json
import os
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import fastema
from fastema.checkpoint import average, convert, inspect, load_into, open_checkpoint, save, wait
from fastema.errors import CheckpointError, StorageError

NEEDS = ("safetensors", "torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_flat_names_of_a_folder_that_begin_like_a_mapping_stay() -> None:
    tensors = {"model.embed.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}
    dcp.save(dict(tensors), checkpoint_id="flat", no_dist=True)
    average(["flat"], [1.0], "out")
    assert load_file("out/model.safetensors").keys() == tensors.keys()


def shards(folder: str, value: float, ending: str = ".sft", index: str = "model") -> None:
    os.mkdir(folder)
    for name in "ab":
        save_file({name: torch.full((2,), value)}, f"{folder}/{name}{ending}")
    names = {name: name + ending for name in "ab"}
    path = Path(folder, f"{index}.safetensors.index.json")
    path.write_text(json.dumps({"weight_map": names}))


def test_shards_of_any_ending_are_not_copied_over_the_average() -> None:
    for value in (1.0, 2.0):
        shards(f"s-{value:g}", value)
    average(["s-1", "s-2"], [0.5, 0.5], "out")
    assert load_file("out/a.sft")["a"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize("how", [torch.conj, lambda x: torch.conj(x).imag])
def test_a_tensor_that_torch_changes_when_it_is_read_is_refused(how: Any) -> None:
    torch.save({"w": how(torch.tensor([1 + 2j]))}, "c.pt")
    with pytest.raises(CheckpointError, match="is to be changed"):
        average(["c.pt"], [1.0], "c.safetensors")


def test_a_later_save_is_not_overtaken_by_an_earlier_one() -> None:
    ema = fastema.EMA([np.zeros(3_000_000, np.float32)], decay=0.5)
    ema.update()
    for path in ("x", "x", "out"):
        save(ema, path, wait=False)
    ema.update()
    save(ema, "out")
    wait()
    assert inspect("out").average.num_updates == 2


def test_a_file_that_is_replaced_while_it_is_read_is_read_again() -> None:
    ema = fastema.EMA([np.zeros(1000, np.float32)], decay=0.5)
    mine = fastema.EMA([np.zeros(1000, np.float32)], decay=0.5)
    save(ema, "ema")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            ema.update()
            save(ema, "ema")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(100):
            load_into(mine, "ema")
    finally:
        stop.set()
        thread.join()


def test_every_failed_write_is_told() -> None:
    ema = fastema.EMA([np.ones(3)], decay=0.5)
    for name in ("a", "b"):
        save(ema, f"gone/{name}", wait=False)
    said = []
    for _ in range(2):
        with pytest.raises(StorageError) as raised:
            wait()
        said.append(str(raised.value))
    assert "gone/a" in said[0]
    assert "gone/b" in said[1]
    wait()


def test_other_ties_are_refused() -> None:
    w, v = torch.ones(2), torch.zeros(2)
    torch.save({"a": w, "b": v, "c": w}, "u1.pt")
    torch.save({"a": w, "b": v, "c": v}, "u2.pt")
    with pytest.raises(CheckpointError, match="other names are tied in u1"):
        average(["u1.pt", "u2.pt"], [0.5, 0.5], "u.safetensors")


def test_one_name_for_two_tensors_is_refused() -> None:
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, "k.pt")
    with pytest.raises(CheckpointError, match=r"two tensors are called 'a\.b'"):
        open_checkpoint("k.pt")


def archive(described: bytes) -> None:
    with zipfile.ZipFile("x.pt", "w") as file:
        file.writestr("x/data.pkl", described)


def doubled(kind: bytes) -> bytes:
    """A pickle that holds the same twice, forty times within itself."""
    data = b"\x80\x02" + kind
    for i in range(40):
        put = b"q" + bytes([i])
        data += put + b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e"
    return b"\x80\x02}X\x01\x00\x00\x00a" + data[2:] + b"s."


PICKLES: dict[str, Callable[[], bytes]] = {
    "lists that hold one twice": lambda: doubled(b"]"),
    "deep tuples": lambda: b"\x80\x02}N" + b"\x85" * 300_000 + b"K\x01s.",
    "tuples that hold one twice": lambda: (
        b"\x80\x02})q\x00"
        + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
        + b"K\x01s."
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_small_pickles_take_no_time(name: str) -> None:
    archive(PICKLES[name]())
    began = time.monotonic()
    with pytest.raises(CheckpointError):
        inspect("x.pt")
    assert time.monotonic() - began < 30


def test_a_pickle_changes_none_of_our_functions() -> None:
    archive(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b.")
    with pytest.raises(CheckpointError):
        open_checkpoint("x.pt")
    torch.save({"w": torch.ones(2)}, "good.pt")
    assert list(open_checkpoint("good.pt").tensors) == ["w"]


def test_a_changed_header_is_noticed() -> None:
    ema = fastema.EMA([np.ones(3)], decay=0.999)
    save(ema, "ema.safetensors")
    data = Path("ema.safetensors").read_bytes()
    Path("ema.safetensors").write_bytes(data.replace(b"0.999", b"0.199", 1))
    for call in (
        lambda: inspect("ema.safetensors", check=True),
        lambda: load_into(ema, "ema.safetensors"),
    ):
        with pytest.raises(CheckpointError, match="is damaged"):
            call()


def header(tensors: str, size: int) -> None:
    data = tensors.encode()
    Path("x.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(size))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
         '"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "overlap"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         '"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "there twice"),
    ],
)  # fmt: skip
def test_a_header_that_others_refuse_is_refused(tensors: str, said: str) -> None:
    header(tensors, 8)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint("x.safetensors")


ODD: dict[str, Any] = {
    "an infinite count": {"decay": torch.tensor(0.5), "num_updates": torch.tensor(float("inf")),
                          "w": torch.ones(1)},
    "a huge decay": {"decay": 10**400, "num_updates": 1, "shadow_params": [torch.ones(1)]},
    "a number for averages": {"format": "fastema", "shadow": 3,
                              "schedule": {"rules": [], "update_every": 1, "start_after": 0}},
    "a number for a time": {"state": {"timestamp": {"Timestamp": 3}, "algorithms": [
        ("EMA", {"ema_model": {"w": torch.ones(1)}})]}},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_states_are_a_line(name: str) -> None:
    torch.save(ODD[name], "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt"):
        inspect("odd.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_not_replaced() -> None:
    os.mkfifo("pipe")
    with pytest.raises(StorageError, match="is no file"):
        save(fastema.EMA([np.ones(3)]), "pipe")


def test_a_locked_folder_is_written_to() -> None:
    locks = pytest.importorskip("fcntl")
    os.mkdir("locked")
    handle = os.open("locked", os.O_RDONLY)
    locks.flock(handle, locks.LOCK_EX)
    thread = threading.Thread(
        target=lambda: save(fastema.EMA([np.ones(3)]), "locked/ema"), daemon=True
    )
    thread.start()
    thread.join(20)
    os.close(handle)
    assert Path("locked/ema").exists()


def test_a_folder_without_its_files_is_not_whole() -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id="gone", no_dist=True)
    next(Path("gone").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="is not whole"):
        inspect("gone")


def test_rounding_is_carried_and_the_model_is_no_output() -> None:
    model = nn.Linear(2, 2)
    torch.save(model.state_dict(), "model.pt")
    ema = fastema.EMA(model, decay=0.5, shadow_dtype="bfloat16", rounding="nearest")
    save(ema, "ema.safetensors")
    convert("ema.safetensors", "again.safetensors", to="fastema")
    assert inspect("again.safetensors").average.options["rounding"] == "nearest"
    with pytest.raises(CheckpointError, match="names are taken from"):
        convert("ema.safetensors", "model.pt", to="torch_ema", names="model.pt")
