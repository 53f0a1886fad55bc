"""``python -m bench [--quick] [--case NAME ...] [--out DIR]``: run, print and keep the tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import bench_import, machine, report
from bench.cases import Case, select

_IMPORT_ROUNDS = {"quick": 1, "cpu": 7}


def skipped(cases: list[Case]) -> list[dict[str, str]]:
    """Return one row for each entry that does not take part in a case, with the reason."""
    from bench.jobs import refusals

    return [
        {"case": case.name, "mix": case.mix, "peer": peer, "reason": reason}
        for case in cases
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
        cases = select(options.quick, options.case)
    except ValueError as error:
        parser.error(str(error))
    mode = "quick" if options.quick else "cpu"
    arguments = ["--quick"] if options.quick else []
    arguments += ["--case", *options.case] if options.case else []
    from bench.races import run  # it imports torch, which --help does not wait for

    rows, failed = run(cases, options.quick)
    if failed:
        print("failed, nothing is stored: " + ", ".join(failed), file=sys.stderr)
        return 1
    result = {
        "header": machine.header(" ".join(["python -m bench", *arguments]), mode),
        "rows": rows,
        "skipped": skipped(cases),
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
