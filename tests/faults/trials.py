"""Random operations with random faults: ``python -m tests.faults.trials 10000 --seed 1``.

Every trial runs one operation twice: undisturbed on a twin, and with a fault on a subject in the
same state. Afterwards the subject's model must have its raw weights, and its average must be the
one from before or after the operation. If it is the one from before, the operation is repeated and
must give the twin's result.
"""

import argparse
import contextlib
import errno
import itertools
import os
import random
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from safetensors.torch import save_file

import fastema
from fastema import checkpoint
from fastema.distributed import consolidate
from fastema.errors import FastemaError

from ..average.kinds import KINDS, full_state, which
from ..average.weights import net, refresh_, tensors_of
from ..support.peers import PEERS
from ..support.states import flat, nested
from .interrupts import interrupt, interrupt_after


class Planted(Exception):
    """Exception that the body of a block raises."""


def bits_of(weights: Any) -> dict[str, bytes]:
    return {
        name: one.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, one in tensors_of(weights)
    }


class Side:
    """A model, its average, and the folder to save to."""

    def __init__(self, build: Callable[[Any], Any], dtype: torch.dtype, folder: Path) -> None:
        self.model, self.other = net(1, dtype), net(2, dtype)
        self.average = build(self.model)
        self.folder, self.n = folder, 0
        folder.mkdir()

    def train(self, seed: int) -> None:
        if hasattr(self.average, "wait"):
            self.average.wait()
        refresh_(self.model, seed)

    def settle(self) -> None:
        """Restore the weights if the average is applied."""
        if getattr(self.average, "applied", False):
            self.average.restore()

    def snapshot(self) -> Any:
        """Return the bits of the average and its counters."""
        return full_state(self.average)


class PeerSide(Side):
    """A model and its average by a drop-in class for another library."""

    def __init__(self, name: str, folder: Path) -> None:
        self.peer = peer = PEERS[name]
        options = next(iter(peer.schedules.values()))
        super().__init__(lambda m: peer.make(peer.module(), m, **options), torch.float32, folder)

    def snapshot(self) -> Any:
        averages = self.peer.averages(self.average, self.model)
        state = self.peer.state(self.average)
        numbers = {key: str(one) for key, one in state.items() if key not in averages}
        return bits_of(averages) | numbers


Op = Callable[[Any, int], None]


def block(side: Side, seed: int) -> None:
    """Swap in a block whose body may raise or break out."""
    with contextlib.suppress(Planted):
        for _ in range(2):
            with side.average.swapped(**which(side.average)):
                if seed % 3 == 0:
                    raise Planted
                if seed % 3 == 1:
                    break


def apply_and_restore(side: Side, seed: int) -> None:
    side.average.apply_shadow(**which(side.average))
    side.average.restore()


def load_state(side: Side, seed: int) -> None:
    state = nested(side.average.state_dict())
    state["num_updates"] += seed % 3
    side.average.load_state_dict(flat(state))


def model_state(side: Side, seed: int) -> None:
    side.other.load_state_dict(side.average.model_state_dict(**which(side.average)))


def save(side: Side, seed: int) -> None:
    """Save now or in the background, and sometimes load the file."""
    path = side.folder / f"{seed % 2}.safetensors"
    checkpoint.save(side.average, path, wait=seed % 3 > 0)
    checkpoint.wait()
    if seed % 5 == 0:
        checkpoint.load_into(side.average, path)


def to_folder(side: Side, seed: int) -> None:
    consolidate(side.average, side.folder / f"folder {next(NUMBERS)}", **which(side.average))


def average_files(side: Side, seed: int) -> None:
    source = side.folder / "source" / "model.safetensors"
    source.parent.mkdir(exist_ok=True)
    save_file(dict(side.average.shadows[-1]), source)
    checkpoint.average([source, source], [0.5, 0.5], side.folder / "mean.safetensors")


NUMBERS = itertools.count()
WRITE: dict[str, Op] = {"save": save, "consolidate": to_folder, "average files": average_files}
OPS: dict[str, Op] = {
    "update": lambda side, seed: side.average.update(),
    "update of steps": lambda side, seed: side.average.update(steps=1 + seed % 3),
    "block": block,
    "apply and restore": apply_and_restore,
    "load_state_dict": load_state,
    "copy_to": lambda side, seed: side.average.copy_to(side.other, **which(side.average)),
    "model_state_dict": model_state,
    **WRITE,
}


def peer_block(side: PeerSide, seed: int) -> None:
    with (
        contextlib.suppress(Planted),
        side.average.average_parameters(list(side.model.parameters())),
    ):
        if seed % 2:
            raise Planted


