"""Writers that are killed at random moments: ``python -m tests.faults.kills save 300 --seed 1``.

What they leave is an old file or a whole new one, and the next writer clears up.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import fastema
from fastema import checkpoint
from fastema.checkpoint import convert, inspect, load
from fastema.checkpoint.state import read_state

SIZES = (300_000, 7, 50_000)
LONGEST = 0.06
"""Seconds after which a writer is killed, at most."""


def values(k: int) -> dict[str, np.ndarray]:
    """Tensors that all hold the same number."""
    return {f"w{i}": np.full(size, k, np.float32) for i, size in enumerate(SIZES)}


def average_of(k: int) -> fastema.EMA:
    return fastema.EMA(values(k), decay=0.9, seed=k)


def save(folder: Path, k: int, wait: bool = True) -> None:
    checkpoint.save(average_of(k), folder / "ema.safetensors", wait=wait)


def save_later(folder: Path, k: int) -> None:
    save(folder, k, wait=False)
    checkpoint.wait()


def sources(folder: Path, k: int, folders: bool = False) -> list[Path]:
    """Two checkpoints whose mean is k everywhere."""
    paths = []
    for i, add in enumerate((-1, 1)):
        path = folder / "in" / (f"{k}-{i}" if folders else f"{k}-{i}.safetensors")
        path.parent.mkdir(exist_ok=True)
        if folders:
            path.mkdir(exist_ok=True)
        tensors = {name: one + add for name, one in values(k).items()}
        save_file(tensors, path / "model.safetensors" if folders else path)
        paths.append(path)
    return paths


def average(folder: Path, k: int) -> None:
    checkpoint.average(sources(folder, k % 3), [0.5, 0.5], folder / "mean.safetensors")


def average_folders(folder: Path, k: int) -> None:
    checkpoint.average(sources(folder, k % 3, folders=True), [0.5, 0.5], folder / f"mean{k}")


def convert_to_weights(folder: Path, k: int) -> None:
    source = folder / "in.safetensors"
    if not source.exists():
        checkpoint.save(average_of(k), source)
    convert(source, folder / "weights.safetensors", to="safetensors")


OPERATIONS: dict[str, Callable[[Path, int], None]] = {
    "save": save,
    "save later": save_later,
    "average": average,
    "average folders": average_folders,
    "convert": convert_to_weights,
}


def check(folder: Path) -> int:
    """Raise unless every file that has its name is whole; how many there are."""
    found = [*folder.glob("*.safetensors"), *folder.glob("mean*/model.safetensors")]
    for path in found:
        inspect(path, check=True)
        stored = load(path)
        if stored.library == "fastema":
            like = np.zeros(1)
            read = read_state(checkpoint.files.read(path), like)  # type: ignore[attr-defined]
            assert read["seed"] == next(iter(read["shadow"][0].values())).flat[0]
            tensors = read["shadow"][0]
        else:
            tensors = load_file(path)
        assert set(tensors) == set(values(0)), path
        held = {float(number) for one in tensors.values() for number in (one.min(), one.max())}
        assert len(held) == 1, (path, held)
    return len(found)


def leftovers(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.name.endswith(".part")]


def trial(operation: Callable[[Path, int], None], folder: Path, delay: float) -> bool:
    """Kill a writer; whether it left something unfinished."""
    child = os.fork()
    if not child:
        try:
            for k in itertools.count(1):
                operation(folder, k)
        finally:
            os._exit(1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the writer failed by itself: {status}"
    check(folder)
    return bool(leftovers(folder))


def run(name: str, trials: int, seed: int) -> str:
    chance = random.Random(f"{seed} {name}")
    operation, unfinished = OPERATIONS[name], 0
    with tempfile.TemporaryDirectory() as inside:
        folder = Path(inside)
        for number in range(trials):
            # A folder of its own each time, or the same one again and again.
            place = folder / str(number % 7)
            place.mkdir(exist_ok=True)
            for one in place.glob("mean[0-9]*"):  # of folders there is none to replace
                one.rename(folder / f"{one.name}-{number}")
            unfinished += trial(operation, place, chance.uniform(0.0, LONGEST))
            if number % 5 == 0:
                for one in place.glob("mean[0-9]*"):
                    one.rename(folder / f"{one.name}-{number}-")
                operation(place, 1)
                assert leftovers(place) == [], leftovers(place)
    return f"{name}: {trials} killed, {unfinished} while they wrote, seed {seed}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(run(given.operation, given.trials, given.seed))
