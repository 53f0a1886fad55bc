"""Races on a GPU: set up and verify as many entries as fit in memory, and time them in turn."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import nn

from bench.gpu.cases import DeviceCase, build, estimate_memory, fill_, traffic
from bench.gpu.clock import Budget, Clock, Memory
from bench.gpu.peers import DEVICE_PEERS, refusals
from bench.gpu.targets import COPY
from bench.race.checks import sample
from bench.race.contest import Job
from bench.race.durations import spread
from bench.race.flat_module import DTYPES
from bench.race.jobs import DECAY, check_update
from bench.race.peers import OURS, Peer
from bench.race.report import Row
from bench.race.shapes import total_elements
from fastema.cli.clock import interleave
from fastema.engine.cuda_group import SlowWarning

_COPY_BYTES = 2 << 30
_WARM_UP, _HOST_ROUNDS, _HOST_S = 2, 15, 0.5
_OUT_OF_MEMORY = (torch.cuda.OutOfMemoryError, MemoryError)


@dataclass(frozen=True)
class ReadyEntry:
    """An entry whose first result was verified and that is ready to be timed."""

    name: str
    update: Job
    host_s: float
    memory: Memory | None


def start(peer: Peer, model: nn.Module, case: DeviceCase, clock: Clock, seed: int) -> ReadyEntry:
    """Set up an entry, compare its first result with the float64 reference, and warm it up.

    Raises
    ------
    AssertionError
        If the result is wrong.
    SlowWarning
        If torch's functions would run instead of our kernels: their time is not ours.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowWarning)
        running = peer.setup(model, DECAY, DTYPES[case.average_dtype])
        # Set-up may have run updates, but the averages still equal these weights.
        before = [sample(p) for p in model.parameters()]
        fill_(model, seed)
        check_update(peer, running, model, before)
        for _ in range(_WARM_UP):
            running.update()
    memory = clock.memory(running.update)
    return ReadyEntry(peer.name, running.update, host_time(running.update, clock), memory)


def host_time(job: Job, clock: Clock) -> float:
    """Return the median host time of several calls, and of fewer calls if they are slow."""
    times = [clock.host_time(job)]
    while len(times) < _HOST_ROUNDS and sum(times) < _HOST_S:
        times.append(clock.host_time(job))
    return median(times)


def groups(
    peers: Sequence[Peer],
    begin: Callable[[Peer], ReadyEntry],
    give_up: Callable[[str, Exception | None], None],
    clock: Clock,
    least: int = 0,
) -> Iterator[list[ReadyEntry]]:
    """Yield groups of started entries that fit in memory together, until each was in a group.

    Parameters
    ----------
    peers
        The peers, in order of importance.
    begin
        Starts a peer; it may run out of memory.
    give_up
        Called with the name of each peer that cannot run and its error, or None if the peer does
        not even fit alone.
    clock
        Clock of the device.
    least
        Bytes that every entry needs at least. With fewer bytes free, no entry is added to a group.
    """
    waiting = list(peers)
    while waiting:
        group: list[ReadyEntry] = []
        left: list[Peer] = []
        for peer in waiting:
            if group and clock.free_bytes() < least:
                left.append(peer)
                continue
            try:
                group.append(begin(peer))
            except _OUT_OF_MEMORY:
                left.append(peer)
            except Exception as error:
                give_up(peer.name, error.with_traceback(None))  # frames keep tensors alive
            else:
                if len(group) == 1 or _has_room(group, clock):
                    continue
                group.pop()
                left.append(peer)
            clock.release()
        if not group:
            for peer in left:
                give_up(peer.name, None)
            return
        yield group
        group.clear()
        clock.release()
        waiting = left


def _has_room(group: Sequence[ReadyEntry], clock: Clock) -> bool:
    """Return whether there is memory for the temporaries of each entry in a group."""
    passing = max((one.memory.peak_bytes for one in group if one.memory is not None), default=0)
    if passing > clock.free_bytes():
        clock.release()
    return passing <= clock.free_bytes()


