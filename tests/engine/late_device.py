"""Attacks on the host's side of CUDA launches: a device that is late, and an allocator that is not.

The driver of `stub_gpu` is made as hostile as the rules of CUDA and of PyTorch's allocator allow.
Launches wait in a queue for each stream, and queues run in any order. Memory that is freed goes to
the next one who asks as soon as the rules let it: at once on the stream that it was allocated on,
after the work on those that were noted with it. A launch that then touches it is a violation.
"""

import ctypes
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from fastema.bridges import torch as bridge
from fastema.engine import cuda as engine
from fastema.engine.cubins import Key
from fastema.kernels import table as abi

from ..support.stub_gpu import StubContext, StubDriver, StubGpu, gpu

__all__ = ["gpu", "late"]

MAIN, SIDE, THIRD = 77, 78, 79
"""Handles of streams."""

PINNED = -1
"""In the place of a stream: memory of the host is given away at once."""


@dataclass(eq=False)
class Block:
    """A stretch of the device's memory."""

    what: str
    address: int
    nbytes: int
    stream: int
    noted: set[int] = field(default_factory=set)
    given_away: bool = False


@dataclass(eq=False)
class Freed:
    """In a stream's queue: from here on its memory is another's, once other streams are so far."""

    block: Block
    others: dict[int, int]


@dataclass
class LateDriver(StubDriver):
    """A device that is later than the host, on every stream by as much as it likes."""

    late: bool = False
    blocks: list[Block] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)  # never really freed: a stale address is safe
    queues: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))
    put: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    ran: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    graphs: dict[int, list[Any]] = field(default_factory=dict)  # streams that are captured
    violations: list[str] = field(default_factory=list)

    def allocate(self, nbytes: int, stream: int, what: str) -> np.ndarray:
        """Bytes that are freed when nobody has them any more."""
        raw = (ctypes.c_uint8 * (nbytes + 64))()
        self.memory.append(raw)
        skip = -ctypes.addressof(raw) % 64
        array = np.frombuffer(raw, np.uint8, nbytes, skip)
        block = Block(what, array.ctypes.data, nbytes, stream)
        if nbytes:
            self.blocks.append(block)
        weakref.finalize(array, self.free, block).atexit = False
        return array

    def free(self, block: Block) -> None:
        others = {stream: self.put[stream] for stream in block.noted - {block.stream}}
        self.queues[block.stream].append(Freed(block, others))
        if not self.late:
            self.finish()

    def of(self, address: int) -> Block | None:
        return next((b for b in self.blocks if b.address <= address < b.address + b.nbytes), None)

    def may_overlap(self, values: Sequence[Any]) -> Iterator[int]:
        """Addresses that a launch works on: what they lead to only if they may be read."""
        if len(values) == 1:
            yield values[0]
            cells = (ctypes.c_int64 * abi.CLOCK_CELLS).from_address(values[0])
            yield from (cells[abi.TABLES + 2 * k] for k in range(abi.MAX_AVERAGES))
            return
        table, rows, *others = values[:4]
        yield from (table, *others)
        for row in range(rows):
            cells = (ctypes.c_int64 * abi.COLUMNS).from_address(table + 8 * abi.COLUMNS * row)
            yield from (cells[column] for column in (abi.DST, abi.SRC, abi.RESIDUAL, abi.RING))

    def bound(self, kernel: Callable[..., None], values: Sequence[Any]) -> Callable[[], None]:
        name = self.launches[-1][0]

        def job() -> None:
            for address in self.may_overlap(values):
                block = self.of(address)
                if block is not None and block.given_away:
                    self.violations.append(f"{name} touches {block.what}, which is another's")
                    return
            kernel(*values)

        return job

    def launch(self, key: Key, blocks: int, threads: int, stream: int, parameters: int) -> None:
        self.pending = []
        try:
            super().launch(key, blocks, threads, stream, parameters)
            for job in self.pending:
                self.begin(stream, job)
        finally:
            self.pending = None

    def begin(self, stream: int, job: Callable[[], None]) -> None:
        """Work comes to a stream."""
        if stream in self.graphs:
            self.graphs[stream].append(job)
            return
        self.queues[stream].append(job)
        self.put[stream] += 1
        if not self.late:
            self.finish()

    def finish(self, *streams: int) -> None:
        """Run what waits, on all streams or some: what is freed as early as may be."""

        def work_before(stream: int) -> int:
            freed = [k for k, one in enumerate(self.queues[stream]) if type(one) is Freed]
            return freed[0] if freed else 1 << 30

        for stream, queue in self.queues.items():  # nothing is to be done there before
            count = next((k for k, one in enumerate(queue) if type(one) is not Freed), len(queue))
            self.queues[stream] = [f for f in queue[:count] if not self.give_away(f)]
            self.queues[stream] += queue[count:]
        waiting: list[Freed] = []
        for stream in streams or sorted(self.queues, key=work_before):
            queue, self.queues[stream] = self.queues[stream], []
            for one in queue:
                if type(one) is not Freed:
                    one()
                    self.ran[stream] += 1
                elif not self.give_away(one):
                    waiting.append(one)
        for one in waiting:
            if not self.give_away(one):
                self.queues[one.block.stream].append(one)

    def give_away(self, freed: Freed) -> bool:
        if any(self.ran[stream] < count for stream, count in freed.others.items()):
            return False
        freed.block.given_away = True
        return True


