"""Groups of pairs on a CUDA device: one launch for all tensors of a dtype pair.

Launches go to the caller's stream. The table stays in device memory; values that change from run
to run are kernel parameters, or are read from a step counter on the device (a clock). A run
touches no other device memory, allocates nothing and waits for nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fastema.engine import cuda
from fastema.engine.cubins import Key, Unavailable
from fastema.engine.group import Group, formats_of
from fastema.engine.streams import StreamTracker, keep_for_graphs
from fastema.errors import DTypeError, StateError
from fastema.kernels.operations import OPERATIONS
from fastema.kernels.table import AVERAGE, CLOCK_CELLS, GPU_THREADS, MAX_AVERAGES
from fastema.layout.device_context import DeviceContext, LaunchArgs, Substitute
from fastema.layout.group import Pair
from fastema.layout.table import Table, build_tables, gpu_chunk

__all__ = ["CudaGroup", "SlowWarning", "groups"]

_MOST_BLOCKS: Final = 2**31 - 1

_PARAMETERS: Final = np.dtype(
    [
        *((name, "i8") for name in ("table", "rows", "results", "clock")),
        ("numbers", "f8", MAX_AVERAGES),
        *((name, "i8") for name in ("seed", "step", "window", "slot", "turn")),
    ]
)
"""A kernel's parameters, eight bytes each."""


class SlowWarning(RuntimeWarning):
    """Slower functions of the framework replace the GPU kernels."""


_warned: set[str] = set()
"""Devices that a warning was issued for."""


class _Part:
    """The rows of one layout, and the parameters of a launch over them."""

    def __init__(self, layout: str, table: Table) -> None:
        self.layout, self.table = layout, table
        self.owner: Any = None
        self.values = np.zeros((), _PARAMETERS)
        self.values["rows"] = len(table)
        self._places = self.values.ctypes.data + np.arange(0, _PARAMETERS.itemsize, 8)
        self.parameters = int(self._places.ctypes.data)
        self.blocks = min(len(table), _MOST_BLOCKS)

    def upload(self, context: DeviceContext) -> None:
        """Copy the table to the device, once."""
        if self.owner is None:
            self.owner, self.values["table"] = context.upload(self.table)


