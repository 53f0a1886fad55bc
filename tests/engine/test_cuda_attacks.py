"""Attacks on the host's side of CUDA launches: a device that is late, and an allocator that is not.

The driver of `stub_gpu` is made as hostile as the rules of CUDA and of PyTorch's allocator allow.
Launches wait in a queue for each stream, and queues run in any order. Memory that is freed goes to
the next one who asks as soon as the rules let it: at once on the stream that it was allocated on,
after the work on those that were noted with it. A launch that then touches it is a violation.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import signal
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.bridges import torch as bridge
from fastema.engine import cuda as engine
from fastema.engine import cuda_group
from fastema.engine.cubins import Key
from fastema.engine.driver import DriverError
from fastema.errors import DeviceError, StateError
from fastema.kernels import table as abi
from fastema.rules import constant, power, warmup

from ..support.stub_gpu import (
    StubContext,
    StubDriver,
    StubGpu,
    assert_equal,
    gpu,
    move,
    no_kernels,
    shadow,
)

__all__ = ["gpu"]

MAIN, SIDE, THIRD = 77, 78, 79
"""Handles of streams."""

PINNED = -1
"""In the place of a stream: memory of the host is given away at once."""


# -- a hostile device ------------------------------------------------------------------------------


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

    def hold(self, owners: Iterable[Any]) -> bool:
        assert not self.capturing()
        self.calls["hold"] += 1
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


# -- memory that is freed while it is worked on ----------------------------------------------------


@pytest.mark.parametrize("stream", [MAIN, SIDE])
@pytest.mark.parametrize("capturable", [False, True])
def test_weights_that_are_freed_while_an_update_waits_are_averaged(
    late: Late, stream: int, capturable: bool
) -> None:
    model = torch.nn.ParameterList([late.random(40, 7), late.random(5)])
    rule = warmup(0.9)
    ema = fastema.EMA(model, rule, capturable=capturable)
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    late.driver.late = True
    for step in range(1, 4):
        for parameter in model:  # the old memory is anyone's now, but for what waits
            parameter.data = late.random(*parameter.shape)
        for name, parameter in model.named_parameters():
            want[name].lerp_(parameter.detach(), rule.weight(step))
        with late.on(stream):
            ema.update()
    late.settle()
    for name, tensor in want.items():
        torch.testing.assert_close(ema.shadow[name], tensor)


def updates_on_three_streams(late: Late) -> None:
    weights = [late.random(300), late.random(7, 3)]
    ema = fastema.EMA(weights, warmup(0.9))
    late.driver.late = True
    for k in range(6):
        with late.on((MAIN, SIDE, THIRD)[k % 3]):
            ema.update()


def calls_made_once(late: Late) -> None:
    weights = [late.random(300), late.random(7, 3).bfloat16()]
    ema = fastema.EMA(weights, 0.5, shadow_dtype="float32")
    others = [late.random(300), late.random(7, 3).bfloat16()]
    late.driver.late = True
    with late.on(SIDE):
        ema.update()
        ema.copy_to(others)
        fastema.lerp_(others, weights, 0.5)
        ema.load_state_dict(ema.state_dict())


def a_clock_on_another_stream(late: Late) -> None:
    ema = fastema.EMA([late.random(300)], warmup(0.9), capturable=True)
    late.driver.late = True
    with late.on(SIDE):
        ema.update()


def measures_that_are_made_after_the_first_stream_is_known(late: Late) -> None:
    ema = fastema.EMA([late.random(300)], 0.9, drift=True)  # launches a copy on the main stream
    with late.on(SIDE):
        ema.update()
    late.driver.late = True
    ema.update()


def a_ring_on_the_host(late: Late) -> None:
    sma = fastema.SMA([late.random(300), late.random(7, 3)], 3, ring_device="cpu")
    late.driver.late = True
    for stream in (MAIN, SIDE, MAIN):
        with late.on(stream):
            sma.update()


def a_ring_on_the_host_that_is_dropped_in_a_capture(late: Late) -> None:
    sma = fastema.SMA([late.random(300)], 3, ring_device="cpu")
    late.driver.late = True
    sma.update()
    with late.capture():
        del sma
        gc.collect()


@pytest.mark.parametrize(
    "scenario",
    [
        updates_on_three_streams,
        pytest.param(calls_made_once, marks=pytest.mark.slow),
        a_clock_on_another_stream,
        measures_that_are_made_after_the_first_stream_is_known,
        a_ring_on_the_host,
        a_ring_on_the_host_that_is_dropped_in_a_capture,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_memory_that_its_owners_drop_is_kept_until_the_work_on_it_is_done(
    late: Late, scenario: Callable[[Late], None]
) -> None:
    scenario(late)
    late.settle()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_average_in_the_weights_is_taken_back_on_another_stream(
    late: Late, dtype: torch.dtype
) -> None:
    """By a swap, by parking, and with a spare buffer that is dropped at once."""
    weights = {"w": late.tensor(torch.randn(300).to(dtype))}
    ema = fastema.EMA(weights, 0.5, shadow_dtype="float32")
    move(weights.values())
    ema.update()
    raw, average = weights["w"].clone(), shadow(ema)
    late.driver.late = True
    with late.on(SIDE):
        ema.apply_shadow()
    late.driver.finish()  # the caller's streams wait for each other
    assert not torch.equal(weights["w"], raw)
    with late.on(THIRD):
        ema.restore()
    late.settle()
    assert torch.equal(weights["w"], raw)
    assert_equal(shadow(ema), average)


def test_an_average_is_freed_with_its_last_name(late: Late) -> None:
    """Its memory on a GPU is not left to a collection of garbage that may come late."""
    weights = [late.random(5)]
    gc.collect()
    gc.disable()
    try:
        ema = fastema.EMA(weights, (0.5, 0.9), drift=True, capturable=True)
        ema.update()
        with ema.swapped(which=1):
            pass
        assert ema.drifts
        del ema
        assert {block.what for block in late.driver.blocks if not block.given_away} == {"weights"}
    finally:
        gc.enable()


def test_memory_is_held_where_torch_averages_without_kernels(
    late: Late, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "cubin", no_kernels)
    weights = [late.random(5)]
    with pytest.warns(cuda_group.SlowWarning):
        ema = fastema.EMA(weights, 0.5)
    with late.on(SIDE):
        ema.update()
    held = {block.what for block in late.driver.blocks if SIDE in block.noted}
    assert held == {"weights", "an average"}


def test_the_host_waits_before_it_reads_or_drops_a_ring_on_the_host(gpu: StubGpu) -> None:
    weights = [torch.randn(37, 11)]
    sma = fastema.SMA(weights, window=3, ring_device="cpu")
    gpu.driver.pending = []
    for _ in range(5):
        move(weights)
        sma.update()
        gpu.driver.finish()
    sma.update()
    assert gpu.driver.pending
    state = sma.state_dict()
    assert gpu.context.calls["wait"]
    assert torch.equal(state["ring"][0]["0"][5 % 3], weights[0])
    gpu.driver.finish()
    gpu.driver.pending = None
    other = fastema.SMA(weights, window=3, ring_device="cpu")
    other.load_state_dict(state)
    sma.update()
    other.update()
    assert_equal(shadow(sma), shadow(other))
    gpu.context.calls.clear()
    del other, sma
    gc.collect()
    assert gpu.context.calls["wait"] >= 2  # nobody else knows that the device works on that memory


# -- graphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False], ids=["warmed up there", "fresh stream"])
def test_a_graph_outlives_the_tables_it_was_captured_with(late: Late, warm: bool) -> None:
    """The model moves, the average looks again; the graph still has tables, and its old weights."""
    model = torch.nn.ParameterList([late.random(300)])
    ema = fastema.EMA(model, 0.5, capturable=True)
    with late.on(900 if warm else SIDE):
        ema.update()
    with late.capture(900) as graph:
        ema.update()
    old = model[0].data
    model[0].data = late.random(300)
    ema.update()
    gc.collect()
    average = shadow(ema)["0"]
    late.replay(graph)
    assert late.driver.violations == []
    torch.testing.assert_close(ema.shadow["0"], average.lerp(old, 0.5))
    assert ema.num_updates == 3


def test_a_graph_follows_the_schedule_that_was_loaded(late: Late) -> None:
    """In memory that is the loaded tables'."""
    weights, others = ([late.random(300)] for _ in range(2))
    ema = fastema.EMA(weights, warmup(0.9), capturable=True)
    late.stub.place = lambda tensor: None
    saved = fastema.EMA(others, power(0.1))
    for _ in range(7):
        saved.update()
    state = saved.state_dict()
    late.stub.place = lambda tensor: 0
    ema.update()
    with late.capture() as graph:
        ema.update()
    late.replay(graph)
    ema.load_state_dict(state)
    gc.collect()
    want = shadow(ema)["0"]
    for step in range(8, 58):
        move(weights)
        want.lerp_(weights[0], saved.schedule.weights(step)[0])
        late.replay(graph)
    torch.testing.assert_close(ema.shadow["0"], want)
    assert ema.num_updates == 57
    assert ema.schedule == saved.schedule
    late.settle()


