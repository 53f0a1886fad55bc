"""Pairs of tensors compiled into launches: what a plan runs at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastema.engine import cpu
from fastema.engine.interrupts import deferred
from fastema.engine.locks import lock
from fastema.engine.registry import kernel
from fastema.errors import ArgumentError, DTypeError
from fastema.kernels.table import (
    CLAIM,
    CONTROLS,
    DISTANCE,
    MEASURES,
    MEASURING,
    NEXT,
    RESULTS,
    SEED,
    SLOT,
    SQUARE,
    STEP,
    STILL,
    TURN,
    WHICH,
    WINDOW,
)
from fastema.layout.dtypes import raw
from fastema.layout.group import Pair
from fastema.layout.table import Table, chunk_tables, moved_bytes

__all__ = ["Measured", "Moment", "Program", "checked_seed"]

_LAUNCHERS: Final[dict[str, Callable[..., None]]] = {"cpu": cpu.launch}

_BITS: Final = {"park", "unpark", "read_read_write"}
"""Operations on bits, whatever they stand for."""

_CONVERTING: Final = {"copy", "swap", "give"}
"""Operations that move bits unchanged between equal dtypes."""

_WITH_RING: Final = {"window"}


class Moment(NamedTuple):
    """What changes from run to run.

    Attributes
    ----------
    numbers : sequence of float
        Weights of the new value, by the pairs' ``which``; for a windowed mean, how many values it
        is of.
    seed, step : int
        What random bits depend on besides the place of an element.
    window, slot, turn : int
        Slots of the ring, the one to overwrite, and values put in so far, this one included.
    """

    numbers: Sequence[float] = (0.0,)
    seed: int = 0
    step: int = 0
    window: int = 0
    slot: int = 0
    turn: int = 0


def checked_seed(seed: Any) -> int:
    """A seed that fits the control block.

    Raises
    ------
    ArgumentError
        For anything but a whole number from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed={seed!r}: expected a whole number from 0 to 2**63 - 1")
    return seed


class Measured(NamedTuple):
    """Sums over the elements of one average.

    Attributes
    ----------
    distance : float
        Norm of the weights minus the average.
    size : float
        Norm of the average.
    still : int
        Elements that did not change.
    """

    distance: float
    size: float
    still: int


def _formats(operation: str, pair: Pair) -> tuple[str, ...]:
    dst, src = pair.dst.kind, pair.src.kind
    if operation in _BITS:
        return raw(dst), raw(src)
    if operation in _CONVERTING and dst == src and pair.low is None:
        return raw(dst), raw(src)
    if dst.real is None or src.real is None:
        raise DTypeError(f"{operation}: {dst.code} is not averaged, only copied and swapped")
    form = pair.form or dst.real
    if operation in _CONVERTING:
        form = form.removesuffix("~")  # a copy is best rounded to nearest
    if operation not in _WITH_RING:
        return form, src.real
    assert pair.ring is not None
    assert pair.low is not None
    return form, src.real, str(pair.ring[0].kind.real), str(pair.low.kind.real)


class _Group(NamedTuple):
    tag: str
    device: str
    like: Pair
    layout: str
    table: Table
    control: NDArray[np.int64]
    results: NDArray[np.float64]
    nbytes: int


_Launch = tuple[Callable[..., None], tuple[Any, ...]]


class Program:
    """Runs operations over a fixed set of pairs.

    An interrupt waits for the end of a run, so that no tensor is left half done.

    Parameters
    ----------
    pairs : mapping of str to sequence of Pair
        Checked pairs, each memory once, under tags of the caller's; a run gives each tag its
        operation. Averages that are updated together follow each other, tensor by tensor.
    """

    def __init__(self, pairs: Mapping[str, Sequence[Pair]]) -> None:
        self._lock = lock()
        self._pairs = pairs  # the owners of the addresses in the tables
        together = 1 + max((p.which for members in pairs.values() for p in members), default=0)
        self._numbers = np.zeros(together)
        self._launches: dict[tuple[tuple[str, str], ...], list[_Launch]] = {}
        kinds: dict[tuple[str, ...], list[Pair]] = {}
        for tag, members in pairs.items():
            for pair in members:
                ring = "" if pair.ring is None else pair.ring[0].dtype
                low = "" if pair.low is None else pair.low.dtype
                key = (tag, pair.dst.device, pair.dst.dtype, pair.src.dtype, pair.form, ring, low)
                kinds.setdefault(key, []).append(pair)
        self._groups = [
            group for (tag, *_), members in kinds.items() for group in _groups(tag, members)
        ]

    def prepare(self, operations: Mapping[str, str]) -> list[_Launch]:
        """Compile what a run needs; called by :meth:`run`, or earlier to fail before writing."""
        key = tuple(operations.items())
        launches = self._launches.get(key)
        if launches is None:
            launches = [
                self._launch(group, operations[group.tag])
                for group in self._groups
                if group.tag in operations
            ]
            self._launches[key] = launches
        return launches

    def _launch(self, group: _Group, operation: str) -> _Launch:
        compiled = kernel(group.device, operation, _formats(operation, group.like), group.layout)
        if operation in MEASURING and not len(group.results):
            group.results.resize((len(group.table), MEASURES), refcheck=False)
            group.control[RESULTS] = group.results.ctypes.data
        table, control = group.table.ctypes.data, group.control.ctypes.data
        numbers = self._numbers.ctypes.data
        return _LAUNCHERS[group.device], (
            *(compiled, table, len(group.table), numbers, control, group.nbytes),
        )

    def run(self, operations: Mapping[str, str], moment: Moment = Moment()) -> None:  # noqa: B008
        """Run one operation per tag over all its pairs.

        Parameters
        ----------
        operations : mapping of tag to operation
            Such as ``"lerp"``, ``"copy"`` or ``"swap"``; pairs under other tags are left alone.
        moment : Moment
        """
        launches = self.prepare(operations)
        with self._lock, deferred():
            self._numbers[:] = moment.numbers
            settings = moment[1:]
            for group in self._groups:
                group.control[NEXT] = 0
                group.control[_SETTINGS] = settings
            for launch, args in launches:
                launch(*args)

    def measured(self, which: int) -> Measured:
        """What the latest run of a measuring operation found of one of the averages."""
        distance = square = 0.0
        still = 0
        for group in self._groups:
            if len(group.results):
                rows = group.results[group.table[:, WHICH] == which]
                distance += float(rows[:, DISTANCE].sum())
                square += float(rows[:, SQUARE].sum())
                still += int(rows[:, STILL].sum())
        return Measured(math.sqrt(distance), math.sqrt(square), still)

    def all_finite(self) -> bool:
        """Whether the latest run of ``"finite"`` found nothing else."""
        return not any(group.results[:, DISTANCE].any() for group in self._groups)


_SETTINGS: Final = np.array([SEED, STEP, WINDOW, SLOT, TURN])
"""Columns of the control block that a moment gives, in its order."""


def _groups(tag: str, members: Sequence[Pair]) -> list[_Group]:
    first = members[0]
    device = first.dst.device.partition(":")[0]
    if device not in _LAUNCHERS:
        raise DTypeError(f"{first.name}: no kernels for device {first.dst.device}")
    nbytes = moved_bytes(members)
    together = len({pair.which for pair in members})
    groups = []
    for layout, table in chunk_tables(members, together).items():
        control = np.zeros(CONTROLS, np.int64)
        control[CLAIM] = together
        results = np.empty((0, MEASURES))
        groups.append(_Group(tag, device, first, layout, table, control, results, nbytes))
    return groups
