"""A stub GPU: host memory, a driver that records its calls, and kernels that run on the host.

Launches are faithful: the parameters are read from the address that the driver receives, and the
kernels' own code runs on them, one thread after another.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numba import njit, types

from fastema.bridges import torch as bridge
from fastema.bridges.torch_foreach import substitute
from fastema.engine import cuda as engine
from fastema.engine import cuda_group
from fastema.engine.cubins import Cubin, Key, Unavailable
from fastema.engine.driver import DriverError
from fastema.kernels import cuda, cuda_clock
from fastema.kernels.operations import OPERATIONS
from fastema.kernels.table import CLOCK_CELLS, COLUMNS
from fastema.kernels.variants import CLOCK
from fastema.kernels.words import pointer_f64, pointer_i64, store
from fastema.layout.spec import TensorSpec

THREADS = 7
"""Few and odd, so that threads have vectors, elements of the tail, or neither."""

SIGNATURE = types.void(*(types.int64,) * 4, *(types.float64,) * 8, *(types.int64,) * 5)


@cache
def compile_on_host(operation: str, formats: tuple[str, ...], layout: str) -> Any:
    """Compile a GPU kernel for the host; its blocks and threads run one after another."""
    body, counts = cuda.make_body(operation, formats, layout), OPERATIONS[operation].counts
    number_of, moment_of, rows_of = cuda._number, cuda._launch_args, cuda.rows_to_do(operation)
    head_of = cuda.load_head
    flag = cuda_clock.flag

    def run(  # type: ignore[no-untyped-def]
        table, rows, results, clock, w0, w1, w2, w3, w4, w5, w6, w7, seed, step, window, slot, turn
    ):
        cells = pointer_i64(table)
        now = moment_of(clock, (seed, step, window, slot, turn))
        for row in range(rows_of(clock, rows)):
            at = row * COLUMNS
            head, average = head_of(cells, at)
            number = number_of(average, clock, (w0, w1, w2, w3, w4, w5, w6, w7))
            found = 0.0
            for thread in range(THREADS):
                found += body(cells, at, head, number, now, thread, THREADS)
            if counts and clock:
                if found > 0.0:
                    flag(clock)
            elif counts:
                store(pointer_f64(results), row, found)

    return njit(SIGNATURE, nogil=True, error_model="numpy")(run)


@cache
def compile_clock_on_host() -> Any:
    """Compile the kernel that advances clocks for the host; the last clock comes first."""
    read, advance = cuda_clock.read, cuda_clock.advance

    def run(first, clocks):  # type: ignore[no-untyped-def]
        for block in range(clocks - 1, -1, -1):
            clock = first + block * (8 * CLOCK_CELLS)
            before = read(clock, first)
            for thread in range(THREADS):
                advance(clock, before, thread, THREADS)

    return njit(types.void(types.int64, types.int64), error_model="numpy")(run)


def read(address: int, kinds: Sequence[type]) -> list[Any]:
    """Read the parameters of a launch from an address."""
    places = (ctypes.c_void_p * len(kinds)).from_address(address)
    return [kind.from_address(place).value for kind, place in zip(kinds, places, strict=True)]


PARAMETERS = [ctypes.c_int64] * 4 + [ctypes.c_double] * 8 + [ctypes.c_int64] * 5


@dataclass
class StubDriver:
    """A stand-in for :class:`fastema.engine.driver.Driver` whose kernels run on the host."""

    calls: Counter[str] = field(default_factory=Counter)
    launches: list[tuple[str, int, int]] = field(default_factory=list)  # operation, blocks, stream
    contexts: list[int] = field(default_factory=lambda: [1000])
    pending: list[Callable[[], None]] | None = None
    """Queue of launches that are not yet run, as on a busy device; None runs each at once."""
    refused: int = 0

    def capability(self, index: int) -> tuple[int, int]:
        return 9, 0

    def context(self, index: int) -> int:
        return 1000 + index

    def current(self) -> int:
        self.calls["current"] += 1
        return self.contexts[-1]

    def push(self, context: int) -> None:
        self.calls["push"] += 1
        self.contexts.append(context)

    def pop(self) -> None:
        self.calls["pop"] += 1
        self.contexts.pop()

    def function(self, code: bytes, name: str) -> Key:
        self.calls["function"] += 1
        assert code == name.encode()
        return KEYS[name]

    def launch(self, key: Key, blocks: int, threads: int, stream: int, parameters: int) -> None:
        self.calls["launch"] += 1
        assert threads == 256
        if self.refused:
            self.refused -= 1
            raise DriverError("CUDA_ERROR_LAUNCH_FAILED")
        self.launches.append((key.operation, blocks, stream))
        if key.operation == CLOCK:
            job = self.bound(compile_clock_on_host(), [*read(parameters, [ctypes.c_int64]), blocks])
        else:
            values = read(parameters, PARAMETERS)
            assert blocks == values[1]
            job = self.bound(compile_on_host(key.operation, key.formats, key.layout), values)
        if self.pending is None:
            job()
        else:
            self.pending.append(job)

    @staticmethod
    def bound(kernel: Callable[..., None], values: Sequence[Any]) -> Callable[[], None]:
        return lambda: kernel(*values)

    def finish(self) -> None:
        """Run the pending launches."""
        pending, self.pending = self.pending or [], []
        for job in pending:
            job()

    def take(self) -> list[tuple[str, int, int]]:
        """Return the launches since the last call and forget them."""
        found, self.launches = self.launches, []
        return found


KEYS: dict[str, Key] = {}


def stub_cubin(key: Key) -> Cubin:
    """Return the kernel's name in place of machine code."""
    name = repr(key)
    KEYS[name] = key
    return Cubin(name, name.encode())


