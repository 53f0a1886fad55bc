"""Files that were tampered with: ``python -m tests.checkpoint.fuzz 600 --seed 1``.

Whatever is done to a checkpoint, reading it ends soon, takes little memory, raises nothing but a
FastemaError of a line that names it, and writes nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import resource
import struct
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from safetensors.torch import save as safetensors_bytes

import fastema
from fastema.checkpoint import average, inspect, open_checkpoint, save
from fastema.errors import FastemaError

from ..support.damage import JUNK

SLOWEST = 5.0
"""Seconds that a reading may take."""


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.ones(3, 4),
        "a.bias": torch.ones(4, dtype=torch.bfloat16),
        "steps": torch.tensor(3),
        "empty": torch.ones(0, 2),
    }


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Good checkpoints: name to the files of each."""
    model = torch.nn.Linear(3, 2)
    ema = fastema.EMA(model, decay=(0.9, 0.99))
    save(ema, folder / "ema.safetensors")
    ours = (folder / "ema.safetensors").read_bytes()
    average = torch.optim.swa_utils.AveragedModel(model)
    shard = safetensors_bytes({"a": torch.ones(2)})
    other = safetensors_bytes({"b": torch.ones(3)})
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    torch.distributed.checkpoint.save({"model": tensors()}, checkpoint_id=folder / "dcp")
    return {
        "plain": {"x.safetensors": safetensors_bytes(tensors(), {"global_step": "4"})},
        "ours": {"x.safetensors": ours},
        "torch": {"x.pt": saved({"state_dict": tensors(), "epoch": 3})},
        "ours in torch": {"x.pt": saved({"ema": ema.state_dict(), "list": [1, 2.0, None]})},
        "swa": {"x.pt": saved(average.state_dict())},
        "list": {"x.pt": saved({"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(3)]})},
        "folder": {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "1.safetensors": shard,
            "2.safetensors": other,
            "config.json": b'{"optimization_step": 3, "update_after_step": 0, "decay": 0.9}',
        },
        "dcp": {one.name: one.read_bytes() for one in (folder / "dcp").iterdir()},
    }


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# -- damage ----------------------------------------------------------------------------------------


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64))):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice((1, 4, 300))) + data[at:]


def move(data: bytes, chance: random.Random) -> bytes:
    """Copy some of it to another place."""
    size = chance.choice((1, 2, 4, 8, 40))
    one, other = (chance.randrange(max(len(data) - size, 1)) for _ in range(2))
    return data[:one] + data[other : other + size] + data[one + size :]


def number(data: bytes, chance: random.Random) -> bytes:
    """Write a large or odd number over four or eight bytes."""
    at = chance.randrange(max(len(data) - 8, 1))
    value = chance.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data)))
    code = struct.pack("<Q", value)[: chance.choice((4, 8))]
    return data[:at] + code + data[at + len(code) :]


def header(data: bytes, chance: random.Random) -> bytes:
    """Put junk into the JSON of a safetensors header, or of an index."""
    if data[:1] == b"{":
        return json.dumps(replaced(json.loads(data), chance)).encode()
    if len(data) < 10 or data[8:9] != b"{":
        return flip(data, chance)
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(replaced(json.loads(data[8 : 8 + length]), chance)).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def described(data: bytes, chance: random.Random) -> bytes:
    """Change the pickle within a file of ``torch.save``; all else stays good."""
    if data[:2] != b"PK":
        return move(data, chance)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = chance.choice((flip, number, move, cut, grown))(content, chance)
            new.writestr(entry.filename, content)
    return out.getvalue()


def grown(data: bytes, chance: random.Random) -> bytes:
    """A pickle of something else: deep, long, or with names of code."""
    deep: Any = {}
    for _ in range(chance.choice((10, 200))):
        deep = {"a": deep}
    wide = {str(i): i for i in range(chance.choice((10, 100_000)))}
    return chance.choice(
        (
            pickle.dumps(deep),
            pickle.dumps(wide),
            pickle.dumps({"ema": [deep], "updates": 10**30}),
            b"cos\nsystem\n(S'touch pwned'\ntR.",
            b"\x80\x02" + b"(" * 100_000 + b".",
            b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
        )
    )


def replaced(found: Any, chance: random.Random) -> Any:
    """The same with junk in one place."""
    if isinstance(found, dict) and found and chance.random() < 0.9:
        key = chance.choice(list(found))
        new = dict(found)
        if chance.random() < 0.1:
            new[chance.choice(("\0", "a\nb", "../x", "__metadata__", "x" * 9999))] = new.pop(key)
        else:
            new[key] = replaced(found[key], chance)
        return new
    if isinstance(found, list) and found and chance.random() < 0.9:
        at = chance.randrange(len(found))
        return [*found[:at], replaced(found[at], chance), *found[at + 1 :]]
    return chance.choice(JUNK)()


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    *(flip, cut, insert, move, number, header, header, described, described),
]


def place(folder: Path, files: dict[str, bytes], chance: random.Random) -> Path:
    """Write a checkpoint with one of its files damaged, or of another kind."""
    victim = chance.choice(list(files))
    for name, data in files.items():
        path = folder / name
        odd = chance.random() if name == victim else 1.0
        if odd < 0.01:
            os.mkfifo(path)
        elif odd < 0.02:
            path.symlink_to(chance.choice((path.name, "/dev/zero", "/proc/self/mem", "nowhere")))
        elif odd < 0.03:
            path.mkdir()
        else:
            path.write_bytes(chance.choice(DAMAGES)(data, chance) if name == victim else data)
    return folder if len(files) > 1 else path


def read(path: Path, out: Path) -> str:
    """Read it in every way; what became of it."""
    became = "good"
    for call in (
        lambda: open_checkpoint(path),
        lambda: inspect(path),
        lambda: inspect(path, check=True),
        lambda: average([path, path], [0.5, 0.5], out),
    ):
        began = time.monotonic()
        try:
            call()
        except FastemaError as error:
            became = "refused"
            text = str(error)
            assert len(text) < 20_000, len(text)
        spent = time.monotonic() - began
        assert spent < SLOWEST, f"it took {spent} s"
    return became


def run(seconds: float, seed: int) -> str:
    counts = {"good": 0, "refused": 0}
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as inside:
        (Path(inside) / "good").mkdir()
        good = samples(Path(inside) / "good")
        first = 0
        trial = 0
        while time.monotonic() < deadline:
            trial += 1
            chance = random.Random(f"{seed} {trial}")
            name = chance.choice(list(good))
            with tempfile.TemporaryDirectory(dir=inside) as one:
                folder = Path(one) / "in"
                folder.mkdir()
                path = place(folder, good[name], chance)
                before = sorted(folder.iterdir())
                out = Path(one) / ("out" if path.is_dir() else "out.safetensors")
                try:
                    counts[read(path, out)] += 1
                    assert sorted(folder.iterdir()) == before, "something was written"
                    left = {entry.name for entry in Path(one).iterdir()}
                    assert left <= {"in", out.name}, left
                except BaseException:
                    traceback.print_exc()
                    raise SystemExit(f"{name}, seed {seed}, trial {trial}") from None
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if trial == 200:
                first = peak
            assert not first or peak < first + (600 << 10), f"seed {seed}, trial {trial}: {peak} KB"
    return f"{sum(counts.values())} trials, {counts['refused']} refused, seed {seed}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(run(given.seconds, given.seed))
