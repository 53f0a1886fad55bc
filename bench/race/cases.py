"""The cases of the CPU race: tensors, dtypes and rounds. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from bench.race import shapes

BYTES = {"f32": 4, "bf16": 2}
"""Bytes of one element per dtype code."""

MIXES = ("f32/f32", "bf16/f32", "bf16/bf16")
"""Pairs of dtypes: model / average."""


@dataclass(frozen=True)
class Case:
    """One race: a shape inventory in one mix of dtypes.

    Parameters
    ----------
    model
        Name of the inventory.
    mix
        One of `MIXES`.
    inventory
        Returns the list of names and shapes.
    rounds
        Timed rounds after the warm-up round, as far as `budget_s` permits.
    question
        ``"update"``: one update of the average. ``"swap"``: put the average into the model and
        restore the weights.
    hot
        Call each job once, untimed, directly before the timed call, so that the caches hold as much
        of its tensors as fits. Otherwise the other jobs run in between and evict them.
    memory
        Measure peak extra memory too, in one process per peer.
    budget_s
        Time in seconds after which no new round begins.
    """

    model: str
    mix: str
    inventory: Callable[[], shapes.Inventory]
    rounds: int
    question: Literal["update", "swap"] = "update"
    hot: bool = False
    memory: bool = True
    budget_s: float = 60.0

    @property
    def name(self) -> str:
        return f"{self.question}:{self.model}{'-hot' if self.hot else ''}:{self.mix}"

    @property
    def title(self) -> str:
        """Title of the case's table."""
        kind = "Update" if self.question == "update" else "Swap and back"
        weights, average = self.mix.split("/")
        hot = ", hot" if self.hot else ""
        return f"{kind}: {self.model}{hot}, {weights} model, {average} average"

    @property
    def weight_dtype(self) -> str:
        return self.mix.split("/")[0]

    @property
    def average_dtype(self) -> str:
        return self.mix.split("/")[1]

    @property
    def bytes_per_element(self) -> int:
        """Least traffic per element: each side read once, and written once if it changes.

        An update reads the weight and the average and writes the average. Putting the average into
        the model and restoring the weights is two swaps; each reads and writes both sides.
        """
        weight, average = BYTES[self.weight_dtype], BYTES[self.average_dtype]
        if self.question == "swap":
            return 2 * (2 * weight + 2 * average)
        return weight + 2 * average


FULL = [
    Case(model, mix, inventory, rounds, hot=hot, memory=not hot)
    for model, inventory, rounds, hot in (
        ("gpt2-small", shapes.gpt2, 20, False),
        ("resnet50", shapes.resnet50, 30, False),
        ("small-1000", shapes.many_small, 100, False),
        ("small-1000", shapes.many_small, 100, True),
        ("equal-400x50k", shapes.equal, 30, False),
        ("flat-100M", shapes.flat, 20, False),
    )
    for mix in MIXES
] + [Case("gpt2-small", mix, shapes.gpt2, 15, question="swap") for mix in ("f32/f32", "bf16/f32")]

_QUICK_GPT2 = partial(shapes.gpt2, layers=2, vocab=8_192)
_QUICK_S = 0.4

QUICK = [
    Case(
        model,
        mix,
        inventory,
        15,
        hot=hot,
        memory=model.startswith("gpt2"),
        budget_s=_QUICK_S,
    )
    for model, inventory, hot, mixes in (
        ("gpt2-2-layers", _QUICK_GPT2, False, MIXES[1:2]),
        ("small-1000", shapes.many_small, False, MIXES),
        ("small-1000", shapes.many_small, True, MIXES[:1]),
        ("equal-400x20k", partial(shapes.equal, elements=20_000), False, MIXES[:1]),
        ("flat-10M", partial(shapes.flat, elements=10_000_000), False, MIXES),
    )
    for mix in mixes
] + [
    Case("gpt2-2-layers", mix, _QUICK_GPT2, 15, question="swap", budget_s=_QUICK_S)
    for mix in ("f32/f32", "bf16/f32")
]
