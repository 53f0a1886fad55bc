"""Swap an average into a model and the weights back, exactly, without a third copy.

============  ===================================  ================================================
way           average and weights                  how
============  ===================================  ================================================
``bits``      equal dtypes, or a float32 split     swap their bits; for a split average and
              into halves and float32 weights      bfloat16 weights, swap the high half
``park``      float32 average, bfloat16 weights    write the rounded average into the model; keep
                                                   the raw weights in the average's storage, with
                                                   the bits that do not fit into the model (48
                                                   bits in, 48 out)
``spare``     any other dtypes, including copied   keep the raw weights in a spare buffer: the two
              tensors that differ in dtype         storages cannot encode all pairs of values
``assign``    weights that change by assignment    assign a copy of the average; keep the raw
              of a new array                       array, without a copy
============  ===================================  ================================================

Frameworks that must swap in their own way (variables on several replicas, averages on another
device) implement a :class:`Way`; :class:`Swap` runs the ways in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from fastema.binding.binding import can_be_assigned
from fastema.bridges.memory import allocate
from fastema.bridges.registry import bridge_of, versions_of, write_listeners
from fastema.engine.interrupts import defer_signals
from fastema.engine.program import Program
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

__all__ = [
    "SPLIT",
    "AppliedCopy",
    "CallableWay",
    "MemorySwap",
    "Swap",
    "Way",
    "WriteWatch",
    "copy_applied",
    "copy_applied_into",
    "round_to_weights",
    "way_of",
    "write_averages",
]


class Way(Protocol):
    """One way to swap averages into a model and to restore its weights."""

    def apply(self) -> object:
        """Put the average into the model, completely or not at all."""

    def restore(self) -> object:
        """Put the raw weights back."""


class CallableWay(NamedTuple):
    """A way made from two functions."""

    apply: Callable[[], object]
    restore: Callable[[], object]


class Swap:
    """Applies averages to a model and restores its weights, each exactly once.

    Interrupts wait until either is complete. Ways are applied in order and undone in reverse order,
    even if one of them raises.
    """

    def __init__(self, *ways: Way) -> None:
        self._ways = ways
        self._applied_ways: list[Way] = []

    @property
    def applied(self) -> bool:
        """Whether the model holds the average, or a part of it that could not be restored."""
        return bool(self._applied_ways)

    def apply(self) -> None:
        """Put the average into the model. Do nothing if it is already there."""
        with defer_signals():
            if self._applied_ways:
                return
            try:
                for way in self._ways:
                    way.apply()
                    self._applied_ways.append(way)
            except BaseException:
                self.restore()
                raise

    def restore(self) -> None:
        """Put the raw weights back. Do nothing if they are already there.

        If one way raises, the others still run, and the next call tries it again.
        """
        with defer_signals():
            failed: BaseException | None = None
            for way in reversed([*self._applied_ways]):
                try:
                    way.restore()
                    self._applied_ways.remove(way)
                except BaseException as error:
                    failed = failed or error
            if failed is not None:
                raise failed


# -- in memory ------------------------------------------------------------------------------------

SPLIT: Final = "bf16+16"
"""Kernel format of a float32 average in two halves, the first being the nearest bfloat16."""

_APPLY: Final = {"bits": "swap", "park": "park", "spare": "cast_back"}
_RESTORE: Final = {"bits": "swap", "park": "unpark", "kept": "copy"}


def way_of(pair: Pair) -> str:
    """Return the way in which a pair is swapped; see the module's table."""
    if not pair.src.writable:
        return "assign"
    dtypes = pair.dst.dtype, pair.src.dtype
    if dtypes[0] == dtypes[1] or (pair.form == SPLIT and dtypes[1] == "f32"):
        return "bits"
    return "park" if pair.form != SPLIT and dtypes == ("f32", "bf16") else "spare"


def _strip_pair(pair: Pair) -> Pair:
    """Return the pair of one average alone, with its residual if that is swapped too."""
    whole = pair.form == SPLIT and pair.dst.dtype != pair.src.dtype
    bare = Pair(pair.name, pair.dst, pair.src)
    return bare._replace(form=pair.form, residual=pair.residual) if whole else bare