def raise_unavailable(key: Key) -> NoReturn:
    """Raise as :func:`fastema.engine.cubins.cubin` does where there is no compiler."""
    raise Unavailable("no compiler: pip install 'fastema[cuda]'")


def shadow(average: Any) -> dict[str, torch.Tensor]:
    """Copy the tensors of an average."""
    return {name: tensor.clone() for name, tensor in average.shadow.items()}


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Assert that two mappings have the same names and equal tensors."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def change_weights(tensors: Iterable[torch.Tensor]) -> None:
    """Change tensors as a training step does."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(0.9).add_(torch.randn(tensor.shape).to(tensor.dtype))


@dataclass
class StubContext:
    """A stand-in for a CUDA device, with its memory on the host."""

    index: int
    driver: StubDriver
    handle: int = 77
    captured: bool = False
    calls: Counter[str] = field(default_factory=Counter)
    held: list[Any] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)
    """Addresses of pinned host memory."""
    fallback_reason: str | None = None

    @property
    def device(self) -> str:
        return f"cuda:{self.index}"

    def stream(self) -> int:
        return self.handle

    def capturing(self) -> bool:
        return self.captured

    def upload(self, array: np.ndarray) -> tuple[np.ndarray, int]:
        assert not self.captured
        self.calls["upload"] += 1
        there = np.array(array, order="C", copy=True)
        return there, there.ctypes.data

    def download(self, owner: Any) -> np.ndarray:
        assert not self.captured
        self.calls["download"] += 1
        self.wait()
        return np.asarray(owner).copy()

    def write(self, owner: np.ndarray, array: np.ndarray) -> None:
        assert not self.captured
        self.calls["write"] += 1
        owner[...] = array

    def defer_reuse(self, owners: Iterable[Any]) -> bool:
        self.calls["defer_reuse"] += 1
        self.held += owners
        return not any(
            isinstance(one, torch.Tensor) and one.data_ptr() in self.pinned for one in owners
        )

    def wait(self) -> None:
        assert not self.captured
        self.calls["wait"] += 1
        if self.driver.pending is not None:
            self.driver.finish()

    def substitute(self, operation: str, pairs: Sequence[Any]) -> Any:
        return substitute(operation, pairs)


@dataclass
class StubGpu:
    driver: StubDriver
    contexts: dict[int, StubContext]
    place: Callable[[torch.Tensor], int | None] = lambda tensor: 0
    """Returns the device index that a tensor pretends to be on; None means the host."""
    on_host: dict[int, torch.Tensor] = field(default_factory=dict)
    """Tensors that were moved to the host or made there, by the address of their storage."""

    @property
    def context(self) -> StubContext:
        return self.contexts[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StubGpu:
    """Make torch tensors on the CPU pretend to be on GPUs."""
    driver = StubDriver()
    stub = StubGpu(driver, {index: StubContext(index, driver) for index in range(2)})
    describe, zeros = bridge.describe, bridge.zeros

    def described(tensor: torch.Tensor) -> TensorSpec:
        spec, index = describe(tensor), stub.place(tensor)
        if index is None or tensor.untyped_storage().data_ptr() in stub.on_host:
            return spec
        return replace(spec, device=f"cuda:{index}", context=stub.contexts[index])

    monkeypatch.setattr(bridge, "describe", described)

    def kept(tensor: torch.Tensor, device: str) -> torch.Tensor:
        if device == "pinned":
            for context in stub.contexts.values():
                context.pinned.add(tensor.data_ptr())
        if device in ("cpu", "pinned"):
            stub.on_host[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def transfer(tensor: torch.Tensor, device: str) -> torch.Tensor:
        there = described(tensor).device == device
        return tensor.detach() if there else kept(tensor.detach().clone(), device)

    monkeypatch.setattr(
        bridge, "zeros", lambda n, code, device: kept(zeros(n, code, "cpu"), device)
    )
    monkeypatch.setattr(bridge, "transfer", transfer)
    monkeypatch.setattr(engine, "_driver", lambda: driver)
    monkeypatch.setattr(engine, "_devices", {})
    monkeypatch.setattr(engine, "cubin", stub_cubin)
    monkeypatch.setattr(cuda_group, "_warned", set())
    return stub
