"""Run the test suites of other libraries on fastema's classes: ``python -m tests.gate --help``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.gate.suites import SUITES, WITHOUT_TESTS, Suite

_ROOT = Path(__file__).resolve().parent.parent.parent
_OUTCOMES = ("passed", "failed", "differs", "left out")
_SECONDS = 1800  # for one suite


def main(arguments: list[str] | None = None, suites: dict[str, Suite] = SUITES) -> int:
    """Run suites, print a line for each, and return 1 if a failure is not explained.

    A suite that is asked for by name must be there.
    """
    asked = _parse(arguments, suites)
    lines, good = [], True
    for name in asked.suite or suites:
        suite = suites[name]
        title = f"{name} {_version(suite) or ''}".strip()
        root = _locate(suite, asked.sources.resolve())
        if isinstance(root, str):
            lines.append(f"{title}: not run: {root}")
            good = good and not asked.suite
            continue
        print(f"==> {title}, {root}", flush=True)
        line, passed = _judge(_run(suite, root))
        lines.append(f"{title}: {line}")
        good = good and passed
    if not asked.suite:
        lines += [f"{name}: not run: {why}" for name, why in WITHOUT_TESTS.items()]
    print("\n".join(["", *lines]))
    return 0 if good else 1


def _parse(arguments: list[str] | None, suites: dict[str, Suite]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gate",
        description="Replace the classes of other libraries with fastema.compat.install(), and "
        "run the tests of these libraries, unmodified. Nothing is downloaded: for tests that are "
        "not there, the command that gets them is printed.",
    )
    parser.add_argument("suite", nargs="*", help=f"by default all: {', '.join(suites)}")
    parser.add_argument(
        "--sources",
        metavar="DIR",
        type=Path,
        default=os.environ.get("FASTEMA_GATE_SOURCES", _ROOT.parent),
        help="folder with clones of their repositories (default: $FASTEMA_GATE_SOURCES, or the "
        "folder that has this checkout)",
    )
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.suite if name not in suites]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(suites)}")
    return asked


def _version(suite: Suite) -> str | None:
    for name in (suite.distribution, f"{suite.distribution}-cpu"):
        try:
            return metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return None


def _locate(suite: Suite, sources: Path) -> Path | str:
    """Return the folder that has the suite's files, or a sentence about what is missing."""
    version = _version(suite)
    if version is None:
        return f"{suite.distribution} is not installed"
    clone = sources / suite.repository.rpartition("/")[2]
    roots = [clone, Path(sysconfig.get_path("purelib"))]
    root = next((r for r in roots if all((r / file).is_file() for file in suite.files)), None)
    if root is None:
        tag = suite.tag.format(version=version)
        return (
            f"no {' '.join(suite.files)} in {clone}; get it with\n"
            f"    git clone --depth 1 --branch {tag} {suite.repository} {clone}"
        )
    if missing := [module for module in suite.needs if find_spec(module) is None]:
        return f"its tests need {', '.join(missing)}: pip install {' '.join(missing)}"
    return root


def _run(suite: Suite, root: Path) -> dict[str, Any]:
    """Run a suite in another process, and return what its session recorded."""
    with tempfile.TemporaryDirectory() as scratch:
        settings, report = Path(scratch, "pytest.ini"), Path(scratch, "report.json")
        settings.write_text("[pytest]\n", encoding="utf-8")  # instead of ours, or the peer's
        asked = {**suite._asdict(), "report": str(report)}
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        env = {"PYTHONPATH": path, "FASTEMA_GATE": json.dumps(asked), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("session.py"))]
        command += ["-c", str(settings), f"--rootdir={root}", f"--basetemp={scratch}/tmp"]
        command += ["-q", "--tb=short", "-p", "no:cacheprovider"]
        command += [str(root / file) for file in suite.files]
        try:
            ran = subprocess.run(
                command,
                cwd=scratch,
                env=os.environ | suite.env | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"tests": {}, "problems": [f"it took more than {_SECONDS} seconds"]}
        if not report.is_file():
            return {"tests": {}, "problems": [f"pytest was not finished:\n{ran.stdout[-3000:]}"]}
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        if not found["tests"]:
            found["problems"].append(f"no test was run:\n{ran.stdout[-3000:]}")
        return found


def _judge(found: dict[str, Any]) -> tuple[str, bool]:
    """Print remarks on tests; return the suite's line, and whether all of it is explained."""
    tests: dict[str, dict[str, Any]] = found["tests"]
    counts = Counter(result["outcome"] for result in tests.values())
    for problem in found["problems"]:
        print(f"  problem: {problem}")
    for test, result in tests.items():
        if result["outcome"] != "passed":
            print(f"  {result['outcome']}: {test.rpartition('/')[2]}: {result['why']}")
    ran = {test: result for test, result in tests.items() if result["outcome"] != "left out"}
    strange = [test for test, result in ran.items() if not result["ours"]]
    for test in strange:
        print(f"  ran none of our code: {test.rpartition('/')[2]}")
    line = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES)
    good = not counts["failed"] and not found["problems"] and len(strange) < len(ran)
    return f"{line}; tests that ran our code: {len(ran) - len(strange)} of {len(ran)}", good


if __name__ == "__main__":
    sys.exit(main())
