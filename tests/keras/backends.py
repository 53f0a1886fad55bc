"""Cases for Keras run on each of its backends: one process for each, with all of them.

Keras takes its backend when it is imported, for good. A file of cases is a test module that pytest
does not collect by its name, and that can be run by itself too:
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
    """Mark a test that asks nothing of a backend: on all but one it is for full runs."""
    return test if os.environ.get("KERAS_BACKEND") == "torch" else pytest.mark.full(test)


class Outcome(NamedTuple):
    """What a backend's process said: how each test ended, by file, and its output."""

    failed: list[str]
    passed: dict[str, int]
    output: str

    def judge(self) -> None:
        """Fail if a case failed, or if those of a file were not run."""
        if self.failed:
            pytest.fail("\n".join(self.failed), pytrace=False)
        missing = [path.stem for path in CASES if not self.passed.get(path.stem)]
        if missing:
            pytest.fail(f"{missing} were not run:\n{self.output[-3000:]}", pytrace=False)


def run(backend: str, folder: Path, *options: str) -> Outcome:
    """Run all cases on a backend, with options for pytest."""
    report = folder / "report.xml"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_HOME": os.fspath(folder),  # whoever runs this may have settings of their own there
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
