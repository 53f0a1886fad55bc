"""Checkpoints of every layout, and what their averages must be."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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


def _in_two_files(path: Path, one: State, file: str, index: str, save: Any) -> Path:
    path.mkdir()
    names = list(one)
    where: dict[str, str] = {}
    for number, some in enumerate((names[: len(one) // 2], names[len(one) // 2 :]), 1):
        save({name: one[name] for name in some}, path / file.format(number))
        where |= dict.fromkeys(some, file.format(number))
    (path / index).write_text(json.dumps({"weight_map": where}))
    return path


def save_sharded(path: Path, one: State) -> Path:
    file, index = "model-0000{}-of-00002.safetensors", "model.safetensors.index.json"
    _in_two_files(path, one, file, index, save_file)
    (path / "config.json").write_text("{}")
    (path / "optimizer.pt").write_bytes(b"")
    return path


def save_sharded_torch(path: Path, one: State) -> Path:
    file, index = "pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"
    return _in_two_files(path, one, file, index, torch.save)


def save_folder(path: Path, one: State) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("[]")
    save_file(one, path / "model.safetensors")
    return path


def save_dcp(path: Path, one: State, flat: bool = False) -> Path:
    from torch.distributed import checkpoint

    content = one if flat else {"model": one, "step": torch.tensor(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(content, checkpoint_id=str(path))
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


def assert_average(out: Path, coefficients: list[float], states: list[State] = STATES) -> None:
    """Assert that a result is the sum in float64, rounded once; the rest is the newest's."""
    got: State = {}
    for file in out.glob("*.safetensors") if out.is_dir() else [out]:
        got |= load_file(file)
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


def two(tmp_path: Path, *changes: dict[str, Any]) -> list[Path]:
    made = []
    for i, change in enumerate(changes):
        one = {name: t for name, t in {**STATES[i], **change}.items() if t is not None}
        made.append(save_safetensors(tmp_path / f"{i}", one))
    return made
