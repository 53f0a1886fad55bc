"""Questions that the benchmarks answer, and the settings of a run. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.race.report import RESULTS, Figure, Row, Rows


@dataclass(frozen=True)
class Settings:
    """Options of a run, from the command line.

    Parameters
    ----------
    quick
        Use small shapes and few rounds.
    cases
        Names of cases, or parts of names between colons; empty for all cases.
    out
        Folder of the results.
    baseline
        "check" compares quick runs with the stored baseline, "write" updates it, and an empty
        string does neither.
    device, minutes, stages, select
        Device, time limit, stages and test selection of the GPU check only.
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
        """Return whether `cases` selects a case."""
        return not self.cases or bool({name, *name.split(":")} & set(self.cases))


@dataclass(frozen=True)
class Question:
    """A question that the benchmarks answer.

    Parameters
    ----------
    title
        Title of the page.
    method
        How the figures are measured, in Markdown.
    rows
        Measures, and yields rows in the order of their tables.
    cases
        Returns the names that ``--case`` can select; empty if there are none.
    packages
        Packages whose versions are stored; if empty, those of the CPU race's peers.
    figures
        Figures of this question, in addition to `bench.race.report.FIGURES`.
    header
        Returns further entries of the result's header.
    result_name
        Returns the name of the result's files, if it differs from the question's name.
    draw
        ``draw(rows, header, path)`` draws the picture that the page begins with.
    keeps_parts
        Store incomplete results after each table, and failures: the machine may be taken away.
    """

    title: str
    method: str
    rows: Callable[[Settings], Rows]
    cases: Callable[[Settings], Sequence[str]] = lambda settings: ()
    packages: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    header: Callable[[Settings], Mapping[str, Any]] = lambda settings: {}
    result_name: Callable[[Settings], str] | None = None
    draw: Callable[[Sequence[Row], Mapping[str, Any], Path], object] | None = None
    keeps_parts: bool = False
