"""An average in a model for a while, and the weights back, exactly, without a third copy.

============  ===================================  ================================================
way           average and weights                  how
============  ===================================  ================================================
``bits``      of one dtype, or a float32 in two    their bits change places; of an average in two
              halves and float32 weights           halves and bfloat16 weights, the high half's
``park``      float32 average, bfloat16 weights    the model takes the rounded average; the
                                                   average's storage keeps the raw weights and the
                                                   bits that the model has no room for (48 bits
                                                   in, 48 out)
``spare``     any other two dtypes, and what is    the raw weights go into a spare buffer while the
              copied, not averaged, and differs    average is applied: there are more pairs of
                                                   values than the two storages have states
``assign``    weights that change by being given   they are given a copy of the average; their raw
              another array                        array is kept meanwhile, not copied
============  ===================================  ================================================

What a framework has to do by itself (variables on several replicas, averages on another device)
is a :class:`Way` of the surface that needs it; when, and in which order, ways run is said here.
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
    "Calls",
    "InMemory",
    "Recovered",
    "Swap",
    "WatchedMemory",
    "Way",
    "WriteWatch",
    "recover",
    "recovered",
    "rounded",
    "way_of",
    "write_averages",
]


class Way(Protocol):
    """One way to put averages into weights and to take them back."""

    def apply(self) -> object:
        """Put the average into the model, all of it or nothing."""

    def restore(self) -> object:
        """Put the weights back."""


class Calls(NamedTuple):
    """A way by two functions."""

    apply: Callable[[], object]
    restore: Callable[[], object]


class Swap:
    """Puts averages into a model and takes them back, exactly once each.

    Interrupts wait for the end of either. Ways are applied in their order and undone in the other
    one, also if one of them raises.
    """

    def __init__(self, *ways: Way) -> None:
        self._ways = ways
        self._due: list[Way] = []

    @property
    def applied(self) -> bool:
        """Whether the model holds the average, or a part of it that could not be taken back."""
        return bool(self._due)

    def apply(self) -> None:
        """Put the average into the model; nothing if it is there."""
        with defer_signals():
            if self._due:
                return
            try:
                for way in self._ways:
                    way.apply()
                    self._due.append(way)
            except BaseException:
                self.restore()
                raise

    def restore(self) -> None:
        """Put the weights back; nothing if they are there.

        A way that raises is tried again by the next call; the others put back what is theirs.
        """
        with defer_signals():
            failed: BaseException | None = None
            for way in reversed([*self._due]):
                try:
                    way.restore()
                    self._due.remove(way)
                except BaseException as error:
                    failed = failed or error
            if failed is not None:
                raise failed


# -- in memory ------------------------------------------------------------------------------------

SPLIT: Final = "bf16+16"
"""Kernel format of a float32 average in two halves; the first is the nearest bfloat16."""

_APPLY: Final = {"bits": "swap", "park": "park", "spare": "cast_back"}
_RESTORE: Final = {"bits": "swap", "park": "unpark", "kept": "copy"}


def way_of(pair: Pair) -> str:
    """Name the way, of the table above, in which a pair changes places."""
    if not pair.src.writable:
        return "assign"
    dtypes = pair.dst.dtype, pair.src.dtype
    if dtypes[0] == dtypes[1] or (pair.form == SPLIT and dtypes[1] == "f32"):
        return "bits"
    return "park" if pair.form != SPLIT and dtypes == ("f32", "bf16") else "spare"


def _bare(pair: Pair) -> Pair:
    """One average alone, with a companion that is exchanged too."""
    whole = pair.form == SPLIT and pair.dst.dtype != pair.src.dtype
    bare = Pair(pair.name, pair.dst, pair.src)
    return bare._replace(form=pair.form, residual=pair.residual) if whole else bare


class InMemory:
    """Averages and weights that change places in each other's memory, or by assignment.

    Raw weights without room in the average are copied now; nothing is written before :meth:`apply`.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        tagged = _by_way(pairs)
        outside = tagged.get("spare", [])
        views = allocate([(pair.src, pair.src.kind) for pair in outside])
        self._kept = {pair.name: spec for pair, (_, spec) in zip(outside, views, strict=True)}
        if outside:
            save = [Pair(pair.name, self._kept[pair.name], pair.src) for pair in outside]
            Program({"save": save}).run({"save": "copy"})
        self._assigned = _Assigned(tagged.get("assign", []))
        self._program = self._prepared(tagged)

    def _prepared(self, tagged: Mapping[str, list[Pair]]) -> Program:
        outside = tagged.get("spare", [])
        parts = {tag: members for tag, members in tagged.items() if tag != "assign"}
        parts["kept"] = [Pair(pair.name, pair.src, self._kept[pair.name]) for pair in outside]
        program = Program(parts)
        program.prepare(_APPLY)
        program.prepare(_RESTORE)
        return program

    @property
    def has_copies(self) -> bool:
        """Whether it holds copies of weights, as they were when it was made."""
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
        """Continue with the same tensors after they moved to other memory."""
        self._program = self._prepared(_by_way(pairs))


