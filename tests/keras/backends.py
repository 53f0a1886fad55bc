"""Run all cases for Keras on each of its backends, in one process per backend.

Keras chooses its backend once, when it is imported. A file of cases is a test module whose name
pytest does not collect; it also runs by itself:
``KERAS_BACKEND=jax pytest tests/keras/losses_cases.py``.
"""

import os
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest

from ..support.process import ROOT, run_python

HERE: Final = Path(__file__).parent
CASES: Final = tuple(
    HERE / f"{name}_cases.py" for name in ("weights", "evaluation", "losses", "losses_runs", "swap")
)
SECONDS = 1200


def on_one_backend(test: Any) -> Any:
    """Mark a test that no backend affects: all backends but one run it only with --full."""
    return test if os.environ.get("KERAS_BACKEND") == "torch" else pytest.mark.full(test)


def run_cases(backend: str, folder: Path, *options: str) -> None:
    """Run all cases on a backend; fail if a case failed or if no case of a file passed."""
    report = folder / "report.xml"
    environment = {
        "KERAS_BACKEND": backend,
        "KERAS_HOME": os.fspath(folder),  # ignore the user's own settings
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of machine code: its compilation takes the time
    }
    command = ["-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *options, *CASES]
    done = run_python(*command, environment=environment, cwd=ROOT, timeout=SECONDS)
    failed: list[str] = []
    passed: set[str] = set()
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        file, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        problems = [*case.iter("failure"), *case.iter("error")]
        failed += [f"{file}: {name}\n{one.text}" for one in problems]
        passed |= set() if problems else {file}
    missing = [path.stem for path in CASES if path.stem not in passed]
    if failed or missing:
        text = "\n".join(failed) or f"{missing} were not run:\n{done.stdout[-3000:]}{done.stderr}"
        pytest.fail(text, pytrace=False)
