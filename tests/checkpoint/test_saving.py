"""Saving and loading of averages."""

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
from fastema.checkpoint import files, inspect, load_into, save, saving, wait
from fastema.checkpoint.state import read_state, write_tensors
from fastema.errors import CheckpointError, StorageError

from ..support.damage import damage_header, header_of, replace_header
from ..support.states import nested

NEEDS = ("safetensors", "torch")

pytestmark = pytest.mark.usefixtures("inside")

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
    """Copy an array to float32, which holds bfloat16 exactly."""
    return x.float().numpy().copy() if isinstance(x, torch.Tensor) else x.astype(np.float32)


def shadows(average: Any) -> list[dict[str, np.ndarray]]:
    return [{name: plain(x) for name, x in one.items()} for one in average.shadows]


def zeros(size: int = 3) -> fastema.EMA:
    return fastema.EMA([np.zeros(size, np.float32)], decay=0.999)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("waits", [True, False])
def test_loaded_average_continues_bitwise(name: str, kind: str, waits: bool) -> None:
    if kind == "numpy" and name in ("EMA", "split"):
        pytest.importorskip("ml_dtypes")
    model = weights(kind)
    average = AVERAGES[name](model)
    for _ in range(5):
        move(model)
        average.update()
    save(average, "ema.safetensors", wait=waits)
    then = shadows(average)
    resumed, model_then = AVERAGES[name](model), copy.deepcopy(model)
    move(model)
    average.update()  # the file may not be written yet
    load_into(resumed, "ema.safetensors")
    np.testing.assert_equal(shadows(resumed), then)
    for w, old in zip(model, model_then, strict=True):
        w[...] = old
    move(model)
    resumed.update()
    assert resumed.num_updates == average.num_updates == 6
    np.testing.assert_equal(shadows(resumed), shadows(average))


def test_each_failed_write_is_raised_by_a_later_call() -> None:
    small = zeros()
    save(zeros(3_000_000), "large", wait=False)  # the other saves wait for it
    for name in ("a", "b"):
        save(small, f"gone/{name}", wait=False)
    for name in ("a", "b"):
        with pytest.raises(StorageError, match=f"cannot write gone/{name}"):
            wait()
    wait()
    save(small, "gone/c", wait=False)
    with pytest.raises(StorageError, match="cannot write"):
        load_into(small, "gone/c")


def test_earlier_save_does_not_overwrite_a_later_one() -> None:
    ema = zeros(3_000_000)
    ema.update()
    for path in ("x", "x", "out"):
        save(ema, path, wait=False)
    ema.update()
    save(ema, "out")
    wait()
    assert inspect("out").average.num_updates == 2


def test_mismatched_or_damaged_file_changes_nothing(inside: Path) -> None:
    path = inside / "ema.safetensors"
    ema = fastema.EMA([np.full(3, 7.25, np.float32)], decay=0.999)
    save(ema, path)
    other = fastema.EMA([torch.ones(2)], 0.5)
    with pytest.raises((CheckpointError, ValueError), match="0"):
        load_into(other, path)
    assert other.shadow["0"].tolist() == [1.0, 1.0]
    whole = path.read_bytes()
    number = np.float32(7.25).tobytes()
    # Damage in a tensor, at the end of the file, and in the header.
    for old, new in ((number, bytes(4)), (whole[-9:], b"\1" * 9), (b"0.999", b"0.199")):
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        for call in (lambda: inspect(path, check=True), lambda: load_into(ema, path)):
            with pytest.raises(CheckpointError, match=r"is damaged|is not JSON"):
                call()
    files.write(path, {})
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_into(ema, path)
    assert ema.shadow["0"].tolist() == [7.25] * 3


def test_child_process_forgets_its_parents_writes() -> None:
    writer = saving._BackgroundWriter()
    writer.submit(Path("/nowhere/ema.safetensors"), {})
    writer._forget()
    writer.raise_failed(all_of_them=True)


def average(seed: int) -> fastema.EMA:
    generator = np.random.default_rng(seed)
    weights = {"w": generator.normal(size=5), "b": generator.normal(size=3).astype(np.float32)}
    return fastema.EMA(weights, (rules.warmup(0.99), 0.5), zero_debias=True)


@pytest.mark.parametrize("seed", range(150))
def test_damaged_state_raises_checkpoint_error_and_changes_nothing(seed: int, inside: Path) -> None:
    ema = average(1)
    ema.update(steps=3)
    path = inside / "a.safetensors"
    write_tensors(path, ema.state_dict())
    whole = path.read_bytes()
    header = header_of(whole)
    if seed % 2:  # damage the non-tensor values
        state = ema.state_dict()
        inner = damage_header(json.loads(state["fastema"].tobytes()), seed)
        write_tensors(path, {**state, "fastema": np.frombuffer(inner, np.uint8)})
    else:
        path.write_bytes(replace_header(whole, damage_header(header, seed)))
    other = average(2)
    before = nested(other.state_dict())["shadow"]
    try:
        found = files.read(path)
        assert all(type(value) is str for value in found.metadata.values())
        for tensor in found.tensors.values():
            assert np.empty(tensor.shape, np.uint8).size == tensor.size
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= path.stat().st_size
        other.load_state_dict(read_state(found, np.zeros(1)))
    except CheckpointError:
        assert other.num_updates == 0
        np.testing.assert_equal([dict(one) for one in other.shadows], before)
    else:
        other.update()
