"""Tables of the GPU results by card, or the sentences that stand where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.targets import (
    CAPTURED,
    COMPILED,
    COPY,
    FOREACH,
    GPT2,
    LINK,
    MIXED,
    NARROW,
    OURS,
    PLAN,
    SAME,
    SMALL,
    STEP,
    SWAP,
    TINY,
    WINDOW,
    RunFigures,
)
from bench.race.report import RESULTS, Row, align_table, load, number

README_WITHOUT = """\
**On GPUs** no figure has been measured: the kernels are compiled for sm_75 to sm_120 and run thread
by thread on the CPU in the tests; `make gpu-check` measures them on yours."""

GPU_WITHOUT = """\
**The speed of the kernels on a GPU has not been measured yet**; `make gpu-check` measures it on
yours."""

OFFLOAD_WITHOUT = """\
No GPU has run this yet; it is tested from memory to memory, with links of any delay."""


@dataclass(frozen=True)
class GpuResult:
    """A stored result of the GPU check: the name of its card, its page, and its figures."""

    card: str
    page: str
    rows: Sequence[Row]
    found: RunFigures

    def figure(self, table: str, entry: str, name: str) -> Any:
        """Return a figure of one row; None if the row or the figure is missing."""
        rows = (row for row in self.rows if (row.table, row.entry) == (table, entry))
        return next((row.figures.get(name) for row in rows), None)


def results(folder: Path = RESULTS) -> list[GpuResult]:
    """Return the stored results of whole checks on GPUs, by card; never of dry runs."""
    found = []
    for path in sorted(folder.glob("gpu-*.json")):
        header, rows = load(path)
        ours = header.get("kernels") in ("shipped", "compiled here")
        real = header.get("dry_run") is False and not header["quick"] and ours
        if real and not path.stem.endswith("-part"):
            page = f"bench/results/{path.stem}.md"
            found.append(GpuResult(header["card"], page, rows, RunFigures(rows)))
    return found


Cell = Callable[[GpuResult], "float | None"]
"""Reads a figure, or None where it is missing."""

Line = tuple[str, Cell, Callable[[Any], str]]
"""A line of a table: label, figure, format."""


def _of(case: str, entry: str, name: str = "device_ms", scale: float = 1) -> Cell:
    def cell(result: GpuResult) -> float | None:
        value = result.found.of(case, entry, name)
        return None if value is None else value * scale

    return cell


def _times(case: str, entry: str) -> Cell:
    """Return how many times as long as fastema an entry takes on the device."""

    def cell(result: GpuResult) -> float | None:
        other, ours = result.found.of(case, entry), result.found.of(case, OURS)
        return None if other is None or not ours else other / ours

    return cell


def _stored(table: str, entry: str, name: str) -> Cell:
    return lambda result: result.figure(table, entry, name)


_MULTIPLE, _SHARE = "{:.2f}×".format, "{:.0%}".format

_ONE_DTYPE, _TWO_DTYPES = "1 billion float32 weights", "1 billion bfloat16 weights, float32 average"
_MANY, _FEW = "1,000 small float32 tensors", "64 tiny float32 tensors"
_GPT2 = "GPT-2 small, bfloat16, float32 average"

HEADLINES: list[Line] = [
    ("device-to-device copy, TB/s", _of(SAME, COPY, "tbps"), number),
    (f"{_ONE_DTYPE}: of the copy's TB/s", _of(SAME, OURS, "share_of_copy"), _SHARE),
    (f"{_TWO_DTYPES}: of the copy's TB/s", _of(MIXED, OURS, "share_of_copy"), _SHARE),
    (
        "1 billion bfloat16 weights, bfloat16 average: of the copy's TB/s",
        _of(NARROW, OURS, "share_of_copy"),
        _SHARE,
    ),
    (f"{_ONE_DTYPE}: `_foreach_lerp_` takes", _times(SAME, FOREACH), _MULTIPLE),
    (f"{_TWO_DTYPES}: `_foreach_lerp_` takes", _times(MIXED, f"{FOREACH}, casts"), _MULTIPLE),
    (f"{_TWO_DTYPES}: a compiled loop takes", _times(MIXED, COMPILED), _MULTIPLE),
    (f"{_MANY}: on the device, µs", _of(SMALL, OURS, scale=1e3), number),
    (f"{_MANY}: on the host, µs", _of(SMALL, OURS, "host_us"), number),
]
"""Lines of README's table."""