class MemorySwap:
    """Swaps averages and weights in each other's memory, or by assignment.

    The constructor copies raw weights that need a spare buffer; only :meth:`apply` writes averages
    and weights.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        pairs_by_tag = _by_way(pairs)
        outside = pairs_by_tag.get("spare", [])
        views = allocate([(pair.src, pair.src.kind) for pair in outside])
        self._kept = {pair.name: spec for pair, (_, spec) in zip(outside, views, strict=True)}
        if outside:
            save = [Pair(pair.name, self._kept[pair.name], pair.src) for pair in outside]
            Program({"save": save}).run({"save": "copy"})
        self._assigned = _AssignmentSwap(pairs_by_tag.get("assign", []))
        self._program = self._build_program(pairs_by_tag)

    def _build_program(self, pairs_by_tag: Mapping[str, list[Pair]]) -> Program:
        outside = pairs_by_tag.get("spare", [])
        parts = {tag: members for tag, members in pairs_by_tag.items() if tag != "assign"}
        parts["kept"] = [Pair(pair.name, pair.src, self._kept[pair.name]) for pair in outside]
        program = Program(parts)
        program.prepare(_APPLY)
        program.prepare(_RESTORE)
        return program

    @property
    def has_copies(self) -> bool:
        """Whether raw weights were copied into spare buffers at construction."""
        return bool(self._kept)

    def apply(self) -> None:
        """See :class:`Way`."""
        self._assigned.apply()
        try:
            self._program.run(_APPLY)
        except BaseException:
            self._assigned.restore()
            raise

    def restore(self) -> None:
        """See :class:`Way`."""
        self._assigned.restore()
        self._program.run(_RESTORE)

    def relocate(self, pairs: Iterable[Pair]) -> None:
        """Continue with the tensors' new addresses after they have moved."""
        self._program = self._build_program(_by_way(pairs))