@pytest.mark.slow
def test_replays_of_an_average_that_was_moved_do_not_write_where_others_are(late: Late) -> None:
    weights = [late.random(300)]
    ema = fastema.EMA(weights, 0.5, capturable=True)
    ema.update()
    with late.capture() as graph:
        ema.update()
    ema.to(dtype="float64")
    gc.collect()
    late.driver.finish()
    late.replay(graph)
    assert late.driver.violations == []
    assert ema.num_updates == 1


def test_drift_is_that_of_the_latest_replay(late: Late) -> None:
    weights = [late.random(300)]
    ema = fastema.EMA(weights, 0.5, drift=True, capturable=True)
    ema.update()
    with late.capture() as graph:
        ema.update()
    for _ in range(3):
        move(weights)
        late.replay(graph)
        apart = weights[0].double() - ema.shadow["0"].double()
        assert ema.drift.distance == pytest.approx(float(apart.square().sum()) ** 0.5, rel=1e-5)


def test_replays_leave_out_what_is_not_finite_as_a_run_on_the_cpu_does(late: Late) -> None:
    options = {"decay": [warmup(0.9), *(0.9,) * 9], "start_after": 2, "update_every": 2}
    weights = [late.random(300), late.random(7).bfloat16()]
    mask = late.tensor(torch.tensor([float("-inf"), 1.0]), "a mask")
    model = torch.nn.ParameterList(weights)
    model.register_buffer("mask", mask)
    ema = fastema.EMA(model, capturable=True, on_nonfinite="skip", **options)
    late.stub.place = lambda tensor: None
    there = copy.deepcopy(model)
    want = fastema.EMA(there, on_nonfinite="skip", **options)
    late.stub.place = lambda tensor: 0
    ema.update()
    want.update()
    with late.capture() as graph:
        ema.update()
    late.context.calls.clear()
    generator = np.random.default_rng(4)
    for _ in range(40):
        move(model.parameters())
        if generator.random() < 0.6:
            model[int(generator.integers(2))].data.view(-1)[3] = generator.choice([np.nan, np.inf])
        there.load_state_dict(model.state_dict())
        late.replay(graph)
        late.stub.place = lambda tensor: None
        want.update()
        late.stub.place = lambda tensor: 0
        for parameter in model.parameters():
            parameter.data.nan_to_num_(0.5, 0.5, 0.5)
    assert not late.context.calls  # nothing was asked of the device, nothing waited
    assert (ema.num_updates, ema.num_skipped) == (want.num_updates, want.num_skipped)
    assert ema.num_skipped > 3
    for got, expected in zip(ema.shadows, want.shadows, strict=True):
        assert_equal(dict(got), dict(expected))
    state = ema.state_dict()
    assert state["num_skipped"] == want.num_skipped
    resumed = fastema.EMA(model, capturable=True, on_nonfinite="skip", **options)
    resumed.load_state_dict(state)
    assert resumed.num_skipped == want.num_skipped
    assert resumed.to(dtype="float64").num_skipped == want.num_skipped


