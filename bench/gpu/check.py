"""``make gpu-check``, ``python -m bench gpu``: build, test and benchmark fastema on a GPU.

Within a time limit, the check compiles the kernels, runs the tests marked ``gpu``, races fastema
against its peers, and writes ``bench/results/gpu-<name>.json`` and ``.md``. It uses the installed
Python and packages, and names peers that are missing. ``--device cpu --quick --out DIR`` runs the
same code without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from bench.gpu import smi
from bench.gpu.cases import FULL, MORE, SMALL, DeviceCase
from bench.gpu.clock import Budget, Clock, clock_of
from bench.gpu.extras import Extra, extras
from bench.gpu.race import failure, race
from bench.gpu.targets import targets
from bench.race import machine
from bench.race.question import Question, Settings
from bench.race.report import RESULTS, ROOT, Figure, Row, Rows, number

_TESTS = ("tests/gpu", "tests/torch")
_SHARE_OF_TESTS = 0.45
_MOST_WORKERS = 6
"""Maximum number of test processes, which mostly compile kernels, on one core each."""
_SPARE_S = 15.0
"""Seconds reserved for the case that is running when the time is up, and for the result."""
_TOOLKIT = Path("/usr/local/cuda")

# -- whose kernels ---------------------------------------------------------------------------------

TORCHS, WARNING = "torch's functions", "warning"


class KernelsInUse(NamedTuple):
    """Whose kernels run on a device, and why not ours; empty if ours run."""

    whose: str
    reason: str = ""


def kernels_in_use(device: torch.device) -> KernelsInUse:
    """Update a small average on a device, and return whose kernels did it."""
    import fastema
    from fastema.engine import cuda_group, shipped

    set_cuda_home()  # a kernel that could not be compiled is not tried again
    cuda_group._warned.clear()  # it warns once per device
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fastema.EMA([torch.ones(9, device=device)]).update()
    except Exception as error:
        return KernelsInUse("none", f"{type(error).__name__}: {error}".splitlines()[0][:300])
    slow = [str(one.message) for one in caught if issubclass(one.category, cuda_group.SlowWarning)]
    if slow:
        return KernelsInUse(TORCHS, slow[0])
    ready = shipped.has_kernels("gpu" if device.type == "cuda" else "cpu")
    return KernelsInUse("shipped" if ready else "compiled here")


# -- build ----------------------------------------------------------------------------------------

_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "f32 -> f32": ("float32", {}),
    "f64 -> f64": ("float64", {}),
    "bf16 -> f32": ("bfloat16", {"shadow_dtype": "float32"}),
    "f16 -> f32": ("float16", {"shadow_dtype": "float32"}),
    "bf16 -> bf16, nearest": ("bfloat16", {"rounding": "nearest"}),
    "bf16 -> bf16, stochastic": ("bfloat16", {}),
    "f16 -> f16, stochastic": ("float16", {}),
    "bf16 -> bf16+16": ("bfloat16", {"shadow_dtype": "bf16+16"}),
    "bf16 -> f32, two decays, guard": (
        "bfloat16",
        {
            "decay": (0.99, 0.999),
            "shadow_dtype": "float32",
            "on_nonfinite": "skip",
        },
    ),
}


def _use(weights: list[torch.Tensor], options: dict[str, Any]) -> None:
    import fastema

    ema = fastema.EMA(weights, **options)
    ema.update()
    with ema.swapped(which=0):
        pass


def _window(weights: list[torch.Tensor], options: dict[str, Any]) -> None:
    import fastema

    fastema.SMA(weights, **options).update()


def build(clock: Clock, most: int | None = None) -> Iterator[Row]:
    """Use every kind of kernel twice, and yield the times of the first and the second use.

    ``most`` limits the number of kinds in dry runs.
    """
    jobs: dict[str, tuple[Callable[[list[torch.Tensor], dict[str, Any]], None], str, Any]] = {
        name: (_use, dtype, options) for name, (dtype, options) in _FORMS.items()
    }
    jobs["bf16, windowed mean"] = (_window, "bfloat16", {"window": 3})
    for what, (use, dtype, options) in list(jobs.items())[:most]:
        figures = {}
        try:
            for figure in ("first_ms", "again_ms"):
                # One contiguous and one strided tensor: each needs its own kernel.
                whole = torch.randn(9_001, device=clock.device).to(getattr(torch, dtype))
                began = time.perf_counter()
                use([whole[:5_000], whole[5_001::2]], options)
                clock.wait()
                figures[figure] = (time.perf_counter() - began) * 1e3
        except Exception as error:
            yield failure("Kernels", f"fastema, {what}", error)
        else:
            yield Row("Kernels", what, figures)


def _build_with_warnings(clock: Clock, most: int | None) -> Iterator[Row]:
    """Run `build`, and add fastema's warnings about missing kernels as failures."""
    from fastema.engine import cuda_group

    cuda_group._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield from list(build(clock, most))
    ours = (one for one in caught if one.category.__module__.startswith("fastema"))
    for text in dict.fromkeys(str(one.message) for one in ours):
        yield Row("Kernels", WARNING, missing=text, failed=True)


