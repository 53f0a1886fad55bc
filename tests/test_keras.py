"""fastema.keras on TensorFlow, PyTorch and JAX: one process each, one test per case.

Keras takes its backend when it is imported, for good. The cases are the tests of keras_cases.py,
and run there by themselves too: ``KERAS_BACKEND=jax pytest tests/keras_cases.py``.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from .conftest import ROOT
from .needed import modules

CASES = Path(__file__).with_name("keras_cases.py")
NAMES = [
    node.name
    for node in ast.parse(CASES.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
BACKENDS = (
    pytest.param("tensorflow", marks=pytest.mark.tensorflow),
    "torch",
    "jax",
)
SECONDS = 600


class Outcome(NamedTuple):
    """What a backend's process said: failures by case, the cases that passed, and its output."""

    failed: dict[str, list[str]]
    passed: set[str]
    output: str


def _run(backend: str, cases: list[str], folder: Path) -> Outcome:
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
    command += [f"{CASES}::{case}" for case in cases]
    log = folder / "output.txt"
    with log.open("w", encoding="utf-8") as output, suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, env=environment, cwd=CASES.parents[1], stdout=output,
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


@pytest.fixture(scope="session")
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    """The outcome on a backend of the cases that this run is to show."""
    known: dict[str, Outcome] = {}

    def of(backend: str) -> Outcome:
        if backend not in known:
            wanted = [
                item.callspec.params["case"]
                for item in request.session.items
                if getattr(item, "callspec", None) is not None
                and item.callspec.params.get("backend") == backend
                and "case" in item.callspec.params
            ]
            known[backend] = _run(backend, wanted, tmp_path_factory.mktemp(backend))
        return known[backend]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_case(backend: str, case: str, outcome: Callable[[str], Outcome]) -> None:
    modules("keras", "safetensors", backend)
    found = outcome(backend)
    if case in found.failed:
        pytest.fail("\n".join(found.failed[case]), pytrace=False)
    if case not in found.passed:
        pytest.fail(f"it was not run:\n{found.output[-3000:]}", pytrace=False)