def test_weights_that_were_not_finite_before_the_first_update_leave_none_out(late: Late) -> None:
    weights = [late.tensor(torch.tensor([float("nan"), 1.0]))]
    ema = fastema.EMA(weights, 0.5, capturable=True, on_nonfinite="skip")
    weights[0][0] = 2.0
    ema.update()
    assert (ema.num_updates, ema.num_skipped) == (1, 0)


def test_a_capture_after_the_model_moved_is_refused_until_one_call_outside(late: Late) -> None:
    model = torch.nn.ParameterList([late.random(300)])
    ema = fastema.EMA(model, 0.5, capturable=True)
    model[0].data = late.random(300)
    before = shadow(ema)
    with late.capture() as graph, pytest.raises(StateError, match="before this stream was capt"):
        ema.update()
    assert graph == []
    assert ema.num_updates == 0
    assert_equal(before, shadow(ema))
    ema.update()
    with late.capture() as graph:
        ema.update()
    assert len(graph) == 2
    assert ema.num_updates == 1


def test_weights_and_average_change_places_and_back_in_one_graph(late: Late) -> None:
    weights = [late.random(300)]
    ema = fastema.EMA(weights, 0.5)
    move(weights)
    ema.update()
    with ema.swapped():
        pass
    raw, average = weights[0].clone(), shadow(ema)
    seen: list[torch.Tensor] = []
    with late.capture() as graph, ema.swapped():
        late.driver.begin(late.context.handle, lambda: seen.append(weights[0].clone()))
    for _ in range(2):
        late.replay(graph)
        assert torch.equal(seen.pop(), average["0"])
        assert torch.equal(weights[0], raw)
        assert_equal(average, shadow(ema))
    late.settle()


