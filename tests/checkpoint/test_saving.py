"""Saving and loading averages."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema import rules
from fastema.checkpoint import files, load_into, save, saving, wait
from fastema.checkpoint.state import read_state, write_state
from fastema.errors import CheckpointError, StorageError

from ..support.damage import damaged_header, header_of, with_header

NEEDS = ("safetensors", "torch")

AVERAGES: dict[str, Callable[[Any], Any]] = {
    "EMA": lambda w: fastema.EMA(w, (0.9, 0.99), shadow_dtype="bfloat16", seed=3),
    "split": lambda w: fastema.EMA(w, 0.9, shadow_dtype="bf16+16"),
    "SWA": fastema.SWA,
    "SMA": lambda w: fastema.SMA(w, 3),
    "PowerEMA": lambda w: fastema.PowerEMA(w, (0.05, 0.1)),
}


def weights(kind: str) -> list[Any]:
    generator = np.random.default_rng(2)
    shapes = ((5, 7), (), (0, 3))
    arrays = [np.asarray(generator.standard_normal(s), np.float32) for s in shapes]
    return arrays if kind == "numpy" else [torch.from_numpy(one) for one in arrays]


def move(tensors: list[Any]) -> None:
    for tensor in tensors:
        tensor *= 0.9
        tensor += 0.1


def plain(x: Any) -> np.ndarray:
    """A copy in float32, which bfloat16 fits."""
    return x.float().numpy().copy() if isinstance(x, torch.Tensor) else x.astype(np.float32)


def shadows(average: Any) -> list[dict[str, np.ndarray]]:
    return [{name: plain(x) for name, x in one.items()} for one in average.shadows]


def assert_equal(one: Any, other: Any) -> None:
    for got, want in zip(shadows(one), other, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("waits", [True, False])
def test_a_loaded_average_goes_on_to_the_bit(
    name: str, kind: str, waits: bool, tmp_path: Path
) -> None:
    if kind == "numpy" and name in ("EMA", "split"):
        pytest.importorskip("ml_dtypes")
    model = weights(kind)
    average = AVERAGES[name](model)
    for _ in range(5):
        move(model)
        average.update()
    path = tmp_path / "ema.safetensors"
    save(average, path, wait=waits)
    then = shadows(average)
    resumed, model_then = AVERAGES[name](model), copy.deepcopy(model)
    move(model)
    average.update()  # perhaps before the file is written
    want = shadows(average)
    load_into(resumed, path)
    assert_equal(resumed, then)
    for w, old in zip(model, model_then, strict=True):
        w[...] = old
    move(model)
    resumed.update()
    assert resumed.num_updates == average.num_updates == 6
    assert_equal(resumed, want)


def test_an_error_of_a_later_write_is_raised_by_the_next_call(tmp_path: Path) -> None:
    average = fastema.EMA(weights("torch"))
    path = tmp_path / "gone" / "ema.safetensors"
    save(average, path, wait=False)
    with pytest.raises(StorageError, match="cannot write"):
        wait()
    wait()
    save(average, path, wait=False)
    with pytest.raises(StorageError, match="cannot write"):
        load_into(average, path)


def test_an_error_at_the_end_of_the_process_is_printed(
    python: Callable[..., str], tmp_path: Path
) -> None:
    said = python(
        """
        import contextlib, io, sys, numpy as np, fastema
        from fastema.checkpoint import save
        sys.stderr = sys.stdout
        save(fastema.EMA([np.ones(3)]), sys.argv[1], wait=False)
        """,
        str(tmp_path / "gone" / "ema.safetensors"),
    )
    assert "fastema.checkpoint.save: cannot write" in said


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model = weights("torch")
    average, path = fastema.EMA(model, 0.5), tmp_path / "ema.safetensors"
    save(average, path)
    other = fastema.EMA([torch.ones(2)], 0.5)
    with pytest.raises((CheckpointError, ValueError), match="0"):
        load_into(other, path)
    assert other.shadow["0"].tolist() == [1.0, 1.0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = shadows(average)
    with pytest.raises(CheckpointError, match="damaged"):
        load_into(average, path)
    np.testing.assert_array_equal(shadows(average)[0]["0"], before[0]["0"])
    files.write(path, {})
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_into(average, path)


def test_a_child_process_has_nothing_to_wait_for() -> None:
    writer = saving._Writer()
    writer.submit(Path("/nowhere/ema.safetensors"), {})
    writer._forget()
    writer.raise_failed(all_of_them=True)


def average(seed: int, **options: Any) -> fastema.EMA:
    generator = np.random.default_rng(seed)
    weights = {"w": generator.normal(size=5), "b": generator.normal(size=3).astype(np.float32)}
    return fastema.EMA(weights, (rules.warmup(0.99), 0.5), **options)


@pytest.mark.parametrize("seed", range(150))
def test_a_damaged_state_is_our_error_whatever_is_wrong(seed: int, tmp_path: Path) -> None:
    ema = average(1, zero_debias=True)
    ema.update(steps=3)
    path = tmp_path / "a.safetensors"
    write_state(path, ema.state_dict())
    whole = path.read_bytes()
    header = header_of(whole)
    if seed % 2:  # damage within the plain values
        text = header["__metadata__"]["state"]
        inner = damaged_header(json.loads(text), seed)
        header["__metadata__"]["state"] = inner.decode(errors="surrogateescape")
        damaged = json.dumps(header).encode()
    else:
        damaged = damaged_header(header, seed)
    path.write_bytes(with_header(whole, damaged))
    other = average(2, zero_debias=True)
    before = [dict(one) for one in other.state_dict()["shadow"]]
    try:
        other.load_state_dict(read_state(files.read(path), np.zeros(1)))
    except CheckpointError:
        assert other.num_updates == 0
        for one, was in zip(other.shadows, before, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], was[name])
    else:
        other.update()
