"""A stub GPU that runs its launches late and reuses freed memory early.

It is as hostile as the rules of CUDA and of PyTorch's allocator allow. Launches wait in one queue
per stream, and queues run in any order. Freed memory is reused in stream order on the stream that
allocated it, once the streams recorded for it have finished the work queued before the free. A
launch that touches reused memory is a violation.
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
"""Stream handles."""

PINNED = -1
"""Stands for a stream: pinned host memory is reused at once."""


@dataclass(eq=False)
class Block:
    """A block of device memory."""

    label: str
    address: int
    nbytes: int
    stream: int
    recorded_streams: set[int] = field(default_factory=set)
    reused: bool = False


@dataclass(eq=False)
class Freed:
    """A free in a stream's queue: its block is reused once other streams have run enough jobs."""

    block: Block
    others: dict[int, int]


@dataclass
class LateDriver(StubDriver):
    """A driver whose streams lag behind the host by any amount."""

    late: bool = False
    blocks: list[Block] = field(default_factory=list)
    memory: list[Any] = field(default_factory=list)  # never freed: stale addresses are safe
    queues: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))
    queued: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    completed: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    graphs: dict[int, list[Any]] = field(default_factory=dict)  # of streams under capture
    violations: list[str] = field(default_factory=list)

    def allocate(self, nbytes: int, stream: int, what: str) -> np.ndarray:
        """Allocate bytes that are freed when their last reference is dropped."""
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
        others = {stream: self.queued[stream] for stream in block.recorded_streams - {block.stream}}
        self.queues[block.stream].append(Freed(block, others))
        if not self.late:
            self.finish()

    def block_at(self, address: int) -> Block | None:
        return next((b for b in self.blocks if b.address <= address < b.address + b.nbytes), None)

    def touched_addresses(self, values: Sequence[Any]) -> Iterator[int]:
        """Yield the addresses that a launch touches; read a table only after its address."""
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
            for address in self.touched_addresses(values):
                block = self.block_at(address)
                if block is not None and block.reused:
                    self.violations.append(f"{name} touches {block.label}, which is reused")
                    return
            kernel(*values)

        return job

    def launch(self, key: Key, blocks: int, threads: int, stream: int, parameters: int) -> None:
        self.pending = []
        try:
            super().launch(key, blocks, threads, stream, parameters)
            for job in self.pending:
                self.enqueue(stream, job)
        finally:
            self.pending = None

    def enqueue(self, stream: int, job: Callable[[], None]) -> None:
        """Queue a job on a stream, or record it in the stream's graph."""
        if stream in self.graphs:
            self.graphs[stream].append(job)
            return
        self.queues[stream].append(job)
        self.queued[stream] += 1
        if not self.late:
            self.finish()

    def finish(self, *streams: int) -> None:
        """Run the jobs of all streams or the given ones; reuse freed memory as soon as allowed."""

        def work_before(stream: int) -> int:
            freed = [k for k, one in enumerate(self.queues[stream]) if type(one) is Freed]
            return freed[0] if freed else 1 << 30

        for stream, queue in self.queues.items():  # first, frees without jobs before
            count = next((k for k, one in enumerate(queue) if type(one) is not Freed), len(queue))
            self.queues[stream] = [f for f in queue[:count] if not self.try_reuse(f)]
            self.queues[stream] += queue[count:]
        waiting: list[Freed] = []
        for stream in streams or sorted(self.queues, key=work_before):
            queue, self.queues[stream] = self.queues[stream], []
            for one in queue:
                if type(one) is not Freed:
                    one()
                    self.completed[stream] += 1
                elif not self.try_reuse(one):
                    waiting.append(one)
        for one in waiting:
            if not self.try_reuse(one):
                self.queues[one.block.stream].append(one)

    def try_reuse(self, freed: Freed) -> bool:
        if any(self.completed[stream] < count for stream, count in freed.others.items()):
            return False
        freed.block.reused = True
        return True


@dataclass
class LateContext(StubContext):
    """A context whose memory comes from the hostile allocator and whose captures have streams."""

    driver: LateDriver

    def capturing(self) -> bool:
        return self.handle in self.driver.graphs

    def _refuse_in_capture(self, what: str) -> None:
        assert not self.driver.graphs, f"{what} is illegal during a capture"

    def upload(self, array: np.ndarray) -> tuple[np.ndarray, int]:
        self._refuse_in_capture("a copy from the host")
        self.calls["upload"] += 1
        raw = self.driver.allocate(array.nbytes, self.handle, f"upload {self.calls['upload']}")
        there = raw.view(array.dtype).reshape(array.shape)
        there[...] = array
        self.driver.finish(self.handle)  # a copy from pageable memory waits
        return there, there.ctypes.data

    def download(self, owner: np.ndarray) -> np.ndarray:
        self._refuse_in_capture("a copy to the host")
        self.calls["download"] += 1
        self.driver.finish()
        return owner.copy()

    def write(self, owner: np.ndarray, array: np.ndarray) -> None:
        self._refuse_in_capture("a copy from the host")
        self.driver.finish()
        owner[...] = array

    def wait(self) -> None:
        self._refuse_in_capture("waiting")
        self.calls["wait"] += 1
        self.driver.finish()

    def defer_reuse(self, owners: Iterable[Any]) -> bool:
        assert not self.capturing()
        self.calls["defer_reuse"] += 1
        everything = True
        for owner in owners:
            tensor = isinstance(owner, torch.Tensor)
            address = owner.untyped_storage().data_ptr() if tensor else owner.ctypes.data
            block = self.driver.block_at(address)
            if block is not None and block.stream == PINNED:
                everything = False
            elif block is not None:
                block.recorded_streams.add(self.handle)
        return everything


@dataclass
class LateGpu:
    """The hostile device, with tensors on it."""

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
        """Stand in for ``torch.cuda.stream(...)``."""
        before, self.context.handle = self.context.handle, stream
        try:
            yield
        finally:
            self.context.handle = before

    @contextmanager
    def capture(self, stream: int = 900) -> Iterator[list[Any]]:
        """Stand in for ``torch.cuda.graph(...)``."""
        graph: list[Any] = []
        with self.on(stream):
            self.driver.graphs[stream] = graph
            try:
                yield graph
            finally:
                del self.driver.graphs[stream]

    def replay(self, graph: list[Any]) -> None:
        for job in graph:
            self.driver.enqueue(self.context.handle, job)

    def assert_no_violations(self) -> None:
        """Collect garbage, finish all work, and assert that no launch touched reused memory."""
        gc.collect()
        self.driver.finish()
        self.driver.finish()
        assert self.driver.violations == []


@pytest.fixture
def late(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> LateGpu:
    driver = LateDriver()
    gpu.driver = driver
    gpu.contexts = {index: LateContext(index, driver) for index in range(2)}
    found = LateGpu(gpu, driver, gpu.contexts[0])

    def zeros(length: int, code: str, device: str) -> torch.Tensor:
        values = torch.zeros(length, dtype=bridge.native(code))
        if device == "cpu":
            gpu.on_host[values.untyped_storage().data_ptr()] = values
            return values
        if device == "pinned":
            ring = found.tensor(values, "a ring", PINNED)
            gpu.on_host[ring.untyped_storage().data_ptr()] = values  # no reference to the ring
            return ring
        return found.tensor(values, "an average")

    monkeypatch.setattr(bridge, "zeros", zeros)
    monkeypatch.setattr(engine, "_driver", lambda: driver)
    return found
