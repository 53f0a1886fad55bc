"""What tests share: numbers to compute with, guarded memory, and fresh interpreters."""

from __future__ import annotations

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

import numpy as np
import pytest
from hypothesis import settings

import fastema
from fastema.engine import cpu
from fastema.engine.program import Program
from fastema.engine.registry import kernel
from fastema.kernels import table as abi
from fastema.layout.device_context import LaunchArgs
from fastema.layout.dtypes import DTYPES
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

from .support.matrix import reduced
from .support.peak import overall_peak
from .support.requirements import missing_packages

# The first example of a kernel may take as long as compiling it. Where a change is judged, it is
# judged by the same examples each time; new ones are for those who can look into them.
settings.register_profile("fastema", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fastema")

# The backend is chosen when Keras is imported: here, one that is there.
os.environ.setdefault("KERAS_BACKEND", "torch")

# Tensors of a few numbers: where every core runs tests, PyTorch's threads wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(fastema.__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs every case."""
    parser.addoption("--full", action="store_true", help="every combination of wide matrices")


def pytest_configure(config: pytest.Config) -> None:
    """Have TensorBoard do without TensorFlow, which takes seconds, where no test needs it."""
    if "not tensorflow" in config.option.markexpr:
        name = "tensorboard.compat.notf"  # what TensorBoard itself looks for
        sys.modules.setdefault(name, ModuleType(name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many processes as this one may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


# After -k and -m: a case that was asked for by its name is always run.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what wide matrices say twice, and what is for full runs alone."""
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
    kept = reduced([(test, spec.params) for test, spec in specs], thin)
    left_out |= {id(item) for number, item in enumerate(cases) if number not in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]


_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
_PAGES = Path("/proc/self/statm")
_resident = [0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Give the system back what tests have freed: JAX's compiled functions take hundreds of MB."""
    if _PAGES.exists():
        now = int(_PAGES.read_text().split()[1])
        if now > _resident[0] + (1 << 14):  # 64 MB
            if "jax" in sys.modules:
                sys.modules["jax"].clear_caches()
            _trim(0)
            _resident[0] = int(_PAGES.read_text().split()[1])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the collector what is imported for good: trainers collect garbage again and again."""
    gc.collect()
    gc.freeze()


PEAKS: dict[str, int] = {}
"""Most memory that each process has had, in MB."""


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Note what a worker says as it ends."""
    PEAKS[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Say, or as a worker hand on, how much memory the tests took."""
    megabytes = overall_peak() >> 20
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = megabytes
    elif not PEAKS:
        PEAKS["this process"] = megabytes


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the peaks, and which files were left out."""
    for path, missing in sorted(LACKING.items()):
        terminalreporter.write_line(f"not collected: {path}, which needs {', '.join(missing)}")
    peaks = ", ".join(f"{name} {peak:,} MB" for name, peak in sorted(PEAKS.items()))
    terminalreporter.write_line(f"peak memory: {peaks}")


LACKING: dict[str, tuple[str, ...]] = {}
"""Files that are not collected, and the packages that they need."""


def _lacks_packages(path: Path) -> bool:
    if path.suffix != ".py" or not (missing := missing_packages(path)):
        return False
    if "CI" in os.environ:
        pytest.exit(f"{path} needs {', '.join(missing)}: not installed", 1)
    LACKING[path.relative_to(Path(__file__).parent).as_posix()] = missing
    return True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without tests that are asked for: what they import takes memory and time."""
    wanted = config.option.markexpr
    if "not tensorflow" in wanted and "tensorflow" in collection_path.name:
        return True
    if _lacks_packages(collection_path):
        return True
    mark = wanted.partition(" ")[0]
    if mark not in ("slow", "tensorflow") or not collection_path.name.startswith("test_"):
        return None
    return None if mark in collection_path.read_text(encoding="utf-8") else True


STORAGE = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "c64": np.complex64,
    "c128": np.complex128,
    "bool": np.bool_,
    **{f"i{8 * n}": np.dtype(f"i{n}").type for n in (1, 2, 4, 8)},
    **{f"u{8 * n}": np.dtype(f"u{n}").type for n in (1, 2, 4, 8)},
}
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@pytest.fixture(scope="session")
def bits() -> Callable[[np.ndarray], np.ndarray]:
    """Any array as unsigned integers, so that every bit is compared; complex ones as two."""

    def view(array: np.ndarray) -> np.ndarray:
        size = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
        return np.ascontiguousarray(array).reshape(-1).view(WORD[size])

    return view


def _is_nan(array: np.ndarray, code: str) -> np.ndarray:
    if code == "bf16":
        return (array & 0x7FFF) > 0x7F80
    reals = array.reshape(-1).view(array.real.dtype) if array.dtype.kind == "c" else array
    return np.isnan(reals) if reals.dtype.kind == "f" else np.zeros(reals.shape, bool)


@pytest.fixture(scope="session")
def assert_same(bits: Callable[..., np.ndarray]) -> Callable[[np.ndarray, np.ndarray, str], None]:
    """Equal to the bit, except that any NaN equals any NaN."""

    def check(got: np.ndarray, want: np.ndarray, code: str) -> None:
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        nan_got, nan_want = _is_nan(got, code).reshape(-1), _is_nan(want, code).reshape(-1)
        np.testing.assert_array_equal(nan_got, nan_want)
        a, b = bits(got), bits(want)
        wrong = np.flatnonzero((a != b) & ~nan_want)
        assert not wrong.size, (
            f"{wrong.size} of {a.size} {code} differ, the first at {wrong[0]}: "
            f"{a[wrong[0]]:#x}, expected {b[wrong[0]]:#x}"
        )

    return check


@pytest.fixture(scope="session")
def numbers() -> Callable[..., np.ndarray]:
    """``numbers(size, code, seed)``: stored weights-like numbers, none of them zero.

    ``kind="bits"`` gives every pattern there is (NaN, infinities, subnormals), evenly.
    """

    def make(size: int, code: str, seed: int = 0, kind: str = "weights") -> np.ndarray:
        generator = np.random.default_rng([seed, len(code), DTYPES[code].itemsize])
        storage = np.dtype(STORAGE[code])
        if code == "bool":
            return generator.integers(0, 2, size).astype(bool)
        if kind == "bits" or DTYPES[code].real is None:
            return generator.integers(0, 256, size * storage.itemsize, np.uint8).view(storage)
        parts = DTYPES[code].parts
        values = generator.normal(size=size * parts) * 2.0 ** generator.integers(
            -6, 3, size * parts
        )
        if code == "bf16":
            return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        real = np.empty(0, storage).real.dtype
        return values.astype(real).view(storage)

    return make


class Guarded:
    """Memory of which only some elements may be written: the rest is watched.

    ``array`` lies ``start`` elements from a cache line, within poison on both sides; gaps of a
    strided view are watched too.
    """

    def __init__(self, array: np.ndarray, poison: np.ndarray, owned: np.ndarray) -> None:
        self.array = array
        self._poison = poison  # the whole memory, in bytes
        self._owned = owned  # which of its bytes belong to the array
        self._before = poison.copy()

    def assert_rest_untouched(self) -> None:
        """Assert that nothing but the array's elements has changed."""
        changed = (self._poison != self._before) & ~self._owned
        assert not changed.any(), f"written outside, at byte {np.flatnonzero(changed)[0]}"

    def assert_untouched(self) -> None:
        """Assert that nothing has changed at all."""
        np.testing.assert_array_equal(self._poison, self._before)


@pytest.fixture(scope="session")
def guarded() -> Callable[..., Guarded]:
    """``guarded(values, start, strides)``: values laid out in watched, poisoned memory.

    Parameters are the values as stored, the first element's distance from a cache line, and
    strides in elements (dense where not given; negative ones lie before the first element).
    """

    def make(values: np.ndarray, start: int = 0, strides: tuple[int, ...] | None = None) -> Guarded:
        size = values.itemsize
        if strides is None:
            strides = tuple(step // size for step in np.empty(values.shape, values.dtype).strides)
        spans = [(n - 1) * s for n, s in zip(values.shape, strides, strict=True) if n > 0]
        before = -sum(span for span in spans if span < 0)
        length = before + sum(span for span in spans if span > 0) + 1
        margin = 64 + start * size
        raw = np.full(64 + margin + length * size + 256, 0xA5, np.uint8)
        first = -raw.ctypes.data % 64 + margin + before * size
        steps = tuple(s * size for s in strides)
        array = np.ndarray(values.shape, values.dtype, raw, first, steps)
        owned = np.zeros(raw.shape, bool)
        if values.size:
            array[...] = values
            index = np.ndarray(
                values.shape, np.int64, np.arange(raw.size), first * 8, tuple(s * 8 for s in steps)
            )
            owned[(index.reshape(-1, 1) + np.arange(size)).reshape(-1)] = True
        return Guarded(array, raw, owned)

    return make


def _spec_of(array: np.ndarray, code: str) -> TensorSpec:
    steps = tuple(step // array.itemsize for step in array.strides)
    return TensorSpec(array.ctypes.data, array.shape, steps, code, "cpu", owner=array)


@pytest.fixture(scope="session")
def spec_of() -> Callable[[np.ndarray, str], TensorSpec]:
    """``spec_of(array, code)``: a NumPy array described as of any dtype (bfloat16 as uint16)."""
    return _spec_of


@pytest.fixture(scope="session")
def run_rows() -> Callable[..., None]:
    """``run_rows(operation, dst, src, layout, rows, weight)``: a kernel on a table made by hand.

    Rows are (array, array) or (array, array, step, step); ``dst`` and ``src`` kernel formats.
    """

    def run(
        operation: str, dst: str, src: str, layout: str, rows: Any, weight: float = 0.0
    ) -> None:
        table = np.zeros((len(rows), abi.COLUMNS), np.int64)
        for cells, (to, of, *steps) in zip(table, rows, strict=True):
            cells[[abi.DST, abi.SRC, abi.COUNT]] = to.ctypes.data, of.ctypes.data, to.size
            cells[[abi.DST_STEP, abi.SRC_STEP]] = steps or (1, 1)
        numbers, control = np.array([weight]), np.zeros(abi.CONTROLS, np.int64)
        control[abi.CLAIM] = 1
        made = kernel(operation, (dst, src), layout)
        made(table.ctypes.data, len(table), numbers.ctypes.data, control.ctypes.data)

    return run


@pytest.fixture(scope="session")
def run_pairs() -> Callable[..., Program]:
    """``run_pairs(operation, [(dst, src), ...], dst, src, weight)``: arrays through the engine."""

    def run(operation: str, sides: Any, dst: str, src: str, weight: float = 0.0) -> Program:
        pairs = [
            Pair(f"t{i}", _spec_of(a, dst), _spec_of(b, src)) for i, (a, b) in enumerate(sides)
        ]
        program = Program({"all": pairs})
        program.run({"all": operation}, LaunchArgs((weight,)))
        return program

    return run


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``set_num_threads`` for one test."""
    before = cpu.get_num_threads()
    yield cpu.set_num_threads
    cpu.set_num_threads(before)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers are woken for a few kilobytes, so that small tensors are shared out too."""
    monkeypatch.setattr(cpu, "BYTES_PER_THREAD", 1 << 12)


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    # The same fastema, whichever way this one was found.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    wanted: dict[str, str | None] = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: value for name, value in wanted.items() if value is not None}


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """``python(script, **environment)``: what a fresh interpreter prints; it must end well.

    A hanging one is killed with everything it started, and fails the test. ``quiet`` asserts that
    nothing was written to standard error. None removes a variable.
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