def _by_way(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(way_of(pair), []).append(_strip_pair(pair))
    return found


class _AssignmentSwap:
    """Swaps by assigning new arrays, for weights that change only by assignment."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._raw: list[Any] = []

    def apply(self) -> None:
        """Assign the average to all weights, or to none if one assignment raises."""
        if not self._pairs:  # the common case: all swaps are in place
            return
        arrays = _as_weights(self._pairs)
        self._raw = [bridge_of(pair.src.owner).value(pair.src.owner) for pair in self._pairs]
        try:
            for pair, array in zip(self._pairs, arrays, strict=True):
                bridge = bridge_of(pair.src.owner)
                bridge.assign(pair.src.owner, bridge.to_framework(array))
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Assign the raw arrays again."""
        for pair, raw in zip(self._pairs, self._raw, strict=False):
            bridge_of(pair.src.owner).assign(pair.src.owner, raw)
        self._raw = []


def _as_weights(pairs: Sequence[Pair]) -> list[Any]:
    """Return averages in their weights' dtypes, without a copy where the dtypes agree."""
    differ = [p for p in pairs if p.dst.dtype != p.src.dtype]
    made = dict(zip((pair.name for pair in differ), round_to_weights(differ), strict=True))
    return [made.get(pair.name, pair.dst.owner) for pair in pairs]


def write_averages(pairs: Sequence[Pair]) -> None:
    """Overwrite weights with averages, rounded to nearest: ``pair.src`` receives ``pair.dst``."""
    _AssignmentSwap([pair for pair in pairs if can_be_assigned(pair.src)]).apply()
    there = [pair for pair in pairs if not can_be_assigned(pair.src)]
    Program({"all": there}).run({"all": "cast_back"})
    for notify, arrays in write_listeners(pair.src.owner for pair in there):
        notify(arrays)


def round_to_weights(pairs: Sequence[Pair]) -> list[Any]:
    """Return averages in new memory, rounded to their weights' dtypes."""
    memories = allocate([(pair.dst, pair.src.kind) for pair in pairs])
    given = [
        Pair(pair.name, pair.dst, spec, pair.form, pair.residual)
        for pair, (_, spec) in zip(pairs, memories, strict=True)
    ]
    Program({"all": given}).run({"all": "cast_back"})
    return [array for array, _ in memories]


# -- averages that are applied --------------------------------------------------------------------

_COPY_BATCH_BYTES: Final = 1 << 26
"""Bytes of weights to copy in one batch, which bounds the temporary memory."""


class AppliedCopy(NamedTuple):
    """Memory that receives an applied average and, if it has one, its residual."""

    shadow: TensorSpec
    residual: TensorSpec | None


def copy_applied_into(pairs: Sequence[Pair], into: Sequence[AppliedCopy]) -> None:
    """Copy averages that are applied to a model, from wherever their way keeps them."""
    begin = nbytes = 0
    for end, pair in enumerate(pairs, 1):
        nbytes += pair.src.nbytes
        if nbytes >= _COPY_BATCH_BYTES or end == len(pairs):
            _copy_applied_batch(pairs[begin:end], into[begin:end])
            begin, nbytes = end, 0


def _copy_applied_batch(pairs: Sequence[Pair], into: Sequence[AppliedCopy]) -> None:
    parked = [(pair, to) for pair, to in zip(pairs, into, strict=True) if way_of(pair) == "park"]
    models = [spec for _, spec in allocate([(pair.src, pair.src.kind) for pair, _ in parked])]
    copies = [Pair(one.name, spec, one.src) for (one, _), spec in zip(parked, models, strict=True)]
    for pair, to in zip(pairs, into, strict=True):
        if _is_split_swap(pair):
            copies.append(Pair(pair.name, to.shadow, pair.src, pair.form, to.residual))
            continue
        copies.append(Pair(pair.name, to.shadow, pair.src if way_of(pair) == "bits" else pair.dst))
        if pair.residual is not None and to.residual is not None:
            copies.append(Pair(pair.name, to.residual, pair.residual))
    bits = [Pair(one.name, to.shadow, spec) for (one, to), spec in zip(parked, models, strict=True)]
    Program({"copied": copies, "parked": bits}).run({"copied": "copy", "parked": "unpark"})


def _is_split_swap(pair: Pair) -> bool:
    """Return whether a split average was swapped with unsplit weights."""
    return way_of(pair) == "bits" and pair.dst.dtype != pair.src.dtype


def copy_applied(pairs: Sequence[Pair]) -> list[Any]:
    """Return copies of averages that are applied to a model, in new memory."""
    shadows = allocate([(pair.dst, pair.dst.kind) for pair in pairs])
    halves = [pair.residual for pair in pairs if pair.residual is not None and _is_split_swap(pair)]
    residuals = iter(allocate([(residual, residual.kind) for residual in halves]))
    copy_applied_into(
        pairs,
        [
            AppliedCopy(spec, next(residuals)[1] if _is_split_swap(pair) else None)
            for pair, (_, spec) in zip(pairs, shadows, strict=True)
        ],
    )
    return [array for array, _ in shadows]


class WriteWatch:
    """Detects writes to weights while they hold an average, and notifies autograd of the swap.

    ``averaged`` names the weights that must not be written; ``now`` holds their current locations.
    """

    def __init__(self, weights: Mapping[str, TensorSpec], averaged: set[str]) -> None:
        self.weights, self._averaged = weights, averaged
        self._versions = versions_of(spec.owner for spec in weights.values() if spec.writable)
        self.now = weights

    def begin(self) -> None:
        """Start watching: the weights now hold the average."""
        self.now = self.weights
        for one in self._versions:
            one.begin()

    def written(self) -> list[str]:
        """Return the names of averaged weights written since the swap that have not moved."""
        arrays = {id(array) for one in self._versions for array in one.written()}
        if not arrays:
            return []
        return [
            name
            for name, spec in self.weights.items()
            # Frameworks count moving a tensor to other memory as a write: ignore it.
            if id(spec.owner) in arrays and name in self._averaged and spec == self.now[name]
        ]

    def end(self) -> None:
        """Stop watching: the weights are restored, at the locations in :attr:`now`."""
        unmoved = self.weights == self.now
        for one in self._versions:
            one.end(put_back=unmoved)
        if not unmoved:
            for notify, arrays in write_listeners(s.owner for s in self.now.values() if s.writable):
                notify(arrays)
