"""Attacks on the host's side of CUDA launches: a device that is late, and an allocator that is not.

The driver of `stub_gpu` is made as hostile as the rules of CUDA and of PyTorch's allocator allow.
Launches wait in a queue for each stream, and queues run in any order. Memory that is freed goes to
the next one who asks as soon as the rules let it: at once on the stream that it was allocated on,
after the work on those that were noted with it. A launch that then touches it is a violation.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastema
from fastema.bridges import torch as bridge
from fastema.bridges.torch_cuda import TorchContext
from fastema.bridges.torch_foreach import substitute
from fastema.engine import cuda as engine
from fastema.engine import cuda_group
from fastema.engine.cubins import CLOCK, Key, Unavailable
from fastema.engine.program import Program
from fastema.errors import DeviceError, DTypeError, FastemaError, StateError
from fastema.kernels import table as abi
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec
from fastema.rules import power, warmup

from ..support.stub_gpu import StubContext, StubDriver, StubGpu, compiled, gpu

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

    def cuLaunchKernel(self, key: Key, *rest: int) -> tuple[Any, ...]:
        self.pending = []
        try:
            answer = super().cuLaunchKernel(key, *rest)
            stream = rest[7]
            for job in self.pending:
                self.begin(stream, job)
        finally:
            self.pending = None
        return answer

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


def shadow(average: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in average.shadow.items()}


def assert_same(one: Any, other: Any) -> None:
    assert dict(one).keys() == dict(other).keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def move(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.mul_(0.9).add_(torch.randn(tensor.shape).to(tensor.dtype))


# -- memory that is freed while it is worked on ----------------------------------------------------


@pytest.mark.parametrize("stream", [MAIN, SIDE])
@pytest.mark.parametrize("capturable", [False, True])
def test_weights_are_freed_while_an_update_waits(late: Late, stream: int, capturable: bool) -> None:
    model = torch.nn.ParameterList([late.random(40, 7), late.random(5)])
    ema = fastema.EMA(model, 0.5, capturable=capturable)
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    late.driver.late = True
    for _ in range(3):
        for parameter in model:  # the old memory is anyone's now, but for what waits
            parameter.data = late.random(*parameter.shape)
        for name, parameter in model.named_parameters():
            want[name].lerp_(parameter.detach(), 0.5)
        with late.on(stream):
            ema.update()
    late.settle()
    for name, tensor in want.items():
        torch.testing.assert_close(ema.shadow[name], tensor)


def test_two_streams_in_turn_and_then_nothing_is_left(late: Late) -> None:
    """The average and its weights go while both streams still work on them."""
    weights = [late.random(300), late.random(7, 3)]
    ema = fastema.EMA(weights, warmup(0.9))
    late.driver.late = True
    for k in range(6):
        with late.on((MAIN, SIDE, THIRD)[k % 3]):
            ema.update()
    del ema, weights
    late.settle()


@pytest.mark.slow
@pytest.mark.full
def test_tables_of_calls_that_are_made_once(late: Late) -> None:
    """Their programs are gone before the device begins."""
    weights = [late.random(300), late.random(7, 3).bfloat16()]
    ema = fastema.EMA(weights, 0.5, shadow_dtype="float32")
    others = [late.random(300), late.random(7, 3).bfloat16()]
    late.driver.late = True
    with late.on(SIDE):
        ema.update()
        ema.copy_to(others)
        fastema.lerp_(others, weights, 0.5)
        state = ema.state_dict()
        ema.load_state_dict(state)
        del state
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
def test_an_average_is_taken_back_on_another_stream(late: Late, dtype: torch.dtype) -> None:
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
    assert_same(shadow(ema), average)


def test_a_clock_is_not_given_away_while_a_stream_advances_it(late: Late) -> None:
    weights = [late.random(300)]
    ema = fastema.EMA(weights, warmup(0.9), capturable=True)
    late.driver.late = True
    with late.on(SIDE):
        ema.update()
    del ema
    late.settle()


def test_measures_are_not_given_away_while_a_stream_writes_them(late: Late) -> None:
    """They are made after the first stream is known, on another one."""
    weights = [late.random(300)]
    ema = fastema.EMA(weights, 0.9, drift=True)  # launches a copy on the main stream
    with late.on(SIDE):
        ema.update()
    late.driver.late = True
    ema.update()
    del ema, weights
    late.settle()


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


def test_a_graph_goes_on_after_loading(late: Late) -> None:
    """With the loaded schedule, in memory that is the loaded tables'."""
    weights, others = ([late.random(300)] for _ in range(2))
    others[0].copy_(weights[0])
    ema = fastema.EMA(weights, warmup(0.9), capturable=True)
    late.stub.place = lambda tensor: None
    saved = fastema.EMA(others, power(0.1))
    for _ in range(7):
        move(others)
        saved.update()
    state = saved.state_dict()
    late.stub.place = lambda tensor: 0
    ema.update()
    with late.capture() as graph:
        ema.update()
    for _ in range(3):
        late.replay(graph)
    ema.load_state_dict(state)
    gc.collect()
    torch.manual_seed(1)
    for _ in range(50):
        move(weights)
        late.replay(graph)
    late.stub.place = lambda tensor: None
    torch.manual_seed(1)
    others[0].copy_(others[0])
    for _ in range(50):
        move(others)
    assert ema.num_updates == 57
    assert ema.schedule == saved.schedule
    late.settle()


