"""``fastema doctor``: report what is installed, what works, and what an update costs here."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

SUMMARY = "Check the installation: versions, devices, kernels against references, speed."
EXTRA = ""
NEEDS: dict[str, str] = {}

_EXTRAS = {
    "torch": ("torch", "PyTorch models"),
    "jax": ("jax", "JAX pytrees"),
    "keras": ("keras", "Keras models and callbacks"),
    "tensorflow": ("tensorflow", "TensorFlow variables"),
    "cupy": ("cupy", "CuPy arrays"),
    "lightning": ("lightning", "Lightning callbacks"),
    "transformers": ("transformers", "the Trainer's callbacks"),
    "safetensors": ("posthoc", "reading fastema's files in other programs"),
    "rich": ("posthoc", "progress bars"),
    "matplotlib": ("tracking", "pictures"),
    "tensorboard": ("tracking", "TensorBoard"),
}
"""Package -> (the extra that installs it, what it is used for)."""

_BYTES = 96_000_000
"""Bytes moved by one call of the bandwidth test: more than caches hold."""


class _Check(NamedTuple):
    """The result of comparing one kernel with its reference."""

    name: str
    error: str  # empty if the kernel is right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema doctor``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "examples:\n  fastema doctor\n  fastema doctor --json > doctor.json\n"
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 1 if a kernel is wrong, 0 otherwise."""
    found = dict(_collect_findings())
    failed = {check.name: check.error for check in found["checks"] if check.error}
    if args.json:
        found["checks"] = {check.name: check.error or "right" for check in found["checks"]}
        print(json.dumps(found, indent=2, default=str))
    else:
        _print(found)
    for name, error in failed.items():
        print(f"fastema doctor: {name} is wrong: {error}", file=sys.stderr)
    return 1 if failed else 0


def _collect_findings() -> Iterator[tuple[str, Any]]:
    import fastema
    from fastema.engine import diagnosis

    packages = {"python": platform.python_version(), "fastema": fastema.__version__}
    packages |= {name: metadata.version(name) for name in ("numpy", "numba")}
    yield "packages", {**packages, **{n: v for n in _EXTRAS if (v := _version(n))}}
    yield "missing", {name: extra for name, (extra, _) in _EXTRAS.items() if not _version(name)}
    yield "machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    yield "threads", fastema.get_num_threads()
    yield "shipped", diagnosis.shipped_targets()
    yield "cpu", {"shipped": diagnosis.shipped_level()}
    yield "gpu", diagnosis.gpu()._asdict()
    began = time.perf_counter()
    yield "checks", list(_checks())
    yield "seconds of the checks, kernels compiled or loaded", time.perf_counter() - began
    folder, nbytes = diagnosis.cache()
    yield "cache", {"folder": folder, "bytes": nbytes}
    yield "GB/s", _measure_bandwidth()


def _version(package: str) -> str | None:
    if find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except (
        metadata.PackageNotFoundError
    ):  # the distribution has another name: tensorflow-cpu, cupy-cuda13x
        names = metadata.packages_distributions().get(package)
        return metadata.version(names[0]) if names else "?"


# -- kernels against references -------------------------------------------------------------------


def _checks() -> Iterator[_Check]:
    import numpy as np

    generator = np.random.default_rng()
    numpy_pairs: list[tuple[str, Any, Any, float]] = [
        ("float64", np.float64, None, 1e-15),
        ("float32", np.float32, None, 3e-7),
        ("float16", np.float16, None, 2e-3),
        ("float16, averaged in float32", np.float16, "float32", 3e-7),
    ]
    for name, dtype, shadow, tolerance in numpy_pairs:
        arrays = [generator.standard_normal(n).astype(dtype) for n in (10_007, 3)]
        yield _Check(f"update of {name}", _find_update_error(arrays, shadow, tolerance, _plain))
    if find_spec("torch") is None:
        return
    import torch

    def wide(x: Any) -> Any:
        return x.detach().double().numpy()

    for name, shadow, tolerance in (
        ("bfloat16", None, 1.6e-2),
        ("bfloat16, averaged in float32", "float32", 3e-7),
        ("bfloat16, averaged in two halves", "bf16+16", 1.6e-2),
    ):
        tensors = [torch.randn(n, dtype=torch.bfloat16) for n in (10_007, 3)]
        yield _Check(f"update of {name}", _find_update_error(tensors, shadow, tolerance, wide))
    model = torch.nn.Linear(301, 77)
    yield _Check("swap and back of float32", _find_swap_error(model, torch))


