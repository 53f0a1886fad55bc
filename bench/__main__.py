"""``python -m bench [--quick] [--case NAME ...] [--out DIR]``: run, print and keep the tables."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import bench_import, machine, report
from bench.cases import select

_IMPORT_ROUNDS = {"quick": 1, "cpu": 7}


def run_races(quick: bool, names: list[str]) -> list[dict[str, Any]]:
    """Run the races under pytest-benchmark and return the rows of the report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--benchmark-quiet"]
        command += ["bench/bench_update.py", "bench/bench_swap.py", f"--benchmark-json={path}"]
        command += ["--quick"] if quick else []
        command += [f"--case={name}" for name in names]
        subprocess.run(command, cwd=report.ROOT, check=True)
        stored = json.loads(path.read_text(encoding="utf-8"))
    return [benchmark["extra_info"] for benchmark in stored["benchmarks"]]


def skipped(quick: bool, names: list[str]) -> list[dict[str, str]]:
    """Return one row for each entry that does not take part in a case, with the reason."""
    from bench.jobs import refusals

    return [
        {"case": case.name, "mix": case.mix, "peer": peer, "reason": reason}
        for case in select(quick, names)
        for peer, reason in refusals(case).items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, under 3 minutes")
    parser.add_argument(
        "--case", nargs="+", default=[], metavar="NAME", help="only cases of these names"
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    options = parser.parse_args()
    try:
        select(options.quick, options.case)
    except ValueError as error:
        parser.error(str(error))
    mode = "quick" if options.quick else "cpu"
    arguments = ["--quick"] if options.quick else []
    arguments += ["--case", *options.case] if options.case else []
    try:
        rows = run_races(options.quick, options.case)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    result = {
        "header": machine.header(" ".join(["python -m bench", *arguments]), mode),
        "rows": rows,
        "skipped": skipped(options.quick, options.case),
        "startup": [] if options.case else bench_import.measure(_IMPORT_ROUNDS[mode]),
    }
    text = report.markdown(result)
    print(text)
    # A part of the cases must not replace the result of all of them.
    name = mode + ("-part" if options.case else "")
    report.store(options.out, name, result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