class CudaGroup(Group):
    """Pairs of one tag and dtype pair on a GPU; up to eight averages of each tensor."""

    _streams: StreamTracker | None = None

    def __init__(self, tag: str, members: Sequence[Pair]) -> None:
        context = members[0].dst.context
        if context is None:
            raise DTypeError(f"{members[0].name}: no kernels for device {members[0].dst.device}")
        super().__init__(tag, members)
        self._context = context
        batch, last = divmod(max(pair.average_index for pair in members), MAX_AVERAGES)
        self._first, self._count = batch * MAX_AVERAGES, last + 1
        self._clock_offset = 8 * CLOCK_CELLS * batch
        # The row number decides when a windowed mean is recomputed: use the chunks of the CPU.
        chunk = None if members[0].ring else gpu_chunk(members)
        tables = build_tables(members, len({pair.average_index for pair in members}), chunk)
        for table in tables.values():
            table[:, AVERAGE] -= self._first
        self._parts = [_Part(layout, table) for layout, table in tables.items()]
        self._streams = StreamTracker(context)
        self._results: Any = None
        self._substitute_results: NDArray[np.float64] | None = None

    def prepare(self, operation: str) -> Callable[[LaunchArgs], None]:
        """Load the kernels of an operation, compile new ones, and return the launch."""
        if self._context.fallback_reason is not None:
            return self._substitute(operation, self._context.fallback_reason)
        cuda.refuse_forked()
        if self._context.capturing():
            raise StateError(
                f"{self._context.device}: {operation} was not prepared before this stream was "
                "captured; make the same call of an average or a Plan once before capturing (and "
                "again after tensors of the model were replaced). Calls that locate their tensors "
                "every time (copy_to(), state_dict(), fastema.lerp_()) cannot be captured"
            )
        formats = formats_of(operation, self._members[0])
        try:
            gpu = cuda.device(self._context.index)
            functions = [
                gpu.function(Key(operation, formats, part.layout, gpu.capability))
                for part in self._parts
            ]
        except Unavailable as error:
            return self._substitute(
                operation,
                f"{error}. Until then work on {self._context.device} uses the framework's own "
                "functions, which are several times slower",
            )
        for part in self._parts:
            part.upload(self._context)
        if OPERATIONS[operation].counts and self._results is None:
            self._make_results()
        launches = [
            partial(gpu.launch, function, part.blocks, GPU_THREADS)
            for part, function in zip(self._parts, functions, strict=True)
        ]
        return partial(self._launch, launches)

    def _make_results(self) -> None:
        assert self._streams is not None
        self._streams.forget_streams()  # these are new to the known streams
        rows = sum(len(part.table) for part in self._parts)
        self._results, address = self._context.upload(np.zeros(rows))
        for part in self._parts:
            part.values["results"] = address
            address += 8 * len(part.table)

    def _begin(self, args: LaunchArgs) -> None:
        """Store the arguments where the next launches read them."""
        numbers = args.numbers[self._first : self._first + self._count] or args.numbers
        clock = args.clocks.get(self._context.device, 0)
        clock += self._clock_offset if clock else 0
        for part in self._parts:
            values = part.values
            values["numbers"][: self._count] = numbers
            values["clock"], values["seed"], values["step"] = clock, args.seed, args.step
            values["window"], values["slot"], values["turn"] = args.window, args.slot, args.turn

    def _launch(self, launches: Sequence[Callable[..., None]], args: LaunchArgs) -> None:
        self._begin(args)
        assert self._streams is not None
        stream = self._streams.stream(self._owners, self._tables)
        for part, launch in zip(self._parts, launches, strict=True):
            launch(stream, part.parameters)

    def _tables(self) -> list[Any]:
        """Return the owners of memory that only the kernels use."""
        owners = [part.owner for part in self._parts]
        return [one for one in (*owners, self._results) if one is not None]

    def _owners(self) -> list[Any]:
        """Return the owners of all memory that the launches use."""
        owners = self._tables()
        for pair in self._members:
            others = pair.residual, pair.ring and pair.ring[0]
            owners += [spec.owner for spec in (pair.dst, pair.src, *others) if spec is not None]
        return owners

    def __del__(self) -> None:
        if self._streams is not None and self._streams.needs_wait:  # its memory may be freed next
            try:
                self._context.wait()
            except Exception:  # in a capture; at exit; after a device failure
                keep_for_graphs(self._owners())

    def _substitute(self, operation: str, reason: str) -> Callable[[LaunchArgs], None]:
        """Return the operation in the framework's own functions; warn once per device."""
        run = self._context.substitute(operation, self._members)
        device = self._context.device
        if device not in _warned:
            warnings.warn(reason, SlowWarning, stacklevel=2)
            _warned.add(device)  # last: if warnings are errors, the next call raises too
        return partial(self._run_substitute, run)

    def _run_substitute(self, run: Substitute, args: LaunchArgs) -> None:
        if args.clocks:
            raise StateError(
                "without GPU kernels an average cannot be capturable: build it without "
                "capturable=True"
            )
        assert self._streams is not None
        self._streams.stream(self._owners, self._tables)
        found = run(args)
        if found is not None:
            self._substitute_results = found

    def results(self) -> NDArray[np.float64]:
        """Return what each row's kernel found; wait for the device."""
        if self._substitute_results is not None:
            return self._substitute_results
        if self._results is None:
            return super().results()
        # Downloaded each time: a graph may have been replayed since.
        return self._context.download(self._results)


def groups(tag: str, members: Sequence[Pair]) -> list[CudaGroup]:
    """Return groups for pairs of one tag and dtype pair: one per eight averages."""
    batches: dict[int, list[Pair]] = {}
    for pair in members:
        batches.setdefault(pair.average_index // MAX_AVERAGES, []).append(pair)
    return [CudaGroup(tag, batch) for batch in batches.values()]
