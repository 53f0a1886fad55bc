"""The runner of the peers' own tests, on a made-up suite."""

from pathlib import Path

import pytest

from .gate.__main__ import main
from .gate.suites import SUITES, Suite

AVERAGE = """
import multiprocessing
import pytest
import torch
from torch_ema import ExponentialMovingAverage

def average():
    return ExponentialMovingAverage([torch.ones(2)], 0.5)
"""

GOOD = """
def test_ours():
    assert average().decay == 0.5

def send_home(queue):
    queue.put(ExponentialMovingAverage.__module__)

def test_spawned_process_has_ours():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=send_home, args=(queue,))
    process.start()
    home = type(average()).__module__
    assert queue.get(timeout=100) == home == "fastema.compat.torch_ema.classes"
    process.join()

def test_mended():
    assert average().decay == 2, "a mended bug"

@pytest.mark.skip(reason="no such device")
def test_device():
    pass
"""

BAD = """
def test_broken():
    assert average() is None

def test_foreign():
    pass

def test_mended():
    average()

def test_mended_otherwise():
    raise ValueError("something else")
"""


def made_up(file: str, **options: object) -> Suite:
    return Suite(
        peer="torch_ema",
        distribution="torch-ema",
        repository="https://example.org/someone/made_up",
        tag="v{version}",
        files=(f"tests/{file}",),
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    pytest.importorskip("torch_ema")
    tests = tmp_path / "made_up" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_good.py").write_text(AVERAGE + GOOD, encoding="utf-8")
    (tests / "test_bad.py").write_text(AVERAGE + BAD, encoding="utf-8")
    return tmp_path


def test_absent_suite_is_an_error_with_the_command_that_gets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_ema")
    assert main(["torch_ema", "--sources", str(tmp_path)]) == 1
    command = f"git clone --depth 1 --branch v0.3.0 {SUITES['torch_ema'].repository}"
    assert f"{command} {tmp_path}/pytorch_ema" in capsys.readouterr().out


def test_missing_module_of_tests_is_named(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suites = {"it": made_up("test_good.py", needs=("no_such_module",))}
    assert main(["it", "--sources", str(sources)], suites) == 1
    assert "pip install no_such_module" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.torch
def test_explained_suite_passes(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suites = {"it": made_up("test_good.py", differs={"::test_mended$": ("why", "a mended bug")})}
    assert main(["--sources", str(sources)], suites) == 0
    out = capsys.readouterr().out
    assert ": 2 passed, 0 failed, 1 differs, 1 left out; tests that ran our code: 3 of 3" in out
    assert "left out: test_good.py::test_device: no such device" in out


@pytest.mark.full
@pytest.mark.torch
def test_unexplained_failures_and_idle_tests_are_named(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    differs = {"::test_mended": ("why", "a mended bug"), "::test_gone": ("why", "")}
    assert main(["--sources", str(sources)], {"it": made_up("test_bad.py", differs=differs)}) == 1
    out = capsys.readouterr().out
    assert ": 1 passed, 3 failed, 0 differs, 0 left out; tests that ran our code: 2 of 4" in out
    assert "failed: test_bad.py::test_broken" in out
    assert "failed: test_bad.py::test_mended: [XPASS(strict)]" in out
    assert "failed: test_bad.py::test_mended_otherwise: expected 'a mended bug' in" in out
    assert "ran none of our code: test_bad.py::test_foreign" in out
    assert "no test is named ::test_gone" in out
