"""Ways to put an average into a model and to take it back, exactly, without a third copy.

=============  ===================================  ===============================================
tag            average and weights                  how
=============  ===================================  ===============================================
``swap``       of one dtype                         their bits change places
``park``       float32 average, bfloat16 weights    the model takes the rounded average; the
                                                    average's storage keeps the raw weights and the
                                                    bits that the model has no room for (48 bits
                                                    in, 48 out)
``spare``      any other two dtypes                 the raw weights go into a spare buffer while
                                                    the average is applied: there are more pairs of
                                                    values than the two storages have states
``exact``      copied, not averaged                 as ``swap``
``converted``  copied, of two dtypes                as ``spare``
=============  ===================================  ===============================================
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from fastema.engine.program import Program
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec
from fastema.shadow.entries import Entry, allocate

__all__ = ["APPLY", "FOLLOW", "RESTORE", "UPDATE", "Spares", "recovered", "tag_of", "tagged"]

UPDATE: Final = {
    **dict.fromkeys(("swap", "park", "spare"), "lerp"),
    **dict.fromkeys(("exact", "converted"), "copy"),
}
FOLLOW: Final = dict.fromkeys(UPDATE, "copy")
APPLY: Final = {"swap": "swap", "park": "park", "exact": "swap", "cast": "copy"}
RESTORE: Final = {"swap": "swap", "park": "unpark", "exact": "swap", "back": "copy"}

_IN_PLACE: Final = {"swap", "park", "exact"}


def tag_of(pair: Pair, averaged: bool) -> str:
    """How a pair of average and weights is exchanged."""
    if pair.dst.dtype == pair.src.dtype:
        return "swap" if averaged else "exact"
    if not averaged:
        return "converted"
    return "park" if (pair.dst.dtype, pair.src.dtype) == ("f32", "bf16") else "spare"


def tagged(pairs: Iterable[tuple[Pair, bool]]) -> dict[str, list[Pair]]:
    """(pair, whether averaged) by tag."""
    found: dict[str, list[Pair]] = {}
    for pair, averaged in pairs:
        found.setdefault(tag_of(pair, averaged), []).append(pair)
    return found


class Spares:
    """Raw weights of the pairs that cannot change places, kept while the average is applied."""

    def __init__(self, pairs: dict[str, list[Pair]]) -> None:
        outside = [p for tag, members in pairs.items() if tag not in _IN_PLACE for p in members]
        entries = allocate([(p.name, False, p.src, p.src.kind) for p in outside])
        self._kept = {entry.name: entry for entry in entries}
        save = [Pair(p.name, self._kept[p.name].spec, p.src) for p in outside]
        Program({"save": save}).run({"save": "copy"})

    def program(self, pairs: dict[str, list[Pair]]) -> Program:
        """A program for :data:`APPLY` and :data:`RESTORE` over these pairs."""
        parts = {tag: members for tag, members in pairs.items() if tag in _IN_PLACE}
        outside = [p for tag, members in pairs.items() if tag not in _IN_PLACE for p in members]
        parts["cast"] = [Pair(p.name, p.src, p.dst) for p in outside]
        parts["back"] = [Pair(p.name, p.src, self._kept[p.name].spec) for p in outside]
        return Program(parts)


def _duplicate(name: str, like: TensorSpec) -> Entry:
    (entry,) = allocate([(name, False, like, like.kind)])
    Program({"all": [Pair(name, entry.spec, like)]}).run({"all": "copy"})
    return entry


def recovered(tag: str, pair: Pair) -> Any:
    """A copy of an average that is applied: where it is, whole, depends on the tag."""
    if tag in ("swap", "exact"):
        return _duplicate(pair.name, pair.src).shadow
    average = _duplicate(pair.name, pair.dst)
    if tag == "park":
        model = _duplicate(pair.name, pair.src)
        Program({"all": [Pair(pair.name, average.spec, model.spec)]}).run({"all": "unpark"})
    return average.shadow