@pytest.mark.parametrize(
    "call", [lambda ema: ema.shadow["0"], fastema.EMA.apply_shadow], ids=["shadow", "apply"]
)
def test_what_is_copied_until_a_start_is_not_captured(
    late: Late, call: Callable[[fastema.EMA], object]
) -> None:
    """A replay would overwrite the average with the weights at every step of the run."""
    weights = [late.random(30)]
    ema = fastema.EMA(weights, 0.5, start_after=2)
    ema.update()
    with ema.swapped():
        pass
    with late.capture() as graph, pytest.raises(StateError):
        call(ema)
    assert graph == []


REPLAYED: list[dict[str, Any]] = [
    {"decay": warmup(0.999), "start_after": 3, "update_every": 2},
    {"decay": warmup(0.9), "start_after": 3, "shadow_dtype": "bfloat16"},
    {"decay": (constant(0.9), power(0.1)), "start_after": 5, "update_every": 2},
    {"start_after": 2, "shadow_dtype": "bfloat16", "rounding": "nearest", "drift": True},
    {"decay": warmup(0.9), "start_after": 1, "shadow_dtype": "bf16+16", "update_every": 3},
]


@pytest.mark.parametrize(
    "options",
    [*REPLAYED[:3], *(pytest.param(one, marks=pytest.mark.slow) for one in REPLAYED[3:])],
    ids=str,
)
def test_every_replay_is_an_update_of_a_run_on_the_cpu_to_the_bit(
    late: Late, options: dict[str, Any]
) -> None:
    """Before the start, at it, and long after, where weights come from polynomials."""
    weights = [late.random(500)]
    others = [weights[0].clone()]
    ema = fastema.EMA(weights, seed=2**62 + 3, capturable=True, **options)
    late.stub.place = lambda tensor: None
    twin = fastema.EMA(others, seed=2**62 + 3, **options)
    late.stub.place = lambda tensor: 0
    with late.capture() as graph:
        ema.update()
    for step in range(1, 201):
        move(weights)
        others[0].copy_(weights[0])
        late.replay(graph)
        late.stub.place = lambda tensor: None
        twin.update()
        want = [dict(one) for one in twin.shadows] if step < 20 or step % 20 == 0 else []
        late.stub.place = lambda tensor: 0
        for found, one in zip(ema.shadows, want, strict=False):
            assert_equal(found, one)
        assert not want or ema.num_updates == step


@pytest.mark.slow
def test_a_windowed_mean_at_its_start_is_the_weights(late: Late) -> None:
    """Not what a narrower ring has of them."""
    weights = [late.random(50)]
    sma = fastema.SMA(weights, 3, ring_dtype="bfloat16", start_after=2, capturable=True)
    for _ in range(2):
        move(weights)
        sma.update()
    assert torch.equal(sma.shadow["0"], weights[0])


