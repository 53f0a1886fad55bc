"""Cases for Keras run on each of its backends: one process each, one test per case.

Keras takes its backend when it is imported, for good. A file of cases is a test module that pytest
does not collect by its name, and that can be run by itself too:
``KERAS_BACKEND=jax pytest tests/keras_loss_cases.py``.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from xml.etree import ElementTree

import pytest

from .conftest import ROOT
from .needed import modules

BACKENDS: Final = (
    pytest.param("tensorflow", marks=pytest.mark.tensorflow),
    "torch",
    "jax",
)
SECONDS = 600


def names(cases: Path) -> list[str]:
    """The tests in a file of cases."""
    return [
        node.name
        for node in ast.parse(cases.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


class Outcome(NamedTuple):
    """What a backend's process said: failures by case, the cases that passed, and its output."""

    failed: dict[str, list[str]]
    passed: set[str]
    output: str

    def judge(self, case: str) -> None:
        """Fail if a case failed, or was not run."""
        if case in self.failed:
            pytest.fail("\n".join(self.failed[case]), pytrace=False)
        if case not in self.passed:
            pytest.fail(f"it was not run:\n{self.output[-3000:]}", pytrace=False)


def _run(cases: Path, backend: str, chosen: list[str], folder: Path) -> Outcome:
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
    command += [f"{cases}::{case}" for case in chosen]
    log = folder / "output.txt"
    with log.open("w", encoding="utf-8") as output, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, env=environment, cwd=cases.parents[1], stdout=output,
            stderr=subprocess.STDOUT, timeout=SECONDS, check=False,
        )  # fmt: skip
    failed: dict[str, list[str]] = {}
    passed: set[str] = set()
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        name = case.get("name", "")
        problems = [*case.iter("failure"), *case.iter("error")]
        if problems:
            texts = [f"{name}\n{one.text}" for one in problems]
            failed.setdefault(name.partition("[")[0], []).extend(texts)
        else:
            passed.add(name.partition("[")[0])
    return Outcome(failed, passed, log.read_text(encoding="utf-8", errors="replace"))


def outcomes(
    cases: Path, request: pytest.FixtureRequest, folders: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    """The outcome on a backend of the cases that this run is to show."""
    known: dict[str, Outcome] = {}

    def of(backend: str) -> Outcome:
        modules("keras", backend)
        if backend not in known:
            wanted = [
                item.callspec.params["case"]
                for item in request.session.items
                if getattr(item, "callspec", None) is not None
                and item.path.name == request.path.name
                and item.callspec.params.get("backend") == backend
                and "case" in item.callspec.params
            ]
            known[backend] = _run(cases, backend, wanted, folders.mktemp(backend))
        return known[backend]

    return of
