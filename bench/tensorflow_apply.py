"""``python -m bench.tensorflow_apply [--quick]``: ours against ``tf.train``'s, one ``apply`` each.

Eagerly and inside ``tf.function``, on the same variables, which are given new values before every
round as an optimizer would.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from bench import machine, report
from bench.clock import interleave, spread
from fastema.engine.limit import ReadReadWrite, StreamCopy
from fastema.tensorflow import ExponentialMovingAverage

DECAY = 0.875
BYTES = 12  # per element: average and weight read, average written
OURS, THEIRS = "fastema", "tf.train"
CLASSES = {OURS: ExponentialMovingAverage, THEIRS: tf.train.ExponentialMovingAverage}


@dataclass(frozen=True)
class Case:
    """So many variables of one shape in float32."""

    count: int
    shape: tuple[int, ...]

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"{self.count:,} of {' × '.join(f'{n:,}' for n in self.shape)}"

    @property
    def elements(self) -> int:
        """Of all variables."""
        return self.count * int(np.prod(self.shape))


CASES = [Case(100, (64, 64)), Case(100, (512, 512)), Case(1, (5_000, 5_000))]
QUICK = [Case(100, (64, 64)), Case(20, (512, 512)), Case(1, (2_000, 2_000))]


def _traced(ema: Any, weights: list[Any]) -> Callable[[], object]:
    @tf.function
    def update() -> None:
        ema.apply(weights)

    return update


def _eager(ema: Any, weights: list[Any]) -> Callable[[], object]:
    return lambda: ema.apply(weights)


WAYS = {"eager": _eager, "tf.function": _traced}


def _assert_agreement(
    averages: dict[str, Any], weights: list[Any], jobs: dict[str, Callable[[], object]]
) -> None:
    """Assert that every entry's update of new weights is the formula, to a few roundings."""
    before = {name: [ema.average(w).numpy() for w in weights] for name, ema in averages.items()}
    for weight in weights:
        weight.assign(tf.random.normal(weight.shape))
    for name, job in jobs.items():
        job()
        for old, weight in zip(before[name], weights, strict=True):
            want = old + (1 - DECAY) * (weight.numpy().astype(np.float64) - old)
            error = float(np.abs(averages[name].average(weight).numpy() - want).max())
            assert error <= 4e-6, f"{name}: {error}"


def run(case: Case, quick: bool) -> list[dict[str, Any]]:
    """Check the entries against the formula, race them, and return the rows."""
    weights = [tf.Variable(tf.random.normal(case.shape)) for _ in range(case.count)]
    averages: dict[str, Any] = {}
    jobs: dict[str, Callable[[], object]] = {}
    for way, make in WAYS.items():
        for title, kind in CLASSES.items():
            name = f"{title}, {way}"
            averages[name] = kind(DECAY)
            averages[name].apply(weights)
            jobs[name] = make(averages[name], weights)
    _assert_agreement(averages, weights, jobs)
    for job in jobs.values():  # from the third call on, nothing is prepared any more
        job()
        job()
    limits = {
        "limit: read-read-write": ReadReadWrite(case.elements * BYTES),
        "limit: streaming copy": StreamCopy(case.elements * BYTES),
    }
    durations = interleave(
        jobs | limits, rounds=30 if quick else 200, budget_s=4.0 if quick else 40.0
    )
    return [_row(case, name, times, durations) for name, times in durations.items()]


def _row(
    case: Case, name: str, times: list[float], durations: dict[str, list[float]]
) -> dict[str, Any]:
    way = name.rpartition(", ")[2]
    ours = durations.get(f"{OURS}, {way}")
    p20, p80 = spread(times)
    return {
        "entry": name,
        "n_tensors": case.count,
        "n_elements": case.elements,
        "rounds": len(times),
        "median_ms": median(times) * 1e3,
        "p20_ms": p20 * 1e3,
        "p80_ms": p80 * 1e3,
        "gbps": case.elements * BYTES / median(times) / 1e9,
        "ratio_to_fastema": None if ours is None else median(times) / median(ours),
    }


_METHOD = """\
One `apply` of all variables in float32, all entries in turn, A B C A B C ..., in one process;
medians of the rounds. Before, each entry's update was found equal to the formula. The last column
compares with fastema in the same way of calling. GB/s counts the least bytes that the work needs,
12 per element; *the limit* is a plain kernel that moves as many."""


def markdown(result: dict[str, Any]) -> str:
    """Return all tables of a result."""
    number = report.number
    parts = [
        "# An update of TensorFlow variables",
        report.provenance(result["header"]),
        _METHOD,
    ]
    for case in result["cases"]:
        body = [
            [
                row["entry"],
                number(row["median_ms"]),
                f"{number(row['p20_ms'])}–{number(row['p80_ms'])}",
                number(row["gbps"]),
                number(row["ratio_to_fastema"]),
            ]
            for row in case["rows"]
        ]
        head = ["", "ms", "p20–p80", "GB/s", "time / fastema"]
        rounds = case["rows"][0]["rounds"]
        parts += [f"### {case['title']}", f"{rounds} rounds.", report.aligned(head, body)]
    return "\n\n".join(parts) + "\n"


def _measured(quick: bool) -> Iterator[dict[str, Any]]:
    for case in QUICK if quick else CASES:
        began = time.perf_counter()
        rows = run(case, quick)
        gc.collect()
        print(f"{case.title}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        yield {"title": case.title, "rows": rows}


def _header(command: str) -> dict[str, Any]:
    packages = ("numpy", "numba", "tensorflow-cpu", "tensorflow")
    header: dict[str, Any] = machine.header(command, "tensorflow-apply", packages)
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    header["threads"]["tensorflow"] = threads or header["cores"]  # 0: as many as there are
    return header


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tensorflow_apply", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, under half a minute")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    options = parser.parse_args()
    command = "python -m bench.tensorflow_apply" + (" --quick" if options.quick else "")
    cases = list(_measured(options.quick))
    result = {"header": _header(command), "cases": cases}
    text = markdown(result)
    print(text)
    name = "tensorflow-apply-quick" if options.quick else "tensorflow-apply"
    report.store(options.out, name, result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
