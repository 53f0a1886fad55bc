"""Files that were tampered with: ``python -m tests.checkpoint.fuzz 600 1``.

Whatever is done to a checkpoint, reading it ends soon, takes little memory, raises nothing but a
FastemaError of a line that names it, and writes nothing.
"""

import io
import json
import os
import pickle
import random
import resource
import struct
import sys
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

from ..support.damage import damaged_header, header_of, with_header

SLOWEST = 5.0  # seconds that a reading may take


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Good checkpoints: name to the files of each."""
    tensors = {
        "a.weight": torch.ones(3, 4),
        "a.bias": torch.ones(4, dtype=torch.bfloat16),
        "steps": torch.tensor(3),
        "empty": torch.ones(0, 2),
    }
    model = torch.nn.Linear(3, 2)
    ema = fastema.EMA(model, decay=(0.9, 0.99))
    save(ema, folder / "ema.safetensors")
    torch.distributed.checkpoint.save({"model": tensors}, checkpoint_id=folder / "dcp")
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    of_torch = {
        "torch": {"state_dict": tensors, "epoch": 3},
        "ours in torch": {"ema": ema.state_dict(), "list": [1, 2.0, None]},
        "swa": torch.optim.swa_utils.AveragedModel(model).state_dict(),
        "list": {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(3)]},
    }
    for name, content in of_torch.items():
        torch.save(content, folder / name)
    return {
        "plain": {"x.safetensors": safetensors_bytes(tensors, {"global_step": "4"})},
        "ours": {"x.safetensors": (folder / "ema.safetensors").read_bytes()},
        **{name: {"x.pt": (folder / name).read_bytes()} for name in of_torch},
        "folder": {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "1.safetensors": safetensors_bytes({"a": torch.ones(2)}),
            "2.safetensors": safetensors_bytes({"b": torch.ones(3)}),
            "config.json": b'{"optimization_step": 3, "update_after_step": 0, "decay": 0.9}',
        },
        "dcp": {one.name: one.read_bytes() for one in (folder / "dcp").iterdir()},
    }


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64)) if data else 0):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def overwrite(data: bytes, chance: random.Random) -> bytes:
    """Write other bytes, a copy of some, or a large or odd number, over some of it or between."""
    size = chance.choice((1, 2, 4, 8, 40))
    at, other = (chance.randrange(max(len(data) - size, 1)) for _ in range(2))
    value = chance.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, len(data)))
    number = struct.pack("<Q", value)[: chance.choice((4, 8))]
    random_ = chance.randbytes(chance.choice((1, 4, 300)))
    new = chance.choice((data[other : other + size], number, random_))
    return data[:at] + new + data[at + chance.choice((0, len(new))) :]


def header(data: bytes, chance: random.Random) -> bytes:
    """Put junk into the JSON of a safetensors header, or of an index."""
    seed = chance.randrange(2**32)
    if data[:1] == b"{":
        return damaged_header(json.loads(data), seed)
    if len(data) < 10 or data[8:9] != b"{":
        return flip(data, chance)
    return with_header(data, damaged_header(header_of(data), seed))


def described(data: bytes, chance: random.Random) -> bytes:
    """Change the pickle within a file of ``torch.save``; all else stays good."""
    if data[:2] != b"PK":
        return overwrite(data, chance)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = chance.choice((flip, overwrite, overwrite, cut, grown))(content, chance)
            new.writestr(entry.filename, content)
    return out.getvalue()


def grown(data: bytes, chance: random.Random) -> bytes:
    """A pickle of something else: deep, long, or with names of code."""
    deep: Any = {}
    for _ in range(chance.choice((10, 200))):
        deep = {"a": deep}
    content = ({"ema": [deep], "updates": 10**30}, deep, {str(i): i for i in range(100_000)})
    return chance.choice(
        (
            pickle.dumps(chance.choice(content)),
            b"cos\nsystem\n(S'touch pwned'\ntR.",
            b"\x80\x02" + b"(" * 100_000 + b".",
            b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".",
        )
    )


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    *(flip, cut, overwrite, overwrite, overwrite, header, header, described, described)
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


def read(path: Path, out: Path) -> bool:
    """Read it in every way; whether each of them was possible."""
    good = True
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
            good, said = False, str(error)
            assert len(said) < 20_000, len(said)
        spent = time.monotonic() - began
        assert spent < SLOWEST, f"it took {spent} s"
    return good


def main(seconds: float, seed: int) -> None:
    deadline = time.monotonic() + seconds
    first = trial = refused = 0
    with tempfile.TemporaryDirectory() as inside:
        good = samples(Path(inside))
        while time.monotonic() < deadline:
            trial += 1
            chance = random.Random(f"{seed} {trial}")
            name = chance.choice(list(good))
            with tempfile.TemporaryDirectory() as one:
                folder = Path(one) / "in"
                folder.mkdir()
                path = place(folder, good[name], chance)
                before = sorted(folder.iterdir())
                out = Path(one) / ("out" if path.is_dir() else "out.safetensors")
                try:
                    refused += not read(path, out)
                    assert sorted(folder.iterdir()) == before, "something was written"
                    left = {entry.name for entry in Path(one).iterdir()}
                    assert left <= {"in", out.name}, left
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    first = peak if trial == 200 else first
                    assert not first or peak < first + (600 << 10), f"{peak} KB"
                except BaseException:
                    traceback.print_exc()
                    raise SystemExit(f"{name}, seed {seed}, trial {trial}") from None
    print(f"{trial} trials, {refused} refused, seed {seed}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