PEER_OPS: dict[str, Op] = {
    "update": lambda side, seed: side.peer.update(side.average, side.model, side.n),
    "load": lambda side, seed: side.peer.load(
        side.average, deepcopy(side.peer.state(side.average))
    ),
}


Do = Callable[[], None]
Fault = Callable[[Any, Do, random.Random, int], object]


def run_on_failing_disk(side: Side, do: Do, chance: random.Random, many: int) -> None:
    """Run with a disk that becomes full: a writing call and all later ones fail."""
    well, calls = chance.randint(0, 4), itertools.count()

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) >= well:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    names = ("fsync", "replace", "rename", "link")
    with mock.patch.multiple(os, **{name: failing(getattr(os, name)) for name in names}):
        do()


def run_spoiled(side: Side, do: Do, chance: random.Random, many: int) -> None:
    """Run while a parameter has no memory or another shape."""
    parameter = chance.choice(list(side.model.parameters()))
    if hasattr(side.average, "wait"):
        side.average.state_dict()  # let a pending update take its copy first
    values = parameter.data.clone()
    parameter.data = data = values.clone()  # torch's own memory, which can be freed
    size = data.untyped_storage().nbytes()
    try:
        if chance.random() < 0.5:
            data.untyped_storage().resize_(0)
        else:
            parameter.data = torch.ones(2, 3, 5, dtype=data.dtype)
        do()
    finally:
        data.untyped_storage().resize_(size)
        parameter.data = data
        data.copy_(values)


def run_moved(side: Side, do: Do, chance: random.Random, many: int) -> None:
    """Run after some parameters have moved."""
    if hasattr(side.average, "wait"):
        side.average.wait()
    for parameter in side.model.parameters():
        if chance.random() < 0.4:
            parameter.data = parameter.data.clone()
    do()


def run_beside_readers(side: Side, do: Do, chance: random.Random, many: int) -> None:
    """Run while other threads read the average."""
    stop, errors = threading.Event(), []

    def read() -> None:
        try:
            while not stop.is_set():
                side.average.state_dict()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for one in threads:
        one.start()
    try:
        do()
    finally:
        stop.set()
        for one in threads:
            one.join()
    assert not errors, errors


def run_forked(side: Side, do: Do, chance: random.Random, many: int) -> None:
    """Run in a forked child first, then in the parent."""
    child = os.fork()
    if not child:
        try:
            do()
            side.settle()
            side.snapshot()
            os._exit(0)
        finally:
            os._exit(1)
    end = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        assert time.monotonic() < end, "the child hangs"
        time.sleep(1e-3)
    assert done[1] == 0, "the child failed"
    do()


def run_with_raising_worker(side: Side, do: Do, chance: random.Random, many: int) -> None:
    """Run with a copy over the link that fails; the next call must raise."""
    link, well, copies = side.average._link, chance.randint(0, 6), itertools.count()

    def fail(number: int) -> None:
        if next(copies) >= well:
            raise RuntimeError("the link is broken")

    with mock.patch.object(link, "delay", fail):
        do()
        side.average.state_dict()  # waits, and raises the worker's exception


OF_PEERS: dict[str, Fault] = {
    "nothing": lambda side, do, chance, many: do(),
    "interrupt": lambda side, do, chance, many: interrupt(chance.randint(1, max(many, 1)), do),
    "timer": lambda side, do, chance, many: interrupt_after(chance.uniform(1e-5, 3e-3), do),
    "moved": run_moved,
}
FAULTS = {
    **OF_PEERS,
    "failing disk": run_on_failing_disk,
    "spoiled": run_spoiled,
    "readers": run_beside_readers,
    "forked": run_forked,
}
REFUSALS = (FastemaError, OSError, RuntimeError, Planted)
"""Exceptions that an operation may raise; others, such as AssertionError, are bugs."""


class Subject(NamedTuple):
    """The constructor of a side, its operations and its faults."""

    build: Callable[[Path], Side]
    ops: dict[str, Op]
    faults: dict[str, Fault]


def _delayed(model: Any, **options: Any) -> Any:
    """Build an offloaded average whose link is sometimes slow."""
    ema, chance = fastema.EMA(model, 0.75, offload=True, **options), random.Random(3)
    ema._link.delay = lambda number: time.sleep(chance.choice((0.0, 0.0, 5e-4)))  # type: ignore[attr-defined]
    return ema