# -- tests ----------------------------------------------------------------------------------------


def _read_report(path: Path) -> Iterator[Row]:
    """Yield the results in pytest's XML report; without a report, no test passed."""
    written = path.exists() and path.stat().st_size
    cases = list(ElementTree.parse(path).iter("testcase")) if written else []
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skips = (case.find("skipped") for case in cases)
    reasons = Counter(skip.get("message") or "" for skip in skips if skip is not None)
    skipped = sum(reasons.values())
    counts = {"passed": len(cases) - len(failed) - skipped, "failed": len(failed)}
    yield Row("Tests", "pytest -m gpu", {**counts, "skipped": skipped})
    for name in failed:
        yield Row("Tests", name, missing="it failed", failed=True)
    for reason, times in reasons.items():
        yield Row("Tests", f"{times} skipped", missing=reason)


def run_tests(device: torch.device, limit_s: float, select: str = "") -> Iterator[Row]:
    """Run the tests marked ``gpu`` in a subprocess with a time limit, and yield the results.

    Parameters
    ----------
    device
        A GPU, or the CPU for the tests that can run there.
    limit_s
        Time in seconds after which the tests are stopped. Results up to then are still reported.
    select
        Expression for pytest's ``-k``; empty runs all tests.
    """
    if find_spec("pytest") is None:
        yield Row("Tests", "pytest -m gpu", missing="pytest is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", *_TESTS, "-m", "gpu", "-q", f"--junitxml={path}"]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short"]
        if find_spec("xdist") is not None:
            workers = max(min(machine.cores() // 2, _MOST_WORKERS), 1)
            command += ["-n", str(workers), "--dist", "worksteal"]
        command += ["-k", select] if select else []
        # Installed versions vary; their deprecation warnings must not fail the tests.
        for name in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            command += ["-W", f"default::{name}"]
        environment = {**os.environ, "FASTEMA_GPU_TESTS_ON": device.type}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        timed_out = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)  # pytest still writes its report
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        yield from _read_report(path)
    if timed_out or process.returncode:
        reason = "stopped: the time was up" if timed_out else f"status {process.returncode}"
        yield Row("Tests", "pytest", missing=reason, failed=True)


# -- benchmark ------------------------------------------------------------------------------------


def benchmark(cases: list[DeviceCase | Extra], clock: Clock, budget: Budget) -> Iterator[Row]:
    """Race the cases in order, and yield a row for each case that was dropped for lack of time."""
    yield smi.state(clock.device, "before")
    for case in cases:
        if not budget.left():
            yield Row(case.title, "all", missing="dropped, the time was up")
            continue
        began = budget.spent()
        try:
            if isinstance(case, DeviceCase):
                yield from race(case, clock, budget)
            else:
                yield from case.rows(clock)
            clock.release()
        except Exception as error:  # after one failure a device may raise at every call
            yield failure(case.title, "all", error)
        print(f"{case.name}: {budget.spent() - began:.1f} s", file=sys.stderr, flush=True)
    yield smi.state(clock.device, "after")


# -- the question ---------------------------------------------------------------------------------


def _facts(settings: Settings) -> dict[str, Any]:
    check_settings(settings)
    device = torch.device(settings.device)
    used = kernels_in_use(device)
    facts = {"kernels": used.whose, "dry_run": device.type != "cuda" or settings.quick}
    if device.type != "cuda":
        return {"device": "**Dry run on a CPU: no number here says anything**", **facts}
    found = torch.cuda.get_device_properties(device)
    described = (
        found.name,
        f"{found.total_memory / 1e9:.0f} GB",
        f"{found.multi_processor_count} multiprocessors",
        f"L2 {found.L2_cache_size / 1e6:.0f} MB",
        f"capability {found.major}.{found.minor}",
        f"driver {smi.driver(device)}",
    )
    return {"device": ", ".join(described), "card": found.name.removeprefix("NVIDIA "), **facts}


def result_name(settings: Settings) -> str:
    """Return the name of the result's files, without extension.

    It names the card, and says "part" unless every case of the benchmark ran.
    """
    device = torch.device(settings.device)
    if device.type != "cuda":
        return "gpu-dry-run"
    name = torch.cuda.get_device_name(device).lower()
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-").removeprefix("nvidia-")
    whole = "benchmark" in settings.stages and not settings.cases and not settings.quick
    return f"gpu-{name}" + ("" if whole else "-part")


def check_settings(settings: Settings) -> None:
    """Raise SystemExit if there is no GPU, or if a dry run would overwrite results."""
    dry = torch.device(settings.device).type != "cuda"
    if not dry and not torch.cuda.is_available():
        raise SystemExit(
            "torch finds no CUDA device; for a dry run: --device cpu --quick --out DIR"
        )
    kept = settings.out.resolve()
    if (dry or settings.quick) and (kept == RESULTS or RESULTS in kept.parents):
        raise SystemExit("a dry run must not write to bench/results: use --out DIR")


def set_cuda_home() -> None:
    """Set ``CUDA_HOME`` to the default toolkit, unless it or ``CUDA_PATH`` is set."""
    if _TOOLKIT.is_dir() and not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        os.environ["CUDA_HOME"] = str(_TOOLKIT)


def _all_cases(settings: Settings) -> list[DeviceCase | Extra]:
    if settings.quick:
        return [*SMALL, *extras(quick=True)]
    return [*FULL, *extras(quick=False), *MORE]


def cases(settings: Settings) -> list[str]:
    """Return the names of all cases. Cases of a quick run have tiny tensors."""
    return [case.name for case in _all_cases(settings)]


def rows(settings: Settings) -> Rows:
    """Run the chosen stages within the time limit; yield their rows, targets and times.

    Without kernels of ours on the device nothing follows the stage `build`: the tests would all
    fail by a warning, and the benchmark would time torch's functions.
    """
    total = Budget(60 * settings.minutes)
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    clock = clock_of(device)
    chosen = [case for case in _all_cases(settings) if settings.wants(case.name)]
    found: list[Row] = []
    unused = kernels_in_use(device).reason

    def tested() -> Iterator[Row]:
        limit_s = min(_SHARE_OF_TESTS * 60 * settings.minutes, total.left())
        return run_tests(device, limit_s, settings.select)

    stages: dict[str, Callable[[], Iterator[Row]]] = {
        "build": lambda: _build_with_warnings(clock, 3 if settings.quick else None),
        "test": tested,
        "benchmark": lambda: benchmark(chosen, clock, Budget(total.left() - _SPARE_S)),
    }
    seconds = {}
    for stage, measure in stages.items():
        if stage in settings.stages:
            began = total.spent()
            for row in measure():
                found.append(row)
                yield row
            seconds[stage] = total.spent() - began
        warned = [row.missing for row in found if row.entry == WARNING]
        if unused or warned:
            reason = unused or warned[0]
            yield Row("Stopped", "everything after build", missing=reason, failed=True)
            break
    else:
        yield from targets(found, dry_run=device.type != "cuda" or settings.quick)
    for stage, spent in seconds.items():
        yield Row("Time taken", stage, {"seconds": spent})


METHOD = """\
All entries of a group run in turn, A B C A B C ..., in one process; a case whose entries do not all
fit in memory at once has several groups. Figures are medians. Each result was first checked against
a float64 reference. *device* is the time between two device events around a call that was queued
before the device reached it, after reading memory larger than the caches; it includes any waiting
for the device in the call itself. *Timed at: host* marks calls that were not queued in time, such
as loops over a thousand launches, which fill the device's queue: their time is that of the host.
*host* is the time that the call takes on the host with nothing queued. TB/s counts the fewest bytes
that the work needs, whatever an entry really moves; *the copy* is a device-to-device copy of as
many bytes, up to 4 GB, in the same group. Allocations are requests to torch's allocator in one
call; peak MB is the most memory that they take. *Stall* is how long a training step waits for its
average, and *longer* how much more the whole step takes than without one."""

_milliseconds = "{:.4g}".format

QUESTION = Question(
    "fastema on a GPU",
    METHOD,
    rows,
    cases,
    packages=(
        *("numpy", "numba", "torch", "torch-ema", "ema-pytorch", "timm", "diffusers"),
        *("numba-cuda", "cuda-core", "cuda-bindings", "cuda-toolkit", "triton", "apex"),
    ),
    header=_facts,
    result_name=result_name,
    keeps_parts=True,
    figures={
        "first_ms": Figure("first use, ms", number),
        "again_ms": Figure("the next, ms", number),
        "passed": Figure("passed", str),
        "failed": Figure("failed", str),
        "skipped": Figure("skipped", str),
        "device_ms": Figure("device ms", _milliseconds),
        "device_spread_ms": Figure("p20–p80", lambda ends: "–".join(map(_milliseconds, ends))),
        "tbps": Figure("TB/s", number),
        "timed_at": Figure("timed at", str),
        "link_gbps": Figure("GB/s", number),
        "weights_mb": Figure("weights, MB", number),
        "step_ms": Figure("step, ms", number),
        "longer_ms": Figure("longer, ms", number),
        "stall_ms": Figure("stall, ms", number),
        "left_out": Figure("left out", "{:.0%}".format),
        "sm_mhz": Figure("SM, MHz", number),
        "most_sm_mhz": Figure("at most", number),
        "memory_mhz": Figure("memory, MHz", number),
        "watts": Figure("W", number),
        "most_watts": Figure("at most", number),
        "celsius": Figure("°C", number),
        "share_of_copy": Figure("of the copy", "{:.1%}".format),
        "ratio": Figure("time / fastema", number),
        "allocations": Figure("allocations", number),
        "peak_mb": Figure("peak MB", number),
        "group": Figure("group", str),
        "wanted": Figure("wanted", str),
        "measured": Figure("measured", str),
        "met": Figure("", lambda met: "met" if met else "missed"),
        "seconds": Figure("seconds", "{:.0f}".format),
    },
)