@pytest.mark.slow
def test_a_graph_of_an_average_that_was_moved(late: Late) -> None:
    """Its replays no longer count, but they must not write where others are now."""
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
        left = weights[0].double() - ema.shadow["0"].double()
        assert ema.drift.distance == pytest.approx(float(left.square().sum()) ** 0.5, rel=1e-5)


def test_a_capture_after_the_model_moved(late: Late) -> None:
    """It is refused, without a step, and works after one call outside."""
    model = torch.nn.ParameterList([late.random(300)])
    ema = fastema.EMA(model, 0.5, capturable=True)
    model[0].data = late.random(300)
    before = shadow(ema)
    with late.capture() as graph, pytest.raises(StateError, match="before this stream was capt"):
        ema.update()
    assert graph == []
    assert ema.num_updates == 0
    assert_same(before, shadow(ema))
    ema.update()
    with late.capture() as graph:
        ema.update()
    assert len(graph) == 2
    assert ema.num_updates == 1


def test_a_captured_swap(late: Late) -> None:
    """Weights and average change places, and back, inside one graph."""
    weights = [late.random(300)]
    ema = fastema.EMA(weights, 0.5)
    move(weights)
    ema.update()
    with ema.swapped():
        pass
    raw, average = weights[0].clone(), shadow(ema)
    with late.capture() as graph, ema.swapped():
        late.driver.begin(late.context.handle, lambda: seen.append(weights[0].clone()))
    seen: list[torch.Tensor] = []
    for _ in range(2):
        late.replay(graph)
        assert torch.equal(seen.pop(), average["0"])
        assert torch.equal(weights[0], raw)
        assert_same(average, shadow(ema))
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
    for _ in range(4):
        move(weights)
        ema.update()
    before = shadow(ema)
    late.replay(graph)
    assert_same(before, shadow(ema))