def _subjects() -> dict[str, Subject]:
    windowed = {name: op for name, op in OPS.items() if name != "update of steps"}
    found = {}
    for kind, build in KINDS.items():
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{kind} of {dtype}"] = Subject(
                lambda folder, build=build, dtype=dtype: Side(build, dtype, folder),
                windowed if kind == "SMA" else OPS,
                FAULTS,
            )
    hosted: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float32, {}),
        (torch.bfloat16, {"shadow_dtype": "float32"}),
        (torch.bfloat16, {"shadow_dtype": "bf16+16", "on_nonfinite": "raise"}),
    ]
    for dtype, options in hosted:
        found[f"on the host, {dtype}, {options}"] = Subject(
            lambda folder, dtype=dtype, options=options: Side(
                lambda model: _delayed(model, **options), dtype, folder
            ),
            OPS,
            {**FAULTS, "raising worker": run_with_raising_worker},
        )
    for name in PEERS:
        if "inside torch" not in name:  # that class is torch's
            ops = {**PEER_OPS, "block": peer_block} if name == "torch_ema" else PEER_OPS
            found[name] = Subject(lambda folder, name=name: PeerSide(name, folder), ops, OF_PEERS)
    return found


def describe_change(found: Any, before: Any, after: Any) -> list[str]:
    """Return the keys that are neither old nor new; if none, which keys are old and new."""
    neither = [key for key in found if found[key] not in (before.get(key), after.get(key))]
    changed = [key for key in found if before.get(key) != after.get(key)]
    told = [f"{key}: {'old' if found[key] == before.get(key) else 'new'}" for key in changed]
    return neither[:5] or told[:8]


def trial(subject: Side, twin: Side, op: Op, fault: Fault, chance: random.Random) -> str:
    """Run one operation with a fault; return how it ended."""
    seed = chance.randrange(1 << 20)
    for side in (subject, twin):
        side.train(seed)
    raw, before = bits_of(subject.model), subject.snapshot()
    assert before == twin.snapshot(), "the twins differ before the operation"
    many = -interrupt(0, lambda: op(twin, seed))
    after = twin.snapshot()
    ended = "done"
    try:
        fault(subject, lambda: op(subject, seed), chance, many)
    except REFUSALS as error:
        ended = type(error).__name__
    if isinstance(lock := getattr(subject.average, "lock", None), type(threading.RLock())):
        assert not lock._is_owned(), "the lock is still held"
    subject.settle()
    for _ in range(2):  # a worker's exception is raised once
        with contextlib.suppress(FastemaError, RuntimeError, OSError):
            checkpoint.wait()
            found = subject.snapshot()
            break
    assert bits_of(subject.model) == raw, "the weights are not the raw ones"
    assert found in (before, after), f"neither old nor new: {describe_change(found, before, after)}"
    if found != after:
        op(subject, seed)
        assert subject.snapshot() == after, "repeated, it differs from the twin"
        ended += ", done again"
    assert bits_of(subject.model) == raw
    for file in subject.folder.glob("*.safetensors"):
        checkpoint.inspect(file, check=True)
    subject.n, twin.n = subject.n + 1, twin.n + 1
    return ended


def run(trials: int, seed: int, of: str, longest: int = 25) -> Counter[str]:
    """Run trials on all subjects in turn, up to ``longest`` on each pair of twins.

    With few trials all subjects get equal shares. Return how often each fault had each outcome.
    """
    subjects = [(name, one) for name, one in _subjects().items() if of in name]
    longest = min(longest, -(-trials // len(subjects)))
    ended: Counter[str] = Counter()
    for turn in range(0, trials, longest):
        name, subject = subjects[turn // longest % len(subjects)]
        with tempfile.TemporaryDirectory() as folder:
            twins = [subject.build(Path(folder) / side) for side in ("subject", "twin")]
            for number in range(turn, min(turn + longest, trials)):
                chance = random.Random(f"{seed} {number}")
                op = chance.choice(list(subject.ops))
                # A parent and its child would both write to the same files.
                possible = [one for one in subject.faults if one != "forked" or op not in WRITE]
                fault = chance.choice(possible)
                try:
                    outcome = trial(*twins, subject.ops[op], subject.faults[fault], chance)
                except BaseException:
                    print(f"trial {number}, seed {seed}: {name}, {op}, {fault}")
                    raise
                ended[f"{fault}: {outcome}"] += 1
    return ended


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # forks beside threads are tested on purpose
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", default="", help="only subjects whose names contain this")
    given = parser.parse_args()
    for what, count in sorted(run(given.trials, given.seed, given.of).items()):
        print(f"{what}: {count:,}")