def _by_way(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(way_of(pair), []).append(_bare(pair))
    return found


class _Assigned:
    """Averages given as new arrays to weights that hold another array whenever they change."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._raw: list[Any] = []

    def apply(self) -> None:
        """Give all of them their average, or none."""
        if not self._pairs:  # as in every swap in place
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
        """Give them the arrays back that they had."""
        for pair, raw in zip(self._pairs, self._raw, strict=False):
            bridge_of(pair.src.owner).assign(pair.src.owner, raw)
        self._raw = []


def _as_weights(pairs: Sequence[Pair]) -> list[Any]:
    """Averages as their weights would be: themselves where they are so already."""
    differ = [p for p in pairs if p.dst.dtype != p.src.dtype]
    made = dict(zip((pair.name for pair in differ), rounded(differ), strict=True))
    return [made.get(pair.name, pair.dst.owner) for pair in pairs]


def write_averages(pairs: Sequence[Pair]) -> None:
    """Write averages into weights for good, rounded to nearest: ``src`` is written from ``dst``."""
    _Assigned([pair for pair in pairs if can_be_assigned(pair.src)]).apply()
    there = [pair for pair in pairs if not can_be_assigned(pair.src)]
    Program({"all": there}).run({"all": "cast_back"})
    for notify, arrays in write_listeners(pair.src.owner for pair in there):
        notify(arrays)


def rounded(pairs: Sequence[Pair]) -> list[Any]:
    """Allocate memory that holds averages as their weights would, in the weights' dtypes."""
    memories = allocate([(pair.dst, pair.src.kind) for pair in pairs])
    given = [
        Pair(pair.name, pair.dst, spec, pair.form, pair.residual)
        for pair, (_, spec) in zip(pairs, memories, strict=True)
    ]
    Program({"all": given}).run({"all": "cast_back"})
    return [array for array, _ in memories]


# -- averages that are applied --------------------------------------------------------------------

_RECOVERED_AT_ONCE: Final = 1 << 26
"""Bytes of weights that are copied together, of tensors that are no larger."""


class Recovered(NamedTuple):
    """Memory for an average that is applied, and for its companion where that belongs to it."""

    shadow: TensorSpec
    residual: TensorSpec | None


def recover(pairs: Sequence[Pair], into: Sequence[Recovered]) -> None:
    """Copy averages that are applied: where each is, whole, depends on its way."""
    begin = nbytes = 0
    for end, pair in enumerate(pairs, 1):
        nbytes += pair.src.nbytes
        if nbytes >= _RECOVERED_AT_ONCE or end == len(pairs):
            _recover(pairs[begin:end], into[begin:end])
            begin, nbytes = end, 0


def _recover(pairs: Sequence[Pair], into: Sequence[Recovered]) -> None:
    parked = [(pair, to) for pair, to in zip(pairs, into, strict=True) if way_of(pair) == "park"]
    models = [spec for _, spec in allocate([(pair.src, pair.src.kind) for pair, _ in parked])]
    copies = [Pair(one.name, spec, one.src) for (one, _), spec in zip(parked, models, strict=True)]
    for pair, to in zip(pairs, into, strict=True):
        if _in_halves(pair):
            copies.append(Pair(pair.name, to.shadow, pair.src, pair.form, to.residual))
            continue
        copies.append(Pair(pair.name, to.shadow, pair.src if way_of(pair) == "bits" else pair.dst))
        if pair.residual is not None and to.residual is not None:
            copies.append(Pair(pair.name, to.residual, pair.residual))
    bits = [Pair(one.name, to.shadow, spec) for (one, to), spec in zip(parked, models, strict=True)]
    Program({"copied": copies, "parked": bits}).run({"copied": "copy", "parked": "unpark"})


def _in_halves(pair: Pair) -> bool:
    """Return whether an average in two halves has changed places with whole weights."""
    return way_of(pair) == "bits" and pair.dst.dtype != pair.src.dtype


def recovered(pairs: Sequence[Pair]) -> list[Any]:
    """Allocate memory with averages that are applied."""
    shadows = allocate([(pair.dst, pair.dst.kind) for pair in pairs])
    halves = [pair.residual for pair in pairs if pair.residual is not None and _in_halves(pair)]
    residuals = iter(allocate([(residual, residual.kind) for residual in halves]))
    recover(
        pairs,
        [
            Recovered(spec, next(residuals)[1] if _in_halves(pair) else None)
            for pair, (_, spec) in zip(pairs, shadows, strict=True)
        ],
    )
    return [array for array, _ in shadows]


class WriteWatch:
    """Notices who writes weights while they hold an average, and tells autograd of the swap.

    ``averaged`` may not be written meanwhile; ``now`` is where the weights are by now.
    """

    def __init__(self, weights: Mapping[str, TensorSpec], averaged: set[str]) -> None:
        self.weights, self._averaged = weights, averaged
        self._versions = versions_of(spec.owner for spec in weights.values() if spec.writable)
        self.now = weights

    def begin(self) -> None:
        """The weights hold the average now."""
        self.now = self.weights
        for one in self._versions:
            one.begin()

    def written(self) -> list[str]:
        """Name those that were written since, where they lie as they did."""
        arrays = {id(array) for one in self._versions for array in one.written()}
        if not arrays:
            return []
        return [
            name
            for name, spec in self.weights.items()
            # Moving a tensor to other memory counts as a write of it, and is none.
            if id(spec.owner) in arrays and name in self._averaged and spec == self.now[name]
        ]

    def end(self) -> None:
        """The weights are back, in memory as :attr:`now` says."""
        unmoved = self.weights == self.now
        for one in self._versions:
            one.end(put_back=unmoved)
        if not unmoved:
            for notify, arrays in write_listeners(s.owner for s in self.now.values() if s.writable):
                notify(arrays)


class WatchedMemory(NamedTuple):
    """The way in memory, where writes are noticed from its end to that of its undoing."""

    memory: InMemory
    watch: WriteWatch

    def apply(self) -> None:
        """See :class:`Way`."""
        self.memory.apply()
        try:
            self.watch.begin()
        except BaseException:
            self.memory.restore()
            raise

    def restore(self) -> None:
        """See :class:`Way`."""
        self.memory.restore()
        self.watch.end()