@pytest.mark.parametrize(
    "options",
    [
        {"start_after": 3, "update_every": 2},
        {"start_after": 3, "shadow_dtype": "bfloat16"},
        pytest.param(
            {"start_after": 2, "shadow_dtype": "bfloat16", "rounding": "nearest", "drift": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"start_after": 1, "shadow_dtype": "bf16+16", "update_every": 3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_every_step_of_a_capturable_run(late: Late, options: dict[str, Any]) -> None:
    """Before the start, at it, and after: to the bit what a run on the CPU gives."""
    weights, others = [late.random(500)], [torch.empty(500)]
    others[0].copy_(weights[0])
    ema = fastema.EMA(weights, warmup(0.9), seed=2**62 + 3, capturable=True, **options)
    late.stub.place = lambda tensor: None
    twin = fastema.EMA(others, warmup(0.9), seed=2**62 + 3, **options)
    late.stub.place = lambda tensor: 0
    with late.capture() as graph:
        ema.update()
    for step in range(1, 9):
        move(weights)
        others[0].copy_(weights[0])
        late.replay(graph)
        late.stub.place = lambda tensor: None
        twin.update()
        want = shadow(twin)
        late.stub.place = lambda tensor: 0
        assert torch.equal(ema.shadow["0"], want["0"]), step
        assert ema.num_updates == step


@pytest.mark.slow
@pytest.mark.full
def test_a_windowed_mean_at_its_start(late: Late) -> None:
    """There it is the weights, not what a narrower ring has of them."""
    weights = [late.random(50)]
    sma = fastema.SMA(weights, 3, ring_dtype="bfloat16", start_after=2, capturable=True)
    for _ in range(2):
        move(weights)
        sma.update()
    assert torch.equal(sma.shadow["0"], weights[0])


def test_a_capture_of_half_a_model_is_refused(late: Late) -> None:
    """The other half would be averaged now, once, and never by a replay."""
    first = late.random(30)
    second = late.random(30)
    contexts = late.stub.contexts
    places = {first.data_ptr(): 0, second.data_ptr(): 1}
    late.stub.place = lambda tensor: places.get(tensor.data_ptr(), 0)
    avg = [late.random(30), late.random(30)]
    places[avg[1].data_ptr()] = 1
    contexts[1].handle = SIDE
    plan = fastema.Plan(avg, [first, second])
    plan.lerp_(0.5)
    before = [one.clone() for one in avg]
    with late.capture() as graph, pytest.raises(StateError):
        plan.lerp_(0.5)
    assert graph == []
    assert all(map(torch.equal, before, avg))


def test_a_state_is_loaded_while_a_replay_waits(late: Late) -> None:
    """As one is saved: after all work, so that weights and counters are of one step."""
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
    assert_same(shadow(ema), state["shadow"][0])


# -- rings in the memory of the host ---------------------------------------------------------------


def test_a_ring_on_the_host_outlives_what_waits(late: Late) -> None:
    """Nobody notes that a kernel works on it."""
    weights = [late.random(300), late.random(7, 3)]
    sma = fastema.SMA(weights, 3, ring_device="cpu")
    late.driver.late = True
    for stream in (MAIN, SIDE, MAIN):
        with late.on(stream):
            sma.update()
    del sma, weights
    late.settle()


def test_a_ring_on_the_host_is_dropped_in_a_capture(late: Late) -> None:
    """Where nobody may wait for the device."""
    weights = [late.random(300)]
    sma = fastema.SMA(weights, 3, ring_device="cpu")
    late.driver.late = True
    sma.update()
    with late.capture():
        del sma
        gc.collect()
    late.settle()


@pytest.mark.slow
def test_a_ring_stays_on_the_host_where_an_average_moves(gpu: StubGpu) -> None:
    """To a GPU that has no room for it, too."""
    gpu.place = lambda tensor: None
    weights = [torch.randn(50)]
    sma = fastema.SMA(weights, 3, ring_device="cpu")
    for _ in range(5):
        move(weights)
        sma.update()
    before, ring = shadow(sma), sma.state_dict()["ring"][0]["0"].clone()
    gpu.place = lambda tensor: 0
    gpu.on_host.update({t.untyped_storage().data_ptr(): t for t in sma.shadow.values()})
    sma.to("cuda:0")
    found = sma.state_dict()
    assert_same(before, found["shadow"][0])
    assert torch.equal(found["ring"][0]["0"], ring)
    assert sma._store.on_host
    assert not any(tensor.data_ptr() in gpu.context.pinned for tensor in sma.shadow.values())
    assert sma._store.sets[0]["0"].parts["ring"][0].data_ptr() in gpu.context.pinned


def test_a_ring_on_the_host_without_kernels() -> None:
    """Torch's functions have their operands on one device: looked at with tensors without data."""
    with FakeTensorMode():
        avg, x, rest = (torch.empty(5, 7, device="cuda") for _ in range(3))
        ring = torch.empty(3, 5, 7)
        spec = TensorSpec(64, (5, 7), (7, 1), "f32", "cuda:0")
        specs = [replace(spec, owner=owner) for owner in (avg, x, rest, ring)]
        pair = Pair("w", *specs[:2], residual=specs[2], ring=(specs[3], 140))
        run = substitute("window", [pair])
        for turn in (1, 2, 5):
            run(LaunchArgs((float(min(turn, 3)),), 0, 0, 3, (turn - 1) % 3, turn))


# -- exceptions ------------------------------------------------------------------------------------


def test_moving_an_average_fails_as_a_whole(late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before goes on counting and averaging."""
    weights = [late.random(30)]
    ema = fastema.EMA(weights, 0.5, capturable=True)
    ema.update()

    found = late.driver.cuModuleGetFunction

    def refused(module: int, name: bytes) -> tuple[Any, ...]:
        if b"lerp" in name:
            return SimpleNamespace(name="CUDA_ERROR_NOT_FOUND"), None
        return found(module, name)

    count, store = ema._count, ema._store
    with monkeypatch.context() as patch:
        patch.setattr(late.driver, "cuModuleGetFunction", refused)
        with pytest.raises(DeviceError, match="NOT_FOUND"):
            ema.to(dtype="float64")
    assert ema._count is count
    assert ema._store is store


@pytest.mark.slow
@pytest.mark.parametrize("capturable", [False, True])
def test_an_interrupt_waits_for_all_launches(late: Late, capturable: bool) -> None:
    """Of three groups, and of the clock."""
    weights = [late.random(30), late.random(30).bfloat16(), late.random(3).double()]
    ema = fastema.EMA(weights, 0.5, capturable=capturable)
    ema.update()
    late.driver.take()
    launch = late.driver.cuLaunchKernel

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return launch(*arguments)

    late.driver.cuLaunchKernel = interrupted  # type: ignore[method-assign]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            ema.update()
    finally:
        signal.signal(signal.SIGINT, handler)
    late.driver.cuLaunchKernel = launch  # type: ignore[method-assign]
    assert len(late.driver.take()) == 3 + capturable
    assert ema.num_updates == 2


HANDLERS = """
    import faulthandler, os, signal, sys
    faulthandler.dump_traceback_later(10, exit=True)
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
    launch = driver.cuLaunchKernel

    def interrupted(key, *rest):
        if key.operation == "lerp":
            os.kill(os.getpid(), wanted)
        return launch(key, *rest)

    driver.cuLaunchKernel = interrupted
    one.run({"all": "lerp"})
    print("done")
"""


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_a_handler_that_saves_does_not_wait_for_itself(
    name: str, python: Callable[..., str]
) -> None:
    """It comes while a kernel is compiled, and again while it is launched."""
    assert python(HANDLERS, name, timeout=60.0).split() == ["saved", "saved", "done"]


# -- a driver that refuses -------------------------------------------------------------------------


def test_no_room_for_a_kernel_is_not_an_old_driver(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the memory taken by the model it may work later: nothing slower for good, no advice."""
    full = SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")
    load = gpu.driver.cuModuleLoadData
    monkeypatch.setattr(gpu.driver, "cuModuleLoadData", lambda code: (full, None))
    avg, x = [torch.zeros(3)], [torch.ones(3)]
    plan = fastema.Plan(avg, x)
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY") as caught:
        plan.lerp_(0.5)
    assert "580" not in str(caught.value)
    monkeypatch.setattr(gpu.driver, "cuModuleLoadData", load)
    plan.lerp_(0.5)
    assert gpu.driver.take() == [("lerp", 1, 77)]


def test_the_stream_of_all_threads_is_named(gpu: StubGpu) -> None:
    """Handle 0 is another stream where CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM is set."""
    gpu.context.handle = 0
    fastema.lerp_([torch.zeros(3)], [torch.ones(3)], 0.5)
    ((_, _, stream),) = gpu.driver.take()
    assert stream == 1  # CU_STREAM_LEGACY, under either default


def test_what_cannot_be_compiled_is_tried_once(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt takes the compilers a good part of a second, and guards look at each tensor."""
    tried: list[Key] = []

    def none(key: Key) -> None:
        tried.append(key)
        raise Unavailable("no compiler")

    monkeypatch.setattr(engine, "cubin", none)
    weights = [torch.randn(5) for _ in range(20)]
    with pytest.warns(cuda_group.SlowWarning):
        ema = fastema.EMA(weights, 0.5, on_nonfinite="skip")
    weights[3][1] = torch.nan
    ema.update()
    assert ema.num_skipped == 1
    assert len(tried) == len(set(tried))


def test_a_warning_that_is_an_error_is_one_every_time(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never silently slow: not the second time either."""

    def none(key: Key) -> None:
        raise Unavailable("no compiler")

    monkeypatch.setattr(engine, "cubin", none)
    for _ in range(2):
        with pytest.raises(cuda_group.SlowWarning):
            fastema.EMA([torch.randn(5)], 0.5)


def test_a_capturable_average_needs_all_its_kernels(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so when it is built, not at the first update, which would count all the same."""

    def some(key: Key) -> Any:
        if key.operation == "lerp":
            raise Unavailable("no compiler")
        return compiled(key)

    monkeypatch.setattr(engine, "cubin", some)
    with pytest.warns(cuda_group.SlowWarning), pytest.raises(FastemaError, match="capturable"):
        fastema.EMA([torch.randn(5)], 0.5, capturable=True)


def test_memory_is_held_without_kernels_too(late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(key: Key) -> None:
        raise Unavailable("no compiler")

    monkeypatch.setattr(engine, "cubin", none)
    weights = [late.random(5)]
    with pytest.warns(cuda_group.SlowWarning):
        ema = fastema.EMA(weights, 0.5)
    with late.on(SIDE):
        ema.update()
    held = {block.what for block in late.driver.blocks if SIDE in block.noted}
    assert held == {"weights", "an average"}


SLOW = {
    "stochastic": (fastema.EMA, {"decay": 0.75, "shadow_dtype": "bfloat16"}),
    "nearest": (fastema.EMA, {"decay": 0.75, "shadow_dtype": "float16", "rounding": "nearest"}),
    "two halves": (fastema.EMA, {"decay": warmup(0.9), "shadow_dtype": "bf16+16"}),
    "several": (fastema.EMA, {"decay": tuple(1 - 0.6**k for k in range(1, 12))}),
    "power": (fastema.PowerEMA, {"update_every": 2, "start_after": 1}),
    "window": (fastema.SMA, {"window": 3}),
    "measured": (fastema.EMA, {"decay": (0.5, 0.75), "drift": True}),
    "guarded": (fastema.EMA, {"decay": 0.75, "on_nonfinite": "skip"}),
}


QUICK = ("stochastic", "several", "power")
"""Those whose kernels on the CPU other tests need too."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in SLOW],
)
def test_every_kind_without_kernels(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Torch's functions by way of the engine: the CPU's numbers, but for rounding."""
    kind, options = SLOW[case]

    def none(key: Key) -> None:
        raise Unavailable("no compiler")

    monkeypatch.setattr(engine, "cubin", none)
    torch.manual_seed(5)
    start = [torch.randn(61, 9), torch.randn(0), torch.randn(9, 14)[:, ::2], torch.tensor(7)]
    found = []
    for place in (0, None):
        gpu.place = lambda tensor, place=place: place
        weights = [tensor.clone() for tensor in start]
        if place is None:
            average = kind(weights, **options)
        else:
            with pytest.warns(cuda_group.SlowWarning):
                average = kind(weights, **options)
        torch.manual_seed(6)
        for step in range(9):
            move(weights[:3])
            if case == "guarded" and step == 4:
                weights[0][2, 2], kept = torch.inf, weights[0][2, 2].clone()
                average.update()
                weights[0][2, 2] = kept
                continue
            average.update()
        raw = [tensor.clone() for tensor in weights]
        index = {} if len(average.shadows) == 1 else {"which": 1}
        with average.swapped(**index):
            applied = [tensor.clone() for tensor in weights]
        assert all(map(torch.equal, raw, weights))
        drifts = average.drifts if options.get("drift") else ()
        sets = [dict(one) for one in average.shadows]
        found.append((sets, applied, drifts, average.num_updates, average.num_skipped))
    (sets, applied, drifts, *counts), (others, outside, measured, *same) = found
    assert counts == same
    # Of random bits, a path of each may be a few places apart.
    narrow = {"stochastic": 6 * 2**-8, "nearest": 2**-9}.get(case, 2e-6)
    for one, other in zip(sets, others, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=narrow, atol=narrow)
    for one, other in zip(applied, outside, strict=True):
        torch.testing.assert_close(one, other, rtol=narrow, atol=narrow)
    for one, other in zip(drifts, measured, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# -- torch's devices -------------------------------------------------------------------------------


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Torch's current device, and what torch says of captures on the others, none at first."""
    found = [0]

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, found[0] = found[0], index
        try:
            yield
        finally:
            found[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found[0])
    return found


def test_a_capture_is_one_of_a_device(monkeypatch: pytest.MonkeyPatch, current: list[int]) -> None:
    """Torch answers for the current device; a model may be on another."""
    captured: set[int] = set()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] in captured)
    for current[0] in (0, 1):
        captured.clear()
        assert not TorchContext(0).capturing()
        assert not TorchContext(1).capturing()
        captured.add(1 - current[0])
        assert not TorchContext(current[0]).capturing()
        assert TorchContext(1 - current[0]).capturing()
        captured.add(current[0])
        assert TorchContext(0).capturing()
        assert TorchContext(1).capturing()


def test_a_capture_on_another_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, current: list[int]
) -> None:
    """The work would be done now, once, and the graph be empty."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 0)
    assert TorchContext(0).capturing()
    with pytest.raises(StateError, match="cuda:1"):
        TorchContext(1).capturing()
    assert current == [0]


def test_a_capture_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own question fails there, before anything could be said of the fork."""

    def fails() -> bool:
        raise RuntimeError("CUDA error: initialization error")

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", fails)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fails)
    with pytest.raises(DeviceError, match="'spawn'"):
        TorchContext(0).capturing()


def test_nothing_is_compiled_in_a_forked_process(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the parent may have held the compiler's lock, for ever."""
    found = engine.device(0)
    monkeypatch.setattr(engine, "_forked", True)
    monkeypatch.setattr(engine, "cubin", lambda key: pytest.fail("compiled"))
    with pytest.raises(DeviceError, match="'spawn'"):
        found.function(Key("lerp", ("f32", "f32"), "flat", (9, 0)))


def test_a_forked_process_averages_on_the_cpu(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastema.EMA([torch.randn(5)], 0.5).update()
    monkeypatch.setattr(engine, "_forked", False)
    engine._after_fork()
    assert engine._forked
    gpu.place = lambda tensor: None
    weights = [torch.zeros(5)]
    ema = fastema.EMA(weights, 0.5)
    weights[0] += 1
    ema.update()
    assert ema.shadow["0"].tolist() == [0.5] * 5


def test_an_upload_in_inference_mode_can_be_written_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A capturable average that was moved during an evaluation is loaded into."""
    monkeypatch.setattr(TorchContext, "capturing", lambda context: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    context = TorchContext(0)
    context.device = "cpu"
    with torch.inference_mode():
        owner, address = context.upload(np.arange(4))
    context.write(owner, np.arange(4, 8))
    assert context.download(owner).tolist() == [4, 5, 6, 7]
    assert owner.data_ptr() == address


class Foreign:
    """A tensor on a GPU whose memory torch's allocator does not know, or has an opinion of."""

    is_cuda = True

    def __init__(self, known: bool) -> None:
        self.known = known
        self.noted: list[Any] = []

    def detach(self) -> Foreign:
        return self

    def record_stream(self, stream: Any) -> None:
        if not self.known:
            raise RuntimeError("ptr not found in ptr_info")
        warnings.warn(
            "Called record_stream on tensor whose original ...", UserWarning, stacklevel=1
        )
        self.noted.append(stream)


@pytest.mark.parametrize("known", [True, False])
def test_other_allocators(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """As with backend:cudaMallocAsync, and weights that came by DLPack: waited for, no error."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: f"stream of {index}")
    owners = [Foreign(known), Foreign(True)]
    assert TorchContext(1).hold(owners) == known
    assert owners[1].noted == ["stream of 1"]


@pytest.mark.parametrize("device", ["mps:0", "xpu:0", "hpu:0"])
def test_devices_without_kernels_are_named(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    described = bridge.describe
    monkeypatch.setattr(
        bridge, "describe", lambda tensor: replace(described(tensor), device=device, context=None)
    )
    with pytest.raises((DTypeError, DeviceError), match=f"weight: no kernels for device {device}"):
        fastema.EMA(torch.nn.Linear(2, 2))


# -- numbers ---------------------------------------------------------------------------------------


def specs_on(context: Any, *arrays: np.ndarray) -> list[TensorSpec]:
    return [
        TensorSpec(
            array.ctypes.data,
            array.shape,
            tuple(step // array.itemsize for step in array.strides),
            "f32",
            "cuda:0",
            owner=array,
            context=context,
        )
        for array in arrays
    ]


@pytest.mark.parametrize("first", [0, 3, 8, 14])
def test_numbers_of_averages_that_do_not_begin_at_the_first(gpu: StubGpu, first: int) -> None:
    draw = np.random.default_rng(first)
    x = draw.normal(size=100).astype(np.float32)
    averages = {k: draw.normal(size=100).astype(np.float32) for k in range(first, first + 3)}
    numbers = draw.uniform(0.1, 0.9, first + 3)
    want = {
        k: (a.astype(np.float64) + numbers[k] * (x.astype(np.float64) - a))
        for k, a in averages.items()
    }
    pairs = [Pair("w", *specs_on(gpu.context, a, x), average_index=k) for k, a in averages.items()]
    Program({"all": pairs}).run({"all": "lerp"}, LaunchArgs(tuple(numbers)))
    for k, average in averages.items():
        np.testing.assert_allclose(average, want[k], rtol=3e-6, atol=3e-7)


@pytest.mark.slow
@pytest.mark.full
def test_drift_of_many_averages_in_several_groups_and_layouts(gpu: StubGpu) -> None:
    """More than eight averages, two dtypes, spaced and adjacent, and an empty tensor."""
    torch.manual_seed(3)
    weights = {
        "flat": torch.randn(5000),
        "spaced": torch.randn(40, 9)[:, ::2],
        "half": torch.randn(77).bfloat16(),
        "empty": torch.randn(0, 3),
    }
    decays = tuple(1 - 0.7**k for k in range(1, 12))
    ema = fastema.EMA(weights, decays, shadow_dtype="float32", drift=True)
    move(weights.values())
    ema.update()
    for drift, average in zip(ema.drifts, ema.shadows, strict=True):
        left = [(weights[n].double() - average[n].double()).square().sum() for n in weights]
        size = [average[n].double().square().sum() for n in weights]
        assert drift.distance == pytest.approx(float(sum(left)) ** 0.5, rel=1e-4)
        assert drift.relative == pytest.approx(float(sum(left) / sum(size)) ** 0.5, rel=1e-4)
        assert 0 <= drift.still < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["flat", "spaced", "half"])
def test_a_guard_looks_at_all_groups_and_layouts(gpu: StubGpu, bad: str) -> None:
    weights = {
        "flat": torch.randn(5000),
        "spaced": torch.randn(40, 9)[:, ::2],
        "half": torch.randn(77).bfloat16(),
        "empty": torch.randn(0, 3),
    }
    ema = fastema.EMA(weights, 0.5, on_nonfinite="raise")
    ema.update()
    weights[bad].reshape(-1) if weights[bad].is_contiguous() else weights[bad]
    with torch.no_grad():
        weights[bad][tuple(n - 1 for n in weights[bad].shape)] = torch.inf
    before = shadow(ema)
    with pytest.raises(FastemaError, match=f"'{bad}' holds"):
        ema.update()
    assert_same(before, shadow(ema))
    assert ema.num_updates == 1


@pytest.mark.parametrize("options", [{}, {"drift": True}, {"on_nonfinite": "raise"}], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_nothing_but_empty_tensors(gpu: StubGpu, options: dict[str, Any], capturable: bool) -> None:
    if capturable and "on_nonfinite" in options:
        return
    ema = fastema.EMA([torch.randn(0), torch.randn(3, 0)], 0.5, capturable=capturable, **options)
    for _ in range(2):
        ema.update()
    with ema.swapped():
        pass
    assert ema.num_updates == 2
    if "drift" in options:
        assert ema.drift == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", [2**31, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("capturable", [False, True])
def test_large_seeds(gpu: StubGpu, seed: int, capturable: bool) -> None:
    """All their bits count, and are those of the CPU."""
    torch.manual_seed(0)
    start = torch.randn(3000).bfloat16()
    found = []
    for place, number in ((0, seed), (None, seed), (None, seed ^ 2**30), (None, seed ^ 2**33)):
        gpu.place = lambda tensor, place=place: place
        weights = [start.clone()]
        ema = fastema.EMA(weights, 0.9, seed=number, capturable=capturable and place == 0)
        weights[0].mul_(1.5)
        for _ in range(3):
            ema.update()
        found.append(shadow(ema))
    assert_same(found[0], found[1])
    assert not torch.equal(found[1]["0"], found[2]["0"])
    assert not torch.equal(found[1]["0"], found[3]["0"])


def test_more_rows_than_a_grid_has_blocks() -> None:
    rows = 2**31 + 5
    part = cuda_group._Part("flat", np.broadcast_to(np.int64(0), (rows, abi.COLUMNS)))
    assert (part.blocks, part.values["rows"]) == (2**31 - 1, rows)


@pytest.mark.parametrize("there", [True, False], ids=["to the CPU", "from the CPU"])
def test_a_run_is_continued_on_the_other_device(gpu: StubGpu, there: bool) -> None:
    """To the bit, a capturable average on one side."""
    options: dict[str, Any] = {"decay": (warmup(0.9), 0.99), "update_every": 2, "start_after": 3}
    torch.manual_seed(0)
    weights = [torch.randn(200).bfloat16(), torch.randn(3, 5)]

    def built(on_gpu: bool) -> fastema.EMA:
        gpu.place = lambda tensor: 0 if on_gpu else None
        return fastema.EMA(weights, capturable=on_gpu, **options)

    reference = built(False)
    first = built(there)
    state: dict[str, Any] = {}
    for step in range(14):
        if step == 7:
            gpu.place = lambda tensor: 0 if there else None
            state = first.state_dict()
            # The stub has one memory for both.
            first = built(not there)
            first.load_state_dict(state)
        move(weights)
        gpu.place = lambda tensor: None
        reference.update()
        gpu.place = lambda tensor, step=step: 0 if there == (step < 7) else None
        first.update()
    assert first.num_updates == 14
    for one, other in zip(first.shadows, reference.shadows, strict=True):
        assert_same(dict(one), dict(other))


def test_an_average_is_gone_with_its_last_name(late: Late) -> None:
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


def test_a_captured_plan_has_nothing_on_the_host(gpu: StubGpu) -> None:
    """What is on the CPU would be done now, once, and never by a replay."""
    there = torch.zeros(3)
    gpu.place = lambda tensor: 0 if tensor.data_ptr() in places else None
    x = [torch.ones(3), torch.ones(3)]
    places = {there.data_ptr(), x[0].data_ptr()}
    avg = [there, torch.zeros(3)]
    plan = fastema.Plan(avg, x)
    plan.lerp_(0.5)
    gpu.context.captured = True
    with pytest.raises(StateError):
        plan.lerp_(0.5)
    assert avg[1].tolist() == [0.5] * 3


@pytest.mark.parametrize("name", [CLOCK, "lerp"])
def test_a_context_is_put_back_where_a_kernel_is_refused(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gpu.driver.current = [0]
    failed = SimpleNamespace(name="CUDA_ERROR_INVALID_IMAGE")
    monkeypatch.setattr(gpu.driver, "cuModuleLoadData", lambda code: (failed, None))
    with pytest.raises(Unavailable, match="INVALID_IMAGE"):
        engine.device(0).function(Key(name, ("f32", "f32"), "flat", (9, 0)))
    assert gpu.driver.current == [0]
