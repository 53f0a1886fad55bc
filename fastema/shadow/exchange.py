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
=============  ===================================  ===============================================
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from fastema.bridges.memory import allocate
from fastema.engine.program import Program
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec
from fastema.shadow.entries import SPLIT

__all__ = ["Exchange", "Recovered", "Tagged", "exchanged", "recovered"]

_APPLY: Final = {"swap": "swap", "park": "park", "cast": "give"}
_RESTORE: Final = {"swap": "swap", "park": "unpark", "back": "copy"}

Tagged = dict[str, list[Pair]]
"""Pairs by the way they change places."""


def _tag(pair: Pair) -> str:
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
        self._program = self._prepared(pairs)

    def _prepared(self, pairs: Tagged) -> Program:
        outside = pairs.get("spare", [])
        parts = {tag: members for tag, members in pairs.items() if tag != "spare"}
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
        self._program.run(_APPLY)

    def restore(self) -> None:
        """Put the weights back."""
        self._program.run(_RESTORE)

    def follow(self, pairs: Tagged) -> None:
        """Go on with the same tensors in other memory."""
        self._program = self._prepared(pairs)


class Recovered(NamedTuple):
    """A copy of an average that is applied, and of its companion where that belongs to it."""

    shadow: Any
    low: Any


def _duplicate(like: TensorSpec) -> tuple[Any, TensorSpec]:
    ((array, spec),) = allocate([(like, like.kind)])
    Program({"all": [Pair("copy", spec, like)]}).run({"all": "copy"})
    return array, spec


def recovered(pair: Pair) -> Recovered:
    """A copy of an average that is applied: where it is, whole, depends on the tag."""
    tag = _tag(pair)
    low = None if pair.low is None else _duplicate(pair.low)
    if tag == "swap" and pair.dst.dtype != pair.src.dtype:
        assert low is not None
        shadow, spec = _duplicate(pair.dst)
        halves = Pair(pair.name, spec, pair.src, pair.form, low[1])
        Program({"all": [halves]}).run({"all": "copy"})
    else:
        shadow, spec = _duplicate(pair.src if tag == "swap" else pair.dst)
    if tag == "park":
        _, model = _duplicate(pair.src)
        Program({"all": [Pair(pair.name, spec, model)]}).run({"all": "unpark"})
    return Recovered(shadow, None if low is None else low[0])
