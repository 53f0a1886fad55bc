"""Random operations with random faults: ``python -m tests.faults.trials 10000 --seed 1``.

Every trial does one operation twice: undisturbed on a twin, and with a fault on a subject that is
in the same state. After it the subject's model has its raw weights, and its average is that from
before the operation or that from after it; if it is the one from before, the operation is done
again, and has to lead where it led the twin.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

import fastema
from fastema import checkpoint
from fastema.distributed import consolidate
from fastema.errors import FastemaError

from ..shadow.kinds import KINDS, all_of, which
from ..shadow.weights import net, refresh_, tensors_of
from ..support.peers import PEERS, Peer
from .interrupts import interrupted, rung_during


class Planted(Exception):
    """What the body of a block raises."""


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits_of(weights: Any) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in tensors_of(weights)}


class Side:
    """A model and an average of it, and the folder that it saves to."""

    def __init__(self, build: Callable[[Any], Any], dtype: torch.dtype, folder: Path) -> None:
        self.model = net(1, dtype)
        self.average = build(self.model)
        self.other = net(2, dtype)
        self.folder = folder
        self.n = 0
        folder.mkdir()

    def train(self, seed: int) -> None:
        """Write the weights, as an optimizer does."""
        if hasattr(self.average, "wait"):
            self.average.wait()
        refresh_(self.model, seed)

    def settle(self) -> None:
        """Bring the average back to rest if it is applied."""
        if getattr(self.average, "applied", False):
            self.average.restore()

    def held(self) -> Any:
        """The average and its counters, bit for bit."""
        return all_of(self.average)


class PeerSide(Side):
    """The same of a class that takes another library's place."""

    def __init__(self, peer: Peer, options: Any, folder: Path) -> None:
        self.peer, self.stored = peer, False
        super().__init__(lambda m: peer.make(peer.module(), m, **options), torch.float32, folder)

    def settle(self) -> None:
        """Restore once more where Ctrl-C came before or in the restoring of stored weights."""
        if self.stored:
            with contextlib.suppress(FastemaError, RuntimeError):  # none are stored yet
                self.average.restore(list(self.model.parameters()))
            self.stored = False

    def held(self) -> Any:
        """See :class:`Side`; the counters are in the state."""
        averages = self.peer.averages(self.average, self.model)
        state = self.peer.state(self.average)
        numbers = {key: str(one) for key, one in state.items() if key not in averages}
        return {name: bits(one) for name, one in averages.items()} | numbers


# -- operations ------------------------------------------------------------------------------------


class Op(NamedTuple):
    """Something done with an average; ``seed`` says how, ``loads`` that files are compared."""

    do: Callable[[Side, int], None]
    repeats: bool = True  # done again where nothing was done


def update(side: Side, seed: int) -> None:
    side.average.update()


def update_steps(side: Side, seed: int) -> None:
    side.average.update(steps=1 + seed % 3)


def in_block(side: Side, seed: int) -> None:
    """A block whose body may raise, or be left by a jump."""
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
    state = side.average.state_dict()
    state["num_updates"] += seed % 3
    side.average.load_state_dict(state)


def copy_to(side: Side, seed: int) -> None:
    side.average.copy_to(side.other, **which(side.average))


def model_state(side: Side, seed: int) -> None:
    side.other.load_state_dict(side.average.model_state_dict(**which(side.average)))


def save(side: Side, seed: int) -> None:
    checkpoint.save(side.average, side.folder / f"{seed % 2}.safetensors")


def save_later(side: Side, seed: int) -> None:
    checkpoint.save(side.average, side.folder / f"{seed % 2}.safetensors", wait=False)
    checkpoint.wait()


def save_and_load(side: Side, seed: int) -> None:
    save(side, seed)
    checkpoint.load_into(side.average, side.folder / f"{seed % 2}.safetensors")


def to_folder(side: Side, seed: int) -> None:
    target = side.folder / f"folder {next(_NUMBERS)}"
    consolidate(side.average, target, **which(side.average))


def average_files(side: Side, seed: int) -> None:
    source = side.folder / "source" / "model.safetensors"
    source.parent.mkdir(exist_ok=True)
    save_file(dict(side.average.shadows[-1]), source)
    checkpoint.average([source, source], [0.5, 0.5], side.folder / "mean.safetensors")


_NUMBERS = itertools.count()

OPS: dict[str, Op] = {
    "update": Op(update),
    "update of steps": Op(update_steps),
    "block": Op(in_block),
    "apply and restore": Op(apply_and_restore),
    "load_state_dict": Op(load_state),
    "copy_to": Op(copy_to),
    "model_state_dict": Op(model_state),
    "save": Op(save),
    "save later": Op(save_later),
    "save and load": Op(save_and_load),
    "consolidate": Op(to_folder),
    "average files": Op(average_files),
}


def peer_update(side: Side, seed: int) -> None:
    assert isinstance(side, PeerSide)
    side.peer.update(side.average, side.model, side.n)


def peer_load(side: Side, seed: int) -> None:
    assert isinstance(side, PeerSide)
    side.peer.load(side.average, deepcopy(side.peer.state(side.average)))


