"""Time updates in a training loop, right after the optimizer's step, by ``pytest bench/loop``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.loop import cases, picture
from bench.loop.race import FOREACH, absences
from bench.race.durations import summarize_times
from bench.race.peers import OURS
from bench.race.question import Question, Settings
from bench.race.readme import HOT
from bench.race.report import ROOT, Figure, Row, Rows

FLOOR, RANDOM_FLOOR = 0.5, 0.3
"""Least share of foreach's speed that a quick run accepts of fastema, from `FLOOR_ELEMENTS` on:
half of what is usual. The second is for bf16 averages, which foreach rounds to nearest by single
instructions where the processor has them, and fastema at random."""

FLOOR_ELEMENTS = 1_000_000


def measure(settings: Settings) -> tuple[list[dict[str, Any]], bool]:
    """Run ``pytest bench/loop`` in a process of its own.

    Returns
    -------
    benchmarks
        The benchmarks of pytest-benchmark's JSON, in the order of the cases.
    passed
        Whether every contestant's result was right and was timed.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "loop.json"
        command = [sys.executable, "-m", "pytest", "bench/loop", "-q", "--benchmark-quiet"]
        command += [f"--benchmark-json={path}", *["--quick"] * settings.quick]
        command += [f"--case={name}" for name in settings.cases]
        done = subprocess.run(command, cwd=ROOT, check=False)
        # The file is empty if no benchmark ended.
        text = path.read_text("utf-8") if path.exists() else ""
        return json.loads(text)["benchmarks"] if text else [], done.returncode == 0


def make_rows(benchmarks: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of all tables: for each size the updates in the loop, then the hot ones."""
    tables: dict[str, list[Row]] = {}
    hot: dict[str, list[Row]] = {}
    typical = {
        (one["group"], one["extra_info"]["contestant"]): (
            one["stats"]["median"] * 1e6,
            one["extra_info"]["hot_us"],
        )
        for one in benchmarks
    }
    for one in benchmarks:
        info = one["extra_info"]
        name, size, title = info["contestant"], info["size"], info["table"]
        facts = {"n_tensors": info["n_tensors"], "n_elements": info["n_elements"]}
        loop_us, hot_us = typical[one["group"], name]
        foreach_us, foreach_hot_us = typical.get((one["group"], FOREACH), (None, None))
        figures = {**facts, **summarize_times(one["stats"]["data"], "us")}
        figures["speed"] = foreach_us and foreach_us / loop_us
        if name == OURS and info["n_elements"] >= FLOOR_ELEMENTS and foreach_us:
            is_random = title.startswith("bf16 model, bf16 average")
            figures["least_speed"] = RANDOM_FLOOR if is_random else FLOOR
        tables.setdefault(title, []).append(Row(title, size, figures, name))
        figures = {**facts, "us": hot_us, "speed": foreach_hot_us and foreach_hot_us / hot_us}
        hot.setdefault(title, []).append(Row(title, size, figures, HOT + name))
    return [row for title in tables for row in (*tables[title], *hot[title])]


def rows(settings: Settings) -> Rows:
    """Measure all cases, and yield the rows of every table."""
    benchmarks, passed = measure(settings)
    yield from make_rows(benchmarks)
    chosen = cases.select(settings.quick, list(settings.cases))
    for title, mix in {case.title: case.mix for case in chosen}.items():
        for name, reason in absences(mix).items():
            yield Row(title, name, missing=reason)
    if not passed:
        yield Row("pytest bench/loop", "all", missing="pytest failed, see above", failed=True)


METHOD = """\
Each update is timed right after a training step: forward, backward, the optimizer's step and
`zero_grad()` of a multilayer perceptron, Adam for f32 and SGD for bf16. So the average lies in no
cache, and PyTorch's threads have just worked. The contestants take turns in one process, step by
step, A B C A B C ...: µs are medians, in brackets foreach's time over their own, so 2 is twice as
fast as foreach. Each result was found equal to a float64 reference first. *foreach* is
`torch._foreach_lerp_` with lists made beforehand, and casts for an f32 average of a bf16 model; it
rounds a bf16 average to nearest, where fastema rounds stochastically. *AveragedModel* is torch's,
with `get_ema_multi_avg_fn`. *hot*: the same call repeated with nothing in between, as no training
does. Rows are millions of weights."""

QUESTION = Question(
    "Updates in a training loop",
    METHOD,
    rows,
    lambda settings: [case.name for case in cases.select(settings.quick, [])],
    packages=("numpy", "numba", "torch", "torch-ema", "pytest-benchmark"),
    figures={"speed": Figure("(foreach's time / own)", "({:.2f})".format)},
    header=lambda settings: {"threads": {"torch and fastema": "1 or 2, by table"}},
    draw=picture.draw,
)
