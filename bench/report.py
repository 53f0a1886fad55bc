"""Results as tables; ``python -m bench.report [--check]`` puts the short one into the README.

Nothing but the standard library is needed: a stored result renders anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"

Row = dict[str, Any]
Result = dict[str, Any]

_MIXES = {
    "f32/f32": "f32 model, f32 average",
    "bf16/f32": "bf16 model, f32 average",
    "bf16/bf16": "bf16 model, bf16 average",
}
_README_TABLES = (
    {
        "update:gpt2-small:f32/f32": "GPT-2 small, f32",
        "update:gpt2-small:bf16/f32": "bf16, average f32",
        "update:gpt2-small:bf16/bf16": "bf16, average bf16",
        "update:small-1000:f32/f32": "1,000 small tensors, f32",
    },
    {
        "swap:gpt2-small:f32/f32": "swap and back, GPT-2 small, f32",
        "swap:gpt2-small:bf16/f32": "bf16, average f32",
    },
)


def store(folder: Path, name: str, result: Result, text: str) -> None:
    """Write a result and its tables side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = json.dumps(result, indent=1, allow_nan=False) + "\n"
    (folder / f"{name}.json").write_text(stored, encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")


def number(value: float | None) -> str:
    """Return a number with three significant digits, a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2}f}"


def aligned(head: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table whose columns also line up as plain text; the first is left-bound."""
    lines = [head, *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def render(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]) + " |"

    rule = "|" + "|".join(
        "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
        for column, width in enumerate(widths)
    )
    return "\n".join([render(head), rule + "|", *map(render, body)])


def provenance(header: dict[str, Any]) -> str:
    """Return one paragraph: machine, threads, versions, command, date, commit."""
    versions = ", ".join(f"{name} {value}" for name, value in header["versions"].items())
    threads = ", ".join(f"{name} {count}" for name, count in header["threads"].items())
    return (
        f"{header['cpu']}, {header['cores']} cores, {header['system']} {header['machine']}; "
        f"threads: {threads}. {versions}. `{header['command']}` on {header['date_utc']}"
        + (f", commit {header['commit']}." if header["commit"] else ".")
    )


def _case_table(rows: list[Row], skipped: list[Row]) -> str:
    first = rows[0]
    question, model, mix = first["case"].split(":")
    title = "Update" if question == "update" else "Swap and back"
    head = [
        "",
        "ms",
        "p20–p80",
        "GB/s",
        "of the limit",
        "time / fastema",
        "peak extra MB",
        "host µs",
    ]
    body = [
        [
            row["peer"],
            number(row["median_ms"]),
            f"{number(row['p20_ms'])}–{number(row['p80_ms'])}",
            number(row["gbps"]),
            f"{row['share_of_limit']:.0%}",
            number(row["ratio_to_fastema"]),
            number(None if row["peak_extra_bytes"] is None else row["peak_extra_bytes"] / 1e6),
            number(row["host_us"]),
        ]
        for row in rows
    ]
    parts = [
        f"### {title}: {model}, {_MIXES[mix]}",
        f"{first['n_tensors']:,} tensors, {first['n_elements']:,} elements, "
        f"{first['bytes_per_element']} bytes per element, {first['rounds']} rounds.",
        aligned(head, body),
    ]
    out = [f"- {row['peer']}: {row['reason']}." for row in skipped if row["case"] == first["case"]]
    if out:
        parts.append("Not run:\n\n" + "\n".join(out))
    return "\n\n".join(parts)


def _startup_table(rows: list[Row]) -> str:
    body = [
        [row["what"], row["cache"] or "", number(row["median_ms"]), str(row["rounds"])]
        for row in rows
    ]
    return "### Start\n\n" + aligned(["fresh process", "cache", "ms", "rounds"], body)


_METHOD = """\
All entries of a case run in turn, A B C A B C ..., in one process on all cores; medians of the
rounds. Each result was found equal to a float64 reference first. GB/s counts the least bytes that
the work needs, whatever an entry really moves; *the limit* is the time of the better of two plain
kernels that move as many. Peak extra memory is the rise of resident memory during one call, taken
in a process of its own; below 0.1 MB it is the measurement's own. *host* is the time of the same
call with as many tensors of one element. `-hot` cases call each entry once more right before the
timed call, so that what fits lies in the caches; in the others the rest of the field ran in
between."""


def markdown(result: Result) -> str:
    """Return all tables of a result."""
    header = result["header"]
    quick = header["mode"] == "quick"
    by_case: dict[str, list[Row]] = {}
    for row in result["rows"]:
        by_case.setdefault(row["case"], []).append(row)
    parts = [
        "# fastema benchmarks" + (": quick mode, small shapes and few rounds" if quick else ""),
        provenance(header),
        _METHOD,
        *(_case_table(rows, result["skipped"]) for rows in by_case.values()),
    ]
    if result["startup"]:
        parts.append(_startup_table(result["startup"]))
    return "\n\n".join(parts) + "\n"


def _summary(result: Result, columns: dict[str, str]) -> str:
    """Return a table of median ms, and how many times fastema's, per entry and case."""
    cells: dict[tuple[str, str], str] = {}
    for row in result["rows"]:
        ratio = "" if row["ratio_to_fastema"] == 1 else f" ({number(row['ratio_to_fastema'])}×)"
        cells[row["peer"], row["case"]] = number(row["median_ms"]) + ratio
    for row in result["skipped"]:
        cells[row["peer"], row["case"]] = "raises" if row["reason"].startswith("raises") else "–"
    peers = dict.fromkeys(peer for peer, case in cells if case in columns)
    body = [
        [peer, *(cells.get((peer, case), "–") for case in columns)]
        for peer in sorted(peers, key=lambda name: name.startswith("limit"))
    ]
    return aligned(["median ms (× fastema)", *columns.values()], body)


def readme_section(result: Result) -> str:
    """Return what the README shows of a result: updates, swaps, and where they were measured."""
    have = {row["case"] for row in result["rows"]}
    tables = [{c: t for c, t in columns.items() if c in have} for columns in _README_TABLES]
    parts = [_summary(result, columns) for columns in tables if columns]
    parts.append(f"{provenance(result['header'])} All figures: `bench/results/cpu.md`.")
    return "\n\n".join(parts)


def put_between_markers(text: str, section: str) -> str:
    """Return `text` with what stands between the markers replaced.

    Raises
    ------
    ValueError
        A marker is missing.
    """
    if START not in text or END not in text:
        raise ValueError(f"README.md lacks the markers {START} and {END}")
    before, rest = text.split(START, 1)
    _, after = rest.split(END, 1)
    return f"{before}{START}\n{section}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README differs")
    parser.add_argument("--result", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    result = json.loads(options.result.read_text(encoding="utf-8"))
    old = options.readme.read_text(encoding="utf-8")
    new = put_between_markers(old, readme_section(result))
    if options.check:
        if new != old:
            print(f"{options.readme} differs: run `python -m bench.report`", file=sys.stderr)
        return int(new != old)
    options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