DETAILS: list[Line] = [
    *HEADLINES,
    (f"{_MANY}: replay of a graph, µs", _of(SMALL, CAPTURED, scale=1e3), number),
    (f"{_MANY}: `Plan.lerp_`, µs", _of(SMALL, PLAN, scale=1e3), number),
    (f"{_FEW}: on the device, µs", _of(TINY, OURS, scale=1e3), number),
    (f"{_FEW}: `_foreach_lerp_`, µs", _of(TINY, FOREACH, scale=1e3), number),
    (f"{_GPT2}: update, µs", _of(GPT2, OURS, scale=1e3), number),
    (f"{_GPT2}: swap and back, µs", _of(SWAP, OURS, scale=1e3), number),
    (
        "GPT-2 small, float32: mean of the last 3 weights, µs",
        _of(WINDOW, "fastema.SMA", scale=1e3),
        number,
    ),
]
"""Lines of the table in docs/gpu.md."""

OFFLOADED: list[Line] = [
    (
        "weights to the host, GB/s",
        _stored(LINK, "fastema, weights to the host", "link_gbps"),
        number,
    ),
    ("a step without an average, ms", _stored(STEP, "no average", "step_ms"), number),
    ("`offload=True`: stall, ms", _stored(STEP, "offload=True", "stall_ms"), number),
    ("`offload=True`: longer, ms", _stored(STEP, "offload=True", "longer_ms"), number),
    ("an average on the device: longer, ms", _stored(STEP, "on the device", "longer_ms"), number),
]


def _by_card(lines: Sequence[Line], found: Sequence[GpuResult]) -> str:
    """Return a table with a column for each card; empty if it would have no figure."""
    values = [[cell(result) for result in found] for _, cell, _ in lines]
    if all(value is None for line in values for value in line):
        return ""
    body = [
        [label, *("–" if value is None else text(value) for value in line)]
        for (label, _, text), line in zip(lines, values, strict=True)
    ]
    return align_table(["", *(result.card for result in found)], body)


def _peers(case: str, found: Sequence[GpuResult]) -> str:
    """Return a table of a case: entries and, by card, their ms and multiples of fastema's time."""
    entries = dict.fromkeys(
        row.entry for result in found for row in result.rows if row.table == case and row.figures
    )

    def cell(result: GpuResult, entry: str) -> str:
        ms, times = result.found.of(case, entry), _times(case, entry)(result)
        if ms is None:
            return "–"
        host = result.figure(case, entry, "timed_at") == "host"
        multiple = "" if times is None or entry == OURS else f" ({number(times)}×)"
        return f"{ms:.3g}{multiple}{' *' if host else ''}"

    body = [[entry, *(cell(result, entry) for result in found)] for entry in entries]
    return align_table(["device ms (× fastema)", *(result.card for result in found)], body)


def _pages(found: Sequence[GpuResult]) -> str:
    return "All figures: " + ", ".join(f"`{result.page}`" for result in found) + "."


_MULTIPLES = "Multiples are of fastema's time."


def readme_section(folder: Path = RESULTS) -> str:
    """Return README's paragraph on GPUs."""
    found = results(folder)
    table = _by_card(HEADLINES, found)
    if not table:
        return README_WITHOUT
    return f"**On GPUs:**\n\n{table}\n\n{_MULTIPLES} {_pages(found)}"


def gpu_section(folder: Path = RESULTS) -> str:
    """Return the paragraphs of docs/gpu.md on speed."""
    found = results(folder)
    table = _by_card(DETAILS, found)
    if not table:
        return GPU_WITHOUT
    parts = ["Measured by `make gpu-check`:", table]
    for case, title in (
        (MIXED, "1 billion bfloat16 weights, float32 average"),
        (SMALL, "1,000 small float32 tensors"),
    ):
        parts += [f"{title} (*: timed at the speed of the host):", _peers(case, found)]
    return "\n\n".join([*parts, f"{_MULTIPLES} {_pages(found)}"])


def offload_section(folder: Path = RESULTS) -> str:
    """Return the paragraph of docs/offload.md on GPUs."""
    found = results(folder)
    table = _by_card(OFFLOADED, found)
    if not table:
        return OFFLOAD_WITHOUT
    head = "On GPUs, 34 million float32 parameters and a batch of 8,192 (`make gpu-check`):"
    return f"{head}\n\n{table}\n\n{_pages(found)}"
