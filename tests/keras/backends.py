"""Run all cases for Keras on each of its backends, in one process per backend.

Keras chooses its backend once, when it is imported. A file of cases is a test module whose name
pytest does not collect; it also runs by itself:
``KERAS_BACKEND=jax pytest tests/keras/losses_cases.py``.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from xml.etree import ElementTree

import pytest

from ..conftest import ROOT

BACKENDS: Final = (pytest.param("tensorflow", marks=pytest.mark.tensorflow), "torch", "jax")
HERE: Final = Path(__file__).parent
CASES: Final = tuple(
    HERE / f"{name}_cases.py" for name in ("weights", "evaluation", "losses", "losses_runs", "swap")
)
SECONDS = 1200


def on_one_backend(test: Any) -> Any:
    """Mark a test that no backend affects: all backends but one run it only with --full."""
    return test if os.environ.get("KERAS_BACKEND") == "torch" else pytest.mark.full(test)


class Outcome(NamedTuple):
    """The result of a backend's process: failures, passed tests by file, and its output."""

    failed: list[str]
    passed: dict[str, int]
    output: str

    def fail_on_problems(self) -> None:
        """Fail if a case failed or if no case of a file passed."""
        if self.failed:
            pytest.fail("\n".join(self.failed), pytrace=False)
        missing = [path.stem for path in CASES if not self.passed.get(path.stem)]
        if missing:
            pytest.fail(f"{missing} were not run:\n{self.output[-3000:]}", pytrace=False)


def run_cases(backend: str, folder: Path, *options: str) -> Outcome:
    """Run all cases on a backend, with options for pytest."""
    report = folder / "report.xml"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_HOME": os.fspath(folder),  # ignore the user's own settings
        "PYTHONPATH": path,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}"]
    command += [*options, *map(str, CASES)]
    log = folder / "output.txt"
    with log.open("w", encoding="utf-8") as output, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, env=environment, cwd=ROOT, stdout=output,
            stderr=subprocess.STDOUT, timeout=SECONDS, check=False,
        )  # fmt: skip
    failed: list[str] = []
    passed: dict[str, int] = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        file, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        problems = [*case.iter("failure"), *case.iter("error")]
        failed += [f"{file}: {name}\n{one.text}" for one in problems]
        passed[file] = passed.get(file, 0) + (not problems)
    return Outcome(failed, passed, log.read_text(encoding="utf-8", errors="replace"))
