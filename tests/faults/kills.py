"""Kill writers at random moments: ``python -m tests.faults.kills save 100 --seed 1``.

They must leave the old file or a complete new one, and the next writer must clean up.
"""

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
from fastema.checkpoint import convert, files, inspect, load
from fastema.checkpoint.state import read_state

from ..support.states import nested

SIZES = (300_000, 7, 50_000)
LONGEST = 0.06
"""Longest time before a writer is killed, in seconds."""


def values(k: int) -> dict[str, np.ndarray]:
    """Return tensors that are all filled with ``k``."""
    return {f"w{i}": np.full(size, k, np.float32) for i, size in enumerate(SIZES)}


def save(path: Path, k: int, wait: bool = True) -> None:
    checkpoint.save(fastema.EMA(values(k), decay=0.9, seed=k), path, wait=wait)


def save_later(folder: Path, k: int) -> None:
    save(folder / "ema.safetensors", k, wait=False)
    checkpoint.wait()


def average(folder: Path, k: int, folders: bool = False) -> None:
    """Average two checkpoints whose mean is one number in all tensors."""
    paths = [folder / "in" / f"{k % 3}-{i}" for i in (0, 1)]
    if not folders:
        paths = [path.with_suffix(".safetensors") for path in paths]
    for path, add in zip(paths, (-1, 1), strict=True):
        tensors = {name: one + add for name, one in values(k % 3).items()}
        (path if folders else path.parent).mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "model.safetensors" if folders else path)
    checkpoint.average(paths, [0.5, 0.5], folder / (f"mean{k}" if folders else "mean.safetensors"))


def convert_to_weights(folder: Path, k: int) -> None:
    source = folder / "in.safetensors"
    if not source.exists():
        save(source, k)
    convert(source, folder / "weights.safetensors", to="safetensors")


OPERATIONS: dict[str, Callable[[Path, int], None]] = {
    "save": lambda folder, k: save(folder / "ema.safetensors", k),
    "save later": save_later,
    "average": average,
    "average folders": lambda folder, k: average(folder, k, folders=True),
    "convert": convert_to_weights,
}


def check(folder: Path) -> None:
    """Raise unless every file under its final name is complete."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("mean*/model.safetensors")]:
        inspect(path, check=True)
        if load(path).library == "fastema":
            read = nested(read_state(files.read(path), np.zeros(1)))
            tensors = read["shadow"][0]
            assert read["seed"] == next(iter(tensors.values())).flat[0]
        else:
            tensors = load_file(path)
        assert set(tensors) == set(values(0)), path
        held = {float(number) for one in tensors.values() for number in (one.min(), one.max())}
        assert len(held) == 1, (path, held)


def kill_one(operation: Callable[[Path, int], None], folder: Path, delay: float) -> bool:
    """Kill a writer; return whether it left an unfinished file."""
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
    return any(folder.glob("*.part"))


def age_everything(folder: Path) -> None:
    """Let all files be two days old: partial ones are then those of killed processes."""
    then = time.time() - 2 * 24 * 3600
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


def run(name: str, trials: int, seed: int) -> str:
    chance = random.Random(f"{seed} {name}")
    operation, unfinished, moves = OPERATIONS[name], 0, itertools.count()
    with tempfile.TemporaryDirectory() as inside:
        for number in range(trials):
            # Reuse seven folders, so that writers find what others left.
            place = Path(inside, str(number % 7))
            place.mkdir(exist_ok=True)

            def clear(place: Path = place) -> None:
                for one in place.glob("mean[0-9]*"):  # an existing folder is never replaced
                    one.rename(Path(inside, f"{one.name}-{next(moves)}"))

            clear()
            unfinished += kill_one(operation, place, chance.uniform(0.0, LONGEST))
            if number % 5 == 0:
                clear()
                age_everything(place)
                operation(place, 1)
                assert not list(place.glob("*.part"))
    return f"{name}: {trials} killed, {unfinished} while they wrote, seed {seed}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(run(given.operation, given.trials, given.seed))
