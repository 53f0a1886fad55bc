"""What a question is: how it is measured, shown and cut short. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.race.report import RESULTS, Figure, Rows


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Parameters
    ----------
    quick
        Small shapes and few rounds.
    cases
        Names, or parts of names between colons; all cases where it is empty.
    out
        Folder of the results.
    baseline
        What to do with the stored figures of quick runs: "check", "write", or nothing.
    device, minutes, stages, select
        Of the GPU check alone.
    """

    quick: bool = False
    cases: tuple[str, ...] = ()
    out: Path = RESULTS
    baseline: str = ""
    device: str = "cuda"
    minutes: float = 7.5
    stages: tuple[str, ...] = ("build", "test", "benchmark")
    select: str = ""

    def wants(self, name: str) -> bool:
        """Return whether a case is asked for."""
        return not self.cases or bool({name, *name.split(":")} & set(self.cases))


@dataclass(frozen=True)
class Question:
    """A question that the benchmarks answer.

    Parameters
    ----------
    title
        Of its page.
    method
        How the figures come about, in Markdown.
    rows
        Measures; yields rows in the order of their tables.
    cases
        Names that ``--case`` can choose from; none where there is nothing to choose.
    packages
        Whose versions are stored; those of the CPU race's peers where it is empty.
    figures
        That only this question has, beside `bench.race.report.FIGURES`.
    header
        More facts for the result's header.
    result_name
        Of the result's files, where it is not the question's.
    keeps_parts
        Store what there is after each table, failures too: the machine may be taken away.
    draw
        Draws a picture of the rows beside the tables.
    """

    title: str
    method: str
    rows: Callable[[Settings], Rows]
    cases: Callable[[Settings], Sequence[str]] = lambda settings: ()
    packages: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    header: Callable[[Settings], Mapping[str, Any]] = lambda settings: {}
    result_name: Callable[[Settings], str] | None = None
    keeps_parts: bool = False
    draw: Callable[[Sequence[Any], Mapping[str, Any], Path], object] | None = None
