"""Shared hooks and fixtures: test selection, memory reports, and new interpreters."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

import fastema
from fastema.engine import cpu
from fastema.engine import threads as engine_threads
from fastema.kernels import run_table

from .support.matrix import reduce_cases
from .support.peak import overall_peak
from .support.requirements import find_missing_packages

# The first example of a kernel may take as long as compiling it. CI uses the same examples in
# every run; new examples are for developers who can look into them.
settings.register_profile("fastema", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fastema")

# Keras chooses its backend when it is imported: choose one that is installed.
os.environ.setdefault("KERAS_BACKEND", "torch")

# Tensors are tiny: with tests on every core, PyTorch's threads would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(fastema.__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--full``, which runs every case."""
    parser.addoption("--full", action="store_true", help="every combination of wide matrices")


def pytest_configure(config: pytest.Config) -> None:
    """Keep TensorBoard from importing TensorFlow, which takes seconds, if no test needs it."""
    if "not tensorflow" in config.option.markexpr:
        name = "tensorboard.compat.notf"  # what TensorBoard itself looks for
        sys.modules.setdefault(name, ModuleType(name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


# After -k and -m: a case that was selected by name always runs.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect redundant cases of wide matrices, and tests for full runs only."""
    if config.option.full:
        return
    left_out = {id(item) for item in items if item.get_closest_marker("full")}
    cases = [item for item in items if hasattr(item, "callspec") and id(item) not in left_out]
    specs = [(item.nodeid.split("[")[0], item.callspec) for item in cases]
    thin = {
        test
        for item, (test, _) in zip(cases, specs, strict=True)
        if item.get_closest_marker("each_value")
    }
    kept = reduce_cases([(test, spec.params) for test, spec in specs], thin)
    left_out |= {id(item) for number, item in enumerate(cases) if number not in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]


_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
_PAGES = Path("/proc/self/statm")
_resident = [0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Return freed memory to the system: JAX's compiled functions take hundreds of MB."""
    if _PAGES.exists():
        now = int(_PAGES.read_text().split()[1])
        if now > _resident[0] + (1 << 14):  # 64 MB
            if "jax" in sys.modules:
                sys.modules["jax"].clear_caches()
            _trim(0)
            _resident[0] = int(_PAGES.read_text().split()[1])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude imported objects from garbage collection, which trainers run again and again."""
    gc.collect()
    gc.freeze()


PEAKS: dict[str, int] = {}
"""The peak memory of each process, in MB."""


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Record the peak memory that a worker reports as it ends."""
    PEAKS[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Record the peak memory of the tests; a worker sends it to the controller."""
    megabytes = overall_peak() >> 20
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = megabytes
    elif not PEAKS:
        PEAKS["this process"] = megabytes


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the memory peaks, and which files were not collected."""
    for path, missing in sorted(LACKING.items()):
        terminalreporter.write_line(f"not collected: {path}, which needs {', '.join(missing)}")
    peaks = ", ".join(f"{name} {peak:,} MB" for name, peak in sorted(PEAKS.items()))
    terminalreporter.write_line(f"peak memory: {peaks}")


LACKING: dict[str, tuple[str, ...]] = {}
"""Files that are not collected, and the packages that they lack."""


def _lacks_packages(path: Path) -> bool:
    if path.suffix != ".py" or not (missing := find_missing_packages(path)):
        return False
    if "CI" in os.environ:
        pytest.exit(f"{path} needs {', '.join(missing)}: not installed", 1)
    LACKING[path.relative_to(Path(__file__).parent).as_posix()] = missing
    return True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore files without selected tests: their imports take memory and time."""
    wanted = config.option.markexpr
    if "not tensorflow" in wanted and "tensorflow" in collection_path.name:
        return True
    if _lacks_packages(collection_path):
        return True
    mark = wanted.partition(" ")[0]
    if mark not in ("slow", "tensorflow") or not collection_path.name.startswith("test_"):
        return None
    return None if mark in collection_path.read_text(encoding="utf-8") else True


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``set_num_threads``, undone after the test."""
    before = engine_threads.TEAM.copy()
    yield engine_threads.set_num_threads
    engine_threads.set_num_threads(int(before[run_table.POOL]))
    engine_threads.TEAM[:] = before


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use several threads for a few kilobytes, so that small tensors are split too."""
    monkeypatch.setattr(cpu, "BYTES_PER_THREAD", 1 << 12)
    monkeypatch.setattr(cpu, "BYTES_PER_HELPER", 1 << 12)


@pytest.fixture
def no_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Keras' set_random_seed from importing TensorFlow, which takes half a gigabyte."""
    if "tensorflow" not in sys.modules:
        from keras.src.utils import module_utils

        monkeypatch.setattr(module_utils.tensorflow, "_available", False)


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    # The child must import the same fastema, however this process found it.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    wanted: dict[str, str | None] = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: value for name, value in wanted.items() if value is not None}


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """``python(script, **environment)`` returns what a script prints in a new interpreter.

    It must exit with status 0. If it hangs, it is killed with all its children and the test fails.
    ``quiet`` asserts that nothing was written to standard error. None removes a variable.
    """

    def run(
        script: str,
        *arguments: str,
        timeout: float = 300.0,
        quiet: bool = True,
        **environment: str | None,
    ) -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *arguments],
            env=_environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"still running after {timeout} s\n{out}\n{err}")
        assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{err}"
        assert not (quiet and err), err
        return out

    return run