@pytest.mark.parametrize("place", [1, None], ids=["another GPU", "the host"])
def test_a_capture_of_half_a_model_is_refused(late: Late, place: int | None) -> None:
    """The other half would be averaged now, once, and never by a replay."""
    weights, average = ([late.random(30), late.random(30)] for _ in range(2))
    elsewhere = {weights[1].data_ptr(), average[1].data_ptr()}
    late.stub.place = lambda tensor: place if tensor.data_ptr() in elsewhere else 0
    late.stub.contexts[1].handle = SIDE
    plan = fastema.Plan(average, weights)
    plan.lerp_(0.5)
    before = [one.clone() for one in average]
    with late.capture() as graph, pytest.raises(StateError):
        plan.lerp_(0.5)
    assert graph == []
    assert all(map(torch.equal, before, average))


def test_a_state_is_loaded_after_the_replays_that_wait(late: Late) -> None:
    weights = [late.random(300)]
    ema = fastema.EMA(weights, 0.5, capturable=True)
    ema.update()
    state = ema.state_dict()
    with late.capture() as graph:
        ema.update()
    late.driver.late = True
    move(weights)
    with late.on(SIDE):
        late.replay(graph)
    ema.load_state_dict(state)
    late.settle()
    assert ema.num_updates == 1
    assert_equal(shadow(ema), state["shadow"][0])


# -- exceptions ------------------------------------------------------------------------------------


def test_an_average_that_cannot_be_moved_stays_as_it_was(
    late: Late, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [late.random(30)]
    ema = fastema.EMA(weights, 0.5, capturable=True)
    ema.update()
    found = late.driver.function

    def refused(code: bytes, name: str) -> Key:
        if "lerp" in name:
            raise DriverError("CUDA_ERROR_NOT_FOUND")
        return found(code, name)

    count, store = ema._count, ema._store
    with monkeypatch.context() as patch:
        patch.setattr(late.driver, "function", refused)
        with pytest.raises(DeviceError, match="NOT_FOUND"):
            ema.to(dtype="float64")
    assert ema._count is count
    assert ema._store is store


@pytest.mark.slow
@pytest.mark.parametrize("capturable", [False, True])
def test_an_interrupt_waits_for_the_launches_of_all_groups_and_the_clock(
    late: Late, capturable: bool
) -> None:
    weights = [late.random(30), late.random(30).bfloat16(), late.random(3).double()]
    ema = fastema.EMA(weights, 0.5, capturable=capturable)
    ema.update()
    late.driver.take()
    launch = late.driver.launch

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return launch(*arguments)

    late.driver.launch = interrupted  # type: ignore[method-assign]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            ema.update()
    finally:
        signal.signal(signal.SIGINT, handler)
    late.driver.launch = launch  # type: ignore[method-assign]
    assert len(late.driver.take()) == 3 + capturable
    assert ema.num_updates == 2


HANDLERS = """
    import faulthandler, os, signal, sys
    faulthandler.dump_traceback_later(50, exit=True)
    import numpy as np
    from fastema.engine import cuda as engine
    from fastema.engine.program import Program
    from fastema.layout.group import Pair
    from fastema.layout.spec import TensorSpec
    from tests.support.stub_gpu import StubDriver, StubContext, compiled

    driver = StubDriver()
    home = StubContext(0, driver)
    engine._driver = lambda: driver

    def program():
        arrays = [np.ones(3, np.float32) for _ in range(2)]
        specs = [TensorSpec(a.ctypes.data, (3,), (1,), "f32", "cuda:0", owner=a, context=home)
                 for a in arrays]
        return Program({"all": [Pair("w", *specs)]})

    one, other = program(), program()

    def save(*_):
        other.run({"all": "copy"})
        one.run({"all": "copy"})
        print("saved")

    wanted = getattr(signal, sys.argv[1])
    signal.signal(wanted, save)

    def slow(key):
        if key.operation == "lerp":
            os.kill(os.getpid(), wanted)
        return compiled(key)

    engine.cubin = slow
    launch = driver.launch

    def interrupted(key, *rest):
        if key.operation == "lerp":
            os.kill(os.getpid(), wanted)
        return launch(key, *rest)

    driver.launch = interrupted
    one.run({"all": "lerp"})
    print("done")
"""


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_handler_that_saves_does_not_wait_for_itself(
    name: str, python: Callable[..., str]
) -> None:
    """It comes while a kernel is compiled, and again while it is launched."""
    assert python(HANDLERS, name, timeout=60.0).split() == ["saved", "saved", "done"]