@dataclass
class LateContext(StubContext):
    """Its memory comes from the hostile allocator; a capture knows its stream."""

    driver: LateDriver

    def capturing(self) -> bool:
        return self.handle in self.driver.graphs

    def _refuse(self, what: str) -> None:
        assert not self.driver.graphs, f"{what} in a capture ends it"

    def upload(self, array: np.ndarray) -> tuple[np.ndarray, int]:
        self._refuse("a copy from the host")
        self.calls["upload"] += 1
        raw = self.driver.allocate(array.nbytes, self.handle, f"upload {self.calls['upload']}")
        there = raw.view(array.dtype).reshape(array.shape)
        there[...] = array
        self.driver.finish(self.handle)  # a copy from memory that is not pinned waits
        return there, there.ctypes.data

    def download(self, owner: np.ndarray) -> np.ndarray:
        self._refuse("a copy to the host")
        self.calls["download"] += 1
        self.driver.finish()
        return owner.copy()

    def write(self, owner: np.ndarray, array: np.ndarray) -> None:
        self._refuse("a copy from the host")
        self.driver.finish()
        owner[...] = array

    def wait(self) -> None:
        self._refuse("waiting")
        self.calls["wait"] += 1
        self.driver.finish()

    def defer_reuse(self, owners: Iterable[Any]) -> bool:
        assert not self.capturing()
        self.calls["defer_reuse"] += 1
        everything = True
        for owner in owners:
            tensor = isinstance(owner, torch.Tensor)
            address = owner.untyped_storage().data_ptr() if tensor else owner.ctypes.data
            block = self.driver.of(address)
            if block is not None and block.stream == PINNED:
                everything = False
            elif block is not None:
                block.noted.add(self.handle)
        return everything


@dataclass
class Late:
    """The hostile device, and tensors on it."""

    stub: StubGpu
    driver: LateDriver
    context: LateContext

    def tensor(
        self, values: torch.Tensor, what: str = "weights", stream: int | None = None
    ) -> torch.Tensor:
        size = values.numel() * values.element_size()
        raw = self.driver.allocate(size, self.context.handle if stream is None else stream, what)
        there = torch.from_numpy(raw).view(values.dtype).view(values.shape)
        return there.copy_(values)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.tensor(torch.randn(shape).to(dtype))

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """``torch.cuda.stream(...)``."""
        before, self.context.handle = self.context.handle, stream
        try:
            yield
        finally:
            self.context.handle = before

    @contextmanager
    def capture(self, stream: int = 900) -> Iterator[list[Any]]:
        """``torch.cuda.graph(...)``."""
        graph: list[Any] = []
        with self.on(stream):
            self.driver.graphs[stream] = graph
            try:
                yield graph
            finally:
                del self.driver.graphs[stream]

    def replay(self, graph: list[Any]) -> None:
        for job in graph:
            self.driver.begin(self.context.handle, job)

    def settle(self) -> None:
        """Everything that is no longer needed is freed, all work done; nothing went wrong."""
        gc.collect()
        self.driver.finish()
        self.driver.finish()
        assert self.driver.violations == []


@pytest.fixture
def late(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> Late:
    driver = LateDriver()
    gpu.driver = driver
    gpu.contexts = {index: LateContext(index, driver) for index in range(2)}
    found = Late(gpu, driver, gpu.contexts[0])

    def zeros(length: int, code: str, device: str) -> torch.Tensor:
        values = torch.zeros(length, dtype=bridge.native(code))
        if device == "cpu":
            gpu.on_host[values.untyped_storage().data_ptr()] = values
            return values
        if device == "pinned":
            ring = found.tensor(values, "a ring", PINNED)
            gpu.on_host[ring.untyped_storage().data_ptr()] = values  # its address, not the ring
            return ring
        return found.tensor(values, "an average")

    monkeypatch.setattr(bridge, "zeros", zeros)
    monkeypatch.setattr(engine, "_driver", lambda: driver)
    return found
