"""Ways to put an average into a model and to take it back, exactly, without a third copy.

=============  ===================================  ===============================================
tag            average and weights                  how
=============  ===================================  ===============================================
``swap``       of one dtype, or a float32 in two    their bits change places; of an average in two
               halves and float32 weights           halves and bfloat16 weights, the high half's
``park``       float32 average, bfloat16 weights    the model takes the rounded average; the
                                                    average's storage keeps the raw weights and the
                                                    bits that the model has no room for (48 bits
                                                    in, 48 out)
``spare``      any other two dtypes, and what is    the raw weights go into a spare buffer while
               copied, not averaged, and differs    the average is applied: there are more pairs of
                                                    values than the two storages have states
``assign``     weights that change by being given   they are given a copy of the average; their raw
               another array                        array is kept meanwhile, not copied
=============  ===================================  ===============================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from fastema.bridges.memory import allocate
from fastema.bridges.registry import bridge_of
from fastema.engine.program import Program
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec
from fastema.shadow.entries import SPLIT

__all__ = [
    "Assignment",
    "Exchange",
    "Recovered",
    "Tagged",
    "can_be_assigned",
    "exchanged",
    "recover",
    "recovered",
    "rounded",
]

_APPLY: Final = {"swap": "swap", "park": "park", "cast": "give"}
_RESTORE: Final = {"swap": "swap", "park": "unpark", "back": "copy"}

_RECOVERED_AT_ONCE: Final = 1 << 26
"""Bytes of weights that are copied together, of tensors that are no larger."""

Tagged = dict[str, list[Pair]]
"""Pairs by the way they change places."""


def _tag(pair: Pair) -> str:
    if not pair.src.writable:
        return "assign"
    dtypes = pair.dst.dtype, pair.src.dtype
    if dtypes[0] == dtypes[1] or (pair.form == SPLIT and dtypes[1] == "f32"):
        return "swap"
    return "park" if pair.form != SPLIT and dtypes == ("f32", "bf16") else "spare"


def exchanged(pairs: Iterable[Pair]) -> Tagged:
    """Pairs of one average by tag, with those companions that are exchanged too."""
    found: Tagged = {}
    for pair in pairs:
        whole = pair.form == SPLIT and pair.dst.dtype != pair.src.dtype
        # One average alone: it is not to be worked on together with others of its tensor.
        bare = Pair(pair.name, pair.dst, pair.src)
        if whole:
            bare = bare._replace(form=pair.form, low=pair.low)
        found.setdefault(_tag(pair), []).append(bare)
    return found


class Exchange:
    """An average that changes places with the weights of a model, and the way back.

    Parameters
    ----------
    which : int
        The average.
    pairs : Tagged
        Of :func:`exchanged`. What has to be kept of the weights is copied here, nothing is written
        to them before :meth:`apply`.
    """

    def __init__(self, which: int, pairs: Tagged) -> None:
        self.which = which
        outside = pairs.get("spare", [])
        views = allocate([(pair.src, pair.src.kind) for pair in outside])
        self._kept = {pair.name: spec for pair, (_, spec) in zip(outside, views, strict=True)}
        if outside:
            save = [Pair(pair.name, self._kept[pair.name], pair.src) for pair in outside]
            Program({"save": save}).run({"save": "copy"})
        self._assigned = Assignment(pairs.get("assign", []))
        self._program = self._prepared(pairs)

    def _prepared(self, pairs: Tagged) -> Program:
        outside = pairs.get("spare", [])
        parts = {tag: members for tag, members in pairs.items() if tag not in ("spare", "assign")}
        parts["cast"] = outside
        parts["back"] = [Pair(pair.name, pair.src, self._kept[pair.name]) for pair in outside]
        program = Program(parts)
        program.prepare(_APPLY)
        program.prepare(_RESTORE)
        return program

    @property
    def keeps(self) -> bool:
        """Whether it holds copies of weights, as they were when it was made."""
        return bool(self._kept)

    def apply(self) -> None:
        """Put the average into the model."""
        self._assigned.apply()
        self._program.run(_APPLY)

    def restore(self) -> None:
        """Put the weights back."""
        self._assigned.restore()
        self._program.run(_RESTORE)

    def follow(self, pairs: Tagged) -> None:
        """Go on with the same tensors in other memory."""
        self._program = self._prepared(pairs)


def can_be_assigned(spec: TensorSpec) -> bool:
    """Whether what holds a tensor can be given another array in its place, but not written."""
    return not spec.writable and hasattr(bridge_of(spec.owner), "assign")


class Assignment:
    """Averages given as new arrays to weights that hold another array whenever they change.

    Parameters
    ----------
    pairs : sequence of Pair
    """

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
                bridge.assign(pair.src.owner, bridge.shown(array))
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Give them the arrays back that they had."""
        for pair, raw in zip(self._pairs, self._raw, strict=True):
            bridge_of(pair.src.owner).assign(pair.src.owner, raw)
        self._raw = []