def _plain(x: Any) -> Any:
    return x.astype("float64")


def _find_update_error(
    arrays: list[Any], shadow: str | None, tolerance: float, wide: Callable[[Any], Any]
) -> str:
    """Return how an updated average differs from the formula; "" if within `tolerance`."""
    import numpy as np

    import fastema

    ema = fastema.EMA(arrays, decay=0.75, shadow_dtype=shadow)
    before = [wide(one).copy() for one in arrays]
    for one in arrays:
        one[...] = 3 * one + 1
    ema.update()
    for number, (one, old) in enumerate(zip(arrays, before, strict=True)):
        expected = 0.75 * old + 0.25 * wide(one)
        found = wide(ema.shadow[str(number)])
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not error <= tolerance:
            return f"off by {error:.2g} of the largest value, expected at most {tolerance:.2g}"
    return ""


def _find_swap_error(model: Any, torch: Any) -> str:
    import fastema

    ema = fastema.EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.mul_(2)
    ema.update()
    raw, average = model.weight.detach().clone(), ema.shadow["weight"].clone()
    with ema.swapped():
        if not torch.equal(model.weight, average):
            return "the model does not hold the average"
    return "" if torch.equal(model.weight, raw) else "the weights were not restored"


# -- speed ---------------------------------------------------------------------------------------


def _measure_bandwidth() -> float:
    """Return the GB/s of the faster of two kernels that only move bytes."""
    from fastema.engine import limit

    best = 0.0
    for make in (limit.ReadReadWrite, limit.StreamCopy):
        move, times = make(_BYTES), []
        for _ in range(6):
            began = time.perf_counter()
            move()
            times.append(time.perf_counter() - began)
        best = max(best, _BYTES / statistics.median(times[1:]) / 1e9)
    return best


def _print(found: dict[str, Any]) -> None:
    from fastema.cli.sizes import LINE, duration, size

    def line(title: str, text: str) -> None:
        """Print a finding in as many lines as it needs, without breaking a path or a command."""
        indent = " " * 11
        kept = text.replace("pip install ", "pip\0install\0")
        print(
            textwrap.fill(
                kept,
                LINE,
                initial_indent=title.ljust(11),
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            ).replace("\0", " ")
        )

    line("installed", ", ".join(f"{name}\0{one}" for name, one in found["packages"].items()))
    threads = found["threads"]
    line("machine", f"{found['machine']}; {threads} thread{'s' if threads > 1 else ''}")
    parts = [
        f"for {device.upper()}s: {', '.join(names) or 'none'}"
        for device, names in found["shipped"].items()
    ]
    line("shipped", f"compiled kernels {'; '.join(parts)}")
    gpu = found["gpu"]
    if gpu["driver"]:
        line("GPU", f"no CUDA device ({gpu['driver']})")
    else:
        kernels = "ship with the wheel" if gpu["shipped"] else "need compilers: fastema[cuda]"
        line("GPU", f"compute capability {gpu['capability']}; kernels {kernels}")
    folder, nbytes = found["cache"]["folder"], found["cache"]["bytes"]
    place = folder or "no folder that only you can write to: every process compiles its kernels"
    line("cache", f"{place}, {size(nbytes)}")
    wrong = [check for check in found["checks"] if check.error]
    number = len(found["checks"])
    level = found["cpu"]["shipped"]
    came = f", shipped for {level}" if level else ", compiled here"
    line("kernels", f"{number - len(wrong)} of {number} match their references{came}")
    rate = found["GB/s"]
    line("memory", f"{rate:.3g} GB/s, read and written by all threads together")
    line("update", "at that bandwidth, with a float32 average:")
    for count in (1e7, 1e8, 1e9):
        wide, narrow = (duration(count * nbytes / rate / 1e9) for nbytes in (12, 10))
        weights = f"{count / 1e6:,.0f} million weights:".rjust(22)
        print(f"{'':11}{weights} {wide} in float32, {narrow} in bfloat16")
    for extra in dict.fromkeys(found["missing"].values()):
        names = [name for name, one in found["missing"].items() if one == extra]
        why = dict.fromkeys(_EXTRAS[name][1] for name in names)
        line("missing", f'{", ".join(names)}, for {", ".join(why)}: pip install "fastema[{extra}]"')
