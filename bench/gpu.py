"""``make gpu-check``, ``python -m bench.gpu``: fastema on a GPU, built, tested and measured.

Within the time given it compiles the kernels, runs the tests marked ``gpu``, races fastema against
its peers, and writes ``bench/results/gpu-<name>.json`` and ``.md``. It takes the Python and the
packages that are there and leaves out, by name, what is not. ``--device cpu --small --out DIR``
runs the same lines without a GPU.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import gpu_report, machine, report
from bench.gpu_cases import FULL, SMALL, DeviceCase
from bench.gpu_clock import Budget, Clock, clock_of
from bench.gpu_race import Outcome, race

STAGES = ("build", "test", "benchmark")
MINUTES = 7.5

_TESTS = ("tests/gpu", "tests/torch")
_SHARE_OF_TESTS = 0.45
_MOST_WORKERS = 6
"""Most of the tests' time goes into compiling kernels, on one core each."""
_SPARE_S = 15.0
"""What is kept for the case that is running when the time is up, and for writing the result."""
_PACKAGES = ("numba-cuda", "cuda-core", "cuda-bindings", "cuda-toolkit", "triton", "apex")
_TOOLKIT = Path("/usr/local/cuda")

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
    "bf16 -> f32, two decays, guard, drift": (
        "bfloat16",
        {
            "decay": (0.99, 0.999),
            "shadow_dtype": "float32",
            "on_nonfinite": "skip",
            "drift": True,
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


def build(clock: Clock, most: int | None = None) -> list[dict[str, Any]]:
    """Use every kind of kernel once, and once more, and return what that took.

    ``most`` is for dry runs: no more than the first so many.
    """
    jobs: dict[str, tuple[Callable[[list[torch.Tensor], dict[str, Any]], None], str, Any]] = {
        name: (_use, dtype, options) for name, (dtype, options) in _FORMS.items()
    }
    jobs["bf16, windowed mean"] = (_window, "bfloat16", {"window": 3})
    rows = []
    for what, (use, dtype, options) in list(jobs.items())[:most]:
        row: dict[str, Any] = {"what": what, "first_ms": None, "again_ms": None, "error": None}
        for column in ("first_ms", "again_ms"):
            # Without gaps and with them: a kernel each.
            whole = torch.randn(9_001, device=clock.device).to(getattr(torch, dtype))
            began = time.perf_counter()
            try:
                use([whole[:5_000], whole[5_001::2]], options)
                clock.wait()
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
                break
            row[column] = (time.perf_counter() - began) * 1e3
        rows.append(row)
    return rows


# -- tests ----------------------------------------------------------------------------------------


def _reported(path: Path) -> dict[str, Any]:
    """Read what pytest reported; all of it is missing where it wrote nothing."""
    failures: list[str] = []
    reasons: Counter[str] = Counter()
    total = 0
    if path.exists() and path.stat().st_size:
        for case in ElementTree.parse(path).iter("testcase"):
            total += 1
            name = f"{case.get('classname')}.{case.get('name')}"
            if case.find("failure") is not None or case.find("error") is not None:
                failures.append(name)
            elif (skipped := case.find("skipped")) is not None:
                reasons[skipped.get("message") or ""] += 1
    skipped_count = sum(reasons.values())
    return {
        "passed": total - len(failures) - skipped_count,
        "failed": len(failures),
        "skipped": skipped_count,
        "failures": failures,
        "reasons": dict(reasons),
    }


def run_tests(device: torch.device, limit_s: float, select: str = "") -> dict[str, Any]:
    """Run the tests marked ``gpu`` in a process of their own, for as long as they may take.

    Parameters
    ----------
    device
        A GPU, or the CPU for those that run there too.
    limit_s
        Then they are stopped, and what they found so far is returned.
    select
        Only those that pytest's ``-k`` selects by it.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", *_TESTS, "-m", "gpu", "-q", f"--junitxml={path}"]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short"]
        if find_spec("xdist") is not None:
            workers = max(min(machine.cores() // 2, _MOST_WORKERS), 1)
            command += ["-n", str(workers), "--dist", "loadfile"]
        command += ["-k", select] if select else []
        # Of whatever versions are here; what they will drop some day is not the question.
        for name in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
            command += ["-W", f"default::{name}"]
        environment = {**os.environ, "FASTEMA_GPU_TESTS_ON": device.type}
        process = subprocess.Popen(
            command, cwd=report.ROOT, env=environment, start_new_session=True
        )
        timed_out = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)  # it still reports what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = _reported(path)
    return {
        **found,
        "timed_out": timed_out,
        "status": process.returncode,
        "seconds": time.perf_counter() - began,
    }


# -- benchmark ------------------------------------------------------------------------------------


def benchmark(
    cases: list[DeviceCase],
    clock: Clock,
    outcome: Outcome,
    budget: Budget,
    keep: Callable[[], object],
) -> None:
    """Run the cases in order, and keep what there is after each.

    Those that no time is left for are named in the outcome.
    """
    for case in cases:
        if not budget.left():
            outcome.dropped.append(case.name)
            continue
        began = budget.spent()
        try:
            race(case, clock, outcome, budget)
            clock.release()
        except Exception as error:  # a device that failed once may raise at every call
            outcome.fail(case, "all", error)
        keep()
        print(f"{case.name}: {budget.spent() - began:.1f} s", file=sys.stderr, flush=True)


# -- the result -----------------------------------------------------------------------------------


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _described(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        name = machine.cpu_model()
        facts = dict.fromkeys(("memory_gb", "multiprocessors", "l2_mb", "capability", "driver"))
        return {"name": name, **facts}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_gb": found.total_memory / 1e9,
        "multiprocessors": found.multi_processor_count,
        "l2_mb": found.L2_cache_size / 1e6,
        "capability": f"{found.major}.{found.minor}",
        "driver": _driver(),
    }


def _header(command: str, device: torch.device) -> dict[str, Any]:
    header: dict[str, Any] = machine.header(command, "gpu")
    for package in _PACKAGES:
        try:
            header["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    return {**header, "device": _described(device)}


def stem(device: torch.device, part: bool) -> str:
    """Return the name of the result's files, without their endings."""
    if device.type != "cuda":
        return "gpu-dry-run"
    name = torch.cuda.get_device_name(device).lower()
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-").removeprefix("nvidia-")
    return f"gpu-{name}" + ("-part" if part else "")


def _write(result: dict[str, Any], folder: Path, name: str) -> str:
    text = gpu_report.markdown(result)
    report.store(folder, name, result, text)
    return text


def succeeded(result: dict[str, Any]) -> bool:
    """Whether all of fastema worked, in the time there was; targets are another matter."""
    tests = result["tests"]
    return not (
        result["warnings"]
        or any(row["error"] for row in result["build"])
        or (tests is not None and (tests["failed"] or tests["timed_out"] or tests["status"]))
        or any(row["entry"].startswith(("fastema", "all")) for row in result["failed"])
    )


def name_toolkit() -> None:
    """Say where the compiler of GPU kernels may look for its library, where nobody else does."""
    if _TOOLKIT.is_dir() and not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        os.environ["CUDA_HOME"] = str(_TOOLKIT)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu is a dry run")
    parser.add_argument("--small", action="store_true", help="tiny tensors, for a dry run")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only these cases")
    parser.add_argument("--select", default="", metavar="EXPR", help="only these tests (-k)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    dry = options.device.type != "cuda"
    if not dry and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --small --out DIR is a dry run")
    kept = options.out.resolve()
    if (dry or options.small) and (kept == report.RESULTS or report.RESULTS in kept.parents):
        parser.error("a dry run belongs elsewhere than bench/results: --out DIR")
    cases = SMALL if options.small else FULL
    known = {part for case in cases for part in (case.name, *case.name.split(":"))}
    if unknown := [name for name in options.case if name not in known]:
        names = ", ".join(case.name for case in cases)
        parser.error(f"no case is called {unknown[0]!r}; there are: {names}")
    options.cases = [
        case
        for case in cases
        if not options.case or {case.name, *case.name.split(":")} & set(options.case)
    ]
    return options


def _caught(clock: Clock, most: int | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Build, and collect what fastema warns of: kernels that it had to do without."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = build(clock, most)
    ours = (one for one in caught if one.category.__module__.startswith("fastema"))
    return rows, list(dict.fromkeys(str(one.message) for one in ours))


def main(arguments: list[str] | None = None) -> int:
    budget = Budget(float("inf"))
    options = _options(arguments)
    device: torch.device = options.device
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    name_toolkit()
    total_s = 60 * options.minutes
    whole = not options.case and not options.select and set(options.only) == set(STAGES)
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    result: dict[str, Any] = {
        "dry_run": device.type != "cuda" or options.small,
        "complete": False,
        "header": _header(f"python -m bench.gpu {given}".strip(), device),
        "seconds": {},
        "warnings": [],
        "build": [],
        "tests": None,
        "targets": [],
        "rows": [],
        "skipped": [],
        "failed": [],
        "dropped": [],
    }
    clock = clock_of(device)

    def keep() -> str:
        result["targets"] = gpu_report.targets(result["rows"])
        return _write(result, options.out, stem(device, not whole or options.small))

    def ended(stage: str, began: float) -> None:
        result["seconds"][stage] = budget.spent() - began
        keep()

    if "build" in options.only:
        began = budget.spent()
        result["build"], result["warnings"] = _caught(clock, 3 if options.small else None)
        ended("build", began)
    if "test" in options.only:
        began = budget.spent()
        limit_s = min(_SHARE_OF_TESTS * total_s, total_s - began)
        result["tests"] = run_tests(device, limit_s, options.select)
        ended("tests", began)
    if "benchmark" in options.only:
        began = budget.spent()
        outcome = Outcome(result["rows"], result["skipped"], result["failed"], result["dropped"])
        benchmark(options.cases, clock, outcome, Budget(total_s - began - _SPARE_S), keep)
        ended("benchmark", began)
    result["complete"] = True
    print(keep())
    return 0 if succeeded(result) else 1


if __name__ == "__main__":
    sys.exit(main())