class Copy:
    """A device-to-device copy, the yardstick of a race.

    Parameters
    ----------
    nbytes
        Bytes read and written together. The largest cases copy fewer bytes, at the same speed.
    device
        Device to copy on.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        count = max(min(nbytes // 2, _COPY_BYTES) // 4, 1)
        self._source = torch.randn(count, device=device)
        self._target = torch.empty_like(self._source)
        self.nbytes = 2 * 4 * count

    def __call__(self) -> None:
        self._target.copy_(self._source)


def race(
    case: DeviceCase, clock: Clock, budget: Budget, peers: Sequence[Peer] = DEVICE_PEERS
) -> list[Row]:
    """Run one case, and return a row per entry, with the reason for entries that did not run."""
    needed, free = estimate_memory(case), clock.free_bytes()
    if needed > 0.95 * free:
        reason = f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        return [Row(case.title, "all", missing=reason)]
    out = refusals(case, clock.device)
    missing = [Row(case.title, name, missing=reason) for name, reason in out.items()]
    model = build(case, clock.device)
    field = _RaceSetup(case, model, Copy(traffic(case, model), clock.device), clock, budget)
    seeds = count(1)

    def begin(peer: Peer) -> ReadyEntry:
        if not budget.left():
            raise TimeoutError("no time was left")
        return start(peer, model, case, clock, next(seeds))

    def give_up(name: str, error: Exception | None) -> None:
        if error is None:
            missing.append(Row(case.title, name, missing="needs more memory than there is"))
        elif isinstance(error, TimeoutError):
            missing.append(Row(case.title, name, missing=str(error)))
        else:
            missing.append(failure(case.title, name, error))

    chosen = [peer for peer in peers if peer.name not in out]
    average = total_elements(case.inventory()) * DTYPES[case.average_dtype].itemsize
    rows: list[Row] = []
    with torch.no_grad():
        for group, started in enumerate(groups(chosen, begin, give_up, clock, average), 1):
            rows += field.run(started, group)
    ours = next((row["device_ms"] for row in rows if row.entry == OURS), None)
    torch._dynamo.reset()  # compiled functions keep their tensors alive
    return [_with_ratio(row, ours) for row in rows] + missing


def _with_ratio(row: Row, ours: float | None) -> Row:
    ratio = None if ours is None else row["device_ms"] / ours
    return replace(row, figures={**row.figures, "ratio": ratio})


def failure(table: str, entry: str, error: BaseException) -> Row:
    """Return the row of an entry that raised an error or gave a wrong result.

    Only errors of fastema's entries, or of a whole case, make the check fail.
    """
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return Row(table, entry, missing=text, failed=entry.startswith(("fastema", "all")))


@dataclass(frozen=True)
class _RaceSetup:
    """The setting of a race: case, weights, the copy to compare with, clock and time budget."""

    case: DeviceCase
    model: nn.Module
    copy: Copy
    clock: Clock
    budget: Budget

    def run(self, started: Sequence[ReadyEntry], group: int) -> list[Row]:
        """Time a group of entries and the copy in turn, and return their rows."""
        weights = [p.detach() for p in self.model.parameters()]
        memories = {one.name: one.memory for one in started}
        inventory = self.case.inventory()
        elements = total_elements(inventory)
        nbytes = traffic(self.case, self.model)
        rows = time_beside_copy(
            self.case.title,
            {one.name: one.update for one in started},
            nbytes,
            self.copy,
            self.clock,
            hosts={one.name: one.host_s for one in started},
            rounds=self.case.rounds,
            budget_s=min(self.case.budget_s, self.budget.left()),
            before_round=lambda: torch._foreach_neg_(weights),
        )
        facts = {
            "n_tensors": len(inventory),
            "n_elements": elements,
            "bytes_per_element": nbytes / elements,
        }
        return [
            replace(
                row,
                figures={
                    **facts,
                    **row.figures,
                    **_figures(memories.get(row.entry)),
                    "group": group,
                },
            )
            for row in rows
        ]


def _figures(memory: Memory | None) -> dict[str, Any]:
    return {
        "allocations": None if memory is None else memory.allocations,
        "peak_mb": None if memory is None else memory.peak_bytes / 1e6,
        "driver_bytes": None if memory is None else memory.driver_bytes,
    }


def time_beside_copy(
    title: str,
    jobs: Mapping[str, Job],
    nbytes: int,
    copy: Copy,
    clock: Clock,
    *,
    hosts: Mapping[str, float] | None = None,
    rounds: int,
    budget_s: float,
    before_round: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Time jobs and the copy in turn, and return a row of each.

    Parameters
    ----------
    title
        Title of the table.
    jobs
        Name -> call that moves at least `nbytes`.
    nbytes
        The fewest bytes that a job moves.
    copy
        The yardstick.
    clock
        Clock of the device.
    hosts
        Name -> seconds that a call takes on the host; measured if absent.
    rounds, budget_s, before_round
        See `fastema.cli.clock.interleave`.
    """
    everything: dict[str, Job] = {**jobs, COPY: copy}
    known = hosts or {}
    taken = {
        name: known[name] if name in known else host_time(job, clock)
        for name, job in everything.items()
    }
    waited: Counter[str] = Counter()

    def time_of(name: str, job: Job) -> float:
        found = clock.device_time(job, 2 * taken[name] + 50e-6)
        waited[name] += clock.waited
        return found

    durations = interleave(
        everything,
        rounds,
        budget_s=budget_s,
        settle_s=0.0,
        before_round=before_round,
        time_of=time_of,
    )
    per_second = copy.nbytes / median(durations[COPY])
    rows = []
    for name, times in durations.items():
        typical, moved = median(times), copy.nbytes if name == COPY else nbytes
        figures = {
            "bytes": moved,
            "rounds_in_group": len(times),
            "device_ms": typical * 1e3,
            "device_spread_ms": [one * 1e3 for one in spread(times)],
            "host_us": taken[name] * 1e6,
            "tbps": moved / typical / 1e12,
            "share_of_copy": moved / typical / per_second,
            "timed_at": "host" if 2 * waited[name] > len(times) else "device",
        }
        rows.append(Row(title, name, figures))
    return rows