def _as_weights(pairs: Sequence[Pair]) -> list[Any]:
    """Averages as their weights would be: themselves where they are so already."""
    differ = [p for p in pairs if p.dst.dtype != p.src.dtype]
    made = dict(zip((pair.name for pair in differ), rounded(differ), strict=True))
    return [made.get(pair.name, pair.dst.owner) for pair in pairs]


def rounded(pairs: Sequence[Pair]) -> list[Any]:
    """New memory that holds averages as their weights would, in the weights' dtypes."""
    memories = allocate([(pair.dst, pair.src.kind) for pair in pairs])
    given = [
        Pair(pair.name, pair.dst, spec, pair.form, pair.low)
        for pair, (_, spec) in zip(pairs, memories, strict=True)
    ]
    Program({"all": given}).run({"all": "give"})
    return [array for array, _ in memories]


class Recovered(NamedTuple):
    """Memory for an average that is applied, and for its companion where that belongs to it."""

    shadow: TensorSpec
    low: TensorSpec | None


def recover(pairs: Sequence[Pair], into: Sequence[Recovered]) -> None:
    """Copy averages that are applied: where each is, whole, depends on the tag."""
    begin = nbytes = 0
    for end, pair in enumerate(pairs, 1):
        nbytes += pair.src.nbytes
        if nbytes >= _RECOVERED_AT_ONCE or end == len(pairs):
            _recover(pairs[begin:end], into[begin:end])
            begin, nbytes = end, 0


def _recover(pairs: Sequence[Pair], into: Sequence[Recovered]) -> None:
    parked = [(pair, to) for pair, to in zip(pairs, into, strict=True) if _tag(pair) == "park"]
    models = [spec for _, spec in allocate([(pair.src, pair.src.kind) for pair, _ in parked])]
    copies = [Pair(one.name, spec, one.src) for (one, _), spec in zip(parked, models, strict=True)]
    for pair, to in zip(pairs, into, strict=True):
        if _in_halves(pair):
            copies.append(Pair(pair.name, to.shadow, pair.src, pair.form, to.low))
            continue
        copies.append(Pair(pair.name, to.shadow, pair.src if _tag(pair) == "swap" else pair.dst))
        if pair.low is not None and to.low is not None:
            copies.append(Pair(pair.name, to.low, pair.low))
    bits = [Pair(one.name, to.shadow, spec) for (one, to), spec in zip(parked, models, strict=True)]
    Program({"copied": copies, "parked": bits}).run({"copied": "copy", "parked": "unpark"})


def _in_halves(pair: Pair) -> bool:
    """Whether an average in two halves has changed places with whole weights."""
    return _tag(pair) == "swap" and pair.dst.dtype != pair.src.dtype


def recovered(pairs: Sequence[Pair]) -> list[Any]:
    """New memory with averages that are applied."""
    shadows = allocate([(pair.dst, pair.dst.kind) for pair in pairs])
    halves = [pair.low for pair in pairs if pair.low is not None and _in_halves(pair)]
    lows = iter(allocate([(low, low.kind) for low in halves]))
    recover(
        pairs,
        [
            Recovered(spec, next(lows)[1] if _in_halves(pair) else None)
            for pair, (_, spec) in zip(pairs, shadows, strict=True)
        ],
    )
    return [array for array, _ in shadows]