def peer_block(side: Side, seed: int) -> None:
    """Weights kept, the average in their place, weights back: as the peer's users do."""
    assert isinstance(side, PeerSide)
    average, parameters = side.average, list(side.model.parameters())
    if hasattr(average, "average_parameters"):
        with contextlib.suppress(Planted), average.average_parameters(parameters):
            if seed % 2:
                raise Planted
        return
    average.store(parameters)
    side.stored = True
    try:
        average.copy_to(side.model if type(average).__name__ == "LitEma" else parameters)
    finally:
        average.restore(parameters)
        side.stored = False


PEER_OPS = {"update": Op(peer_update), "load": Op(peer_load)}
BLOCK_OPS = {**PEER_OPS, "block": Op(peer_block)}


# -- faults ----------------------------------------------------------------------------------------


def nothing(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    do()


def interrupt(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """Ctrl-C at any place in the call."""
    interrupted(chance.randint(1, max(many, 1)), do)


def timer(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """An exception raised by a signal's handler, at any moment."""
    rung_during(chance.uniform(1e-5, 3e-3), do)


def failing_disk(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """A full disk: one of the calls that write fails."""
    left, lock = [chance.randint(0, 4)], threading.Lock()

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    names = ("fsync", "replace", "rename", "link")
    kept = {name: getattr(os, name) for name in names}
    try:
        for name in names:
            setattr(os, name, failing(kept[name]))
        do()
    finally:
        for name in names:
            setattr(os, name, kept[name])


def _with_tensor(
    side: Side, do: Callable[[], None], chance: random.Random, wrong: Callable[[Any], None]
) -> None:
    """Spoil one parameter for a call, and give it back its values."""
    name = chance.choice([name for name, _ in side.model.named_parameters()])
    parameter = side.model.get_parameter(name)
    if hasattr(side.average, "wait"):
        side.average.state_dict()  # an update under way has its copy first
    values = parameter.data.clone()
    parameter.data = data = values.clone()  # memory of torch, which can be freed
    size = data.untyped_storage().nbytes()
    try:
        wrong(parameter)
        do()
    finally:
        data.untyped_storage().resize_(size)
        parameter.data = data
        data.copy_(values)


def freed(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """A parameter without memory."""
    _with_tensor(side, do, chance, lambda p: p.untyped_storage().resize_(0))


def resized(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """A parameter of another shape."""

    def wrong(parameter: Any) -> None:
        parameter.data = torch.ones(2, 3, 5, dtype=parameter.dtype)

    _with_tensor(side, do, chance, wrong)


def moved(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """Parameters that lie elsewhere than before."""
    if hasattr(side.average, "wait"):
        side.average.wait()
    for parameter in side.model.parameters():
        if chance.random() < 0.4:
            parameter.data = parameter.data.clone()
    do()


def readers(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """Other threads that read the average meanwhile."""
    stop, errors = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                side.average.state_dict()
            except Exception as error:
                errors.append(error)
                return

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


def forked(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """A child of fork does it too, and ends; the parent's own call comes after."""
    child = os.fork()
    if not child:
        code = 1
        try:
            do()
            side.settle()
            side.held()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        assert time.monotonic() < end, "the child hangs"
        time.sleep(1e-3)
    assert os.waitstatus_to_exitcode(status) == 0, "the child failed"
    do()


def raising_worker(side: Side, do: Callable[[], None], chance: random.Random, many: int) -> None:
    """A copy over the link that fails; the next call says so."""
    link = side.average._link
    before, left = link.delay, [chance.randint(0, 6)]

    def fail(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the link is broken")

    link.delay = fail
    try:
        do()
        side.average.state_dict()  # waits, and raises what the worker raised
    finally:
        link.delay = before


Fault = Callable[[Side, Callable[[], None], random.Random, int], None]

FAULTS: dict[str, Fault] = {
    "nothing": nothing,
    "interrupt": interrupt,
    "timer": timer,
    "failing disk": failing_disk,
    "freed": freed,
    "resized": resized,
    "moved": moved,
    "readers": readers,
    "forked": forked,
}
OF_PEERS = ("nothing", "interrupt", "timer", "moved")
SHARED_FOLDER = ("forked",)
"""Faults in which two processes would write the same files: not for operations that do."""

WRITE = ("save", "save later", "save and load", "consolidate", "average files")

REFUSALS = (FastemaError, OSError, RuntimeError, Planted)
"""What an operation may raise; an AssertionError, TypeError or the like is a find."""


# -- subjects --------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """How a side is built, what can be done with it, and what can happen to it."""

    build: Callable[[Path], Side]
    ops: dict[str, Op]
    faults: dict[str, Fault]


def _delayed(model: Any, skip: bool = False, **options: Any) -> Any:
    """An average on the host over a link that is slow at times."""
    ema = fastema.EMA(model, 0.75, offload=True, **options)
    chance = random.Random(3)
    ema._link.delay = lambda number: time.sleep(chance.choice((0.0, 0.0, 5e-4)))  # type: ignore[attr-defined]
    return ema


def _subjects() -> dict[str, Subject]:
    windowed = {name: op for name, op in OPS.items() if name != "update of steps"}
    found = {}
    for kind, build in KINDS.items():
        for dtype in (torch.float32, torch.bfloat16):
            ops = windowed if kind == "SMA" else OPS
            found[f"{kind} of {dtype}"] = Subject(
                lambda folder, build=build, dtype=dtype: Side(build, dtype, folder), ops, FAULTS
            )
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {"shadow_dtype": "float32"}),
        (torch.bfloat16, {"shadow_dtype": "bf16+16", "on_nonfinite": "raise"}),
    ):
        found[f"on the host, {dtype}, {options}"] = Subject(
            lambda folder, dtype=dtype, options=options: Side(
                lambda model: _delayed(model, **options), dtype, folder
            ),
            OPS,
            {**FAULTS, "raising worker": raising_worker},
        )
    faults = {name: FAULTS[name] for name in OF_PEERS}
    for name, peer in PEERS.items():
        if "inside torch" in name:  # the class that counts is torch's
            continue
        options = peer.schedules[next(iter(peer.schedules))]
        blocks = name in ("torch_ema", "diffusers", "litema")
        found[name] = Subject(
            lambda folder, peer=peer, options=options: PeerSide(peer, options, folder),
            BLOCK_OPS if blocks else PEER_OPS,
            faults,
        )
    return found


# -- trials ----------------------------------------------------------------------------------------


def trial(subject: Side, twin: Side, op: Op, fault: Fault, chance: random.Random) -> str:
    """One operation with a fault; how it ended."""
    seed = chance.randrange(1 << 20)
    for side in (subject, twin):
        side.train(seed)
    raw, before = bits_of(subject.model), subject.held()
    assert before == twin.held(), "the twins differ before the operation"
    many = -interrupted(0, lambda: op.do(twin, seed))
    after = twin.held()
    ended = "done"
    try:
        fault(subject, lambda: op.do(subject, seed), chance, many)
    except REFUSALS as error:
        ended = type(error).__name__
    if isinstance(lock := getattr(subject.average, "lock", None), type(threading.RLock())):
        assert not lock._is_owned(), "the lock is still held"
    subject.settle()
    for _ in range(2):  # what a worker raised is told once
        with contextlib.suppress(FastemaError, RuntimeError, OSError):
            checkpoint.wait()
            found = subject.held()
            break
    assert bits_of(subject.model) == raw, "the weights are not the raw ones"
    assert found in (before, after), (
        f"the average is neither old nor new: {_differing(found, before, after)}"
    )
    if found != after:
        op.do(subject, seed)
        assert subject.held() == after, "done again, it leads elsewhere"
        ended += ", done again"
    assert bits_of(subject.model) == raw
    for file in subject.folder.glob("*.safetensors"):
        checkpoint.inspect(file, check=True)
    subject.n, twin.n = subject.n + 1, twin.n + 1
    return ended


def _differing(found: Any, before: Any, after: Any) -> list[str]:
    return [key for key in found if found[key] not in (before.get(key), after.get(key))][:5] or [
        f"{key}: {'old' if found[key] == before.get(key) else 'new'}"
        for key in found
        if before.get(key) != after.get(key)
    ][:8]


def run(trials: int, seed: int, of: str = "") -> Iterator[str]:
    """Do that many trials, dealt in turn to all subjects; what happened how often."""
    subjects = [(name, one) for name, one in _subjects().items() if of in name]
    ended: Counter[str] = Counter()
    pairs: set[tuple[str, str, str]] = set()
    longest = 25  # trials of one pair of twins
    for turn in range(0, trials, longest):
        if turn and turn % 1_000 == 0:
            print(f"{turn:,} trials", file=sys.stderr, flush=True)
        name, subject = subjects[turn // longest % len(subjects)]
        with tempfile.TemporaryDirectory() as folder:
            twins = [subject.build(Path(folder) / side) for side in ("subject", "twin")]
            for number in range(turn, min(turn + longest, trials)):
                chance = random.Random(f"{seed} {number}")
                op = chance.choice(list(subject.ops))
                fault = chance.choice(
                    [one for one in subject.faults if one not in SHARED_FOLDER or op not in WRITE]
                )
                place = f"trial {number}, seed {seed}: {name}, {op}, {fault}"
                try:
                    outcome = trial(
                        twins[0], twins[1], subject.ops[op], subject.faults[fault], chance
                    )
                except BaseException as error:
                    error.add_note(place) if hasattr(error, "add_note") else print(place)
                    raise
                ended[f"{fault}: {outcome}"] += 1
                pairs.add((name, op, fault))
    yield f"{trials:,} trials, seed {seed}: {len(pairs):,} of subject, operation and fault"
    yield from (f"  {what}: {count:,}" for what, count in sorted(ended.items()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # forks while there are threads are what is tested
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", default="", help="subjects whose name has this")
    given = parser.parse_args()
    for line in run(given.trials, given.seed, given.of):
        print(line)
