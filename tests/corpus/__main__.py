"""Store or compare what the code does now: ``python -m tests.corpus make|compare [FAMILY]``."""

import json
import sys
import textwrap
import time
from pathlib import Path

from .store import FAMILIES, Difference, differences, load, record, save

USAGE = "usage: python -m tests.corpus make|compare [FAMILY ...]"


def format_difference(family: str, one: Difference) -> str:
    """Return a difference in 80 columns."""
    lines = [f"{family}: {one.case}", f"  {one.what}"]
    for label, value in (("stored", one.stored), ("now   ", one.now)):
        lines += textwrap.wrap(
            repr(value), 80, initial_indent=f"    {label} ", subsequent_indent=" " * 11
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the command; return 1 if anything differs."""
    if len(arguments) == 3 and arguments[0] == "record":
        Path(arguments[2]).write_text(json.dumps(record(arguments[1])), encoding="utf-8")
        return 0
    command, names = (arguments or [""])[0], arguments[1:] or list(FAMILIES)
    unknown = [name for name in names if name not in FAMILIES]
    if command not in ("make", "compare") or unknown:
        print(USAGE, f"families: {' '.join(FAMILIES)}", sep="\n")
        return 2
    count = 0
    for name in names:
        if missing := FAMILIES[name].missing():
            print(f"{name}: skipped, {', '.join(missing)} not installed")
            continue
        start = time.perf_counter()
        now = record(name)
        found = differences(name, now)
        total, seconds = sum(map(len, now.values())), time.perf_counter() - start
        if command == "make":
            changed = f"{len(found)} differences written" if load(name) else "new"
            save(name, now)
            for one in (key for key, values in now.items() if "raised" in values):
                print(f"{name}: {one} raised {now[one]['raised']}")
            print(f"{name}: {len(now)} cases, {total} values, {seconds:.1f} s; {changed}")
            continue
        for one in found:
            print(format_difference(name, one))
        count += len(found)
        print(f"{name}: {len(now)} cases, {total} values, {seconds:.1f} s, {len(found)} differ")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
