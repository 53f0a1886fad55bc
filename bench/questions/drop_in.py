"""Measure existing training loops before and after ``install()``.

For each loop: the averaging's share of a step and the memory that it adds, with the peer's class
and with ours in its place. Each loop runs in its own process, and in four more for its memory,
which a quick run leaves out.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

import fastema
from bench.race import machine
from bench.race.durations import summarize_times
from bench.race.memory import ALLOCATOR
from bench.race.processes import call_in_subprocess
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows, number
from bench.race.training_loops import DECAY, LOOPS, OURS, STEP, THEIRS, Loop
from fastema.cli.clock import interleave

QUICK = "torch_ema, GPT-2"
"""The loop of a quick run. It also evaluates with the average."""

NONE, KERNELS = "none", "kernels alone"
WAYS = (NONE, KERNELS, THEIRS, OURS)
WARM_UP = 3
STEPS, EVALUATION = "A step of training", "Evaluation, there and back"


def _assert_agreement(name: str, loop: Loop) -> None:
    """Assert that both averages agree up to rounding, and that the weights have moved."""
    theirs, ours = ({id(t): t for t in loop.averages[w].tensors()}.values() for w in (THEIRS, OURS))
    weights = list(loop.model.parameters())
    moved = max(
        float((t.float() - w.float()).abs().max()) for t, w in zip(theirs, weights, strict=False)
    )
    assert moved > 1e-4, f"{name}: the weights did not move away from their average"
    total = {
        which: sum(t.numel() for t in found) for which, found in ((THEIRS, theirs), (OURS, ours))
    }
    assert total[THEIRS] == total[OURS], f"{name}: {total}"
    for one, other in zip(theirs, ours, strict=True):
        error = float((one.double() - other.double()).abs().max())
        assert error <= 2e-3 * moved, f"{name}: the averages differ by {error}"


def measure(name: str, quick: bool) -> dict[str, Any]:
    """Return the times of a loop's steps, of both averages, and of its evaluations."""
    torch.set_num_threads(machine.cores())
    loop = LOOPS[name](quick)
    for which in (THEIRS, OURS):
        loop.build(which)
    seconds = loop.run(WARM_UP + (4 if quick else 30))
    seconds = {key: times[WARM_UP:] or times for key, times in seconds.items()}
    _assert_agreement(name, loop)
    jobs = {w: a.evaluate for w, a in loop.averages.items() if a.evaluate is not None}
    evaluations = interleave(jobs, 3 if quick else 15, budget_s=20.0) if jobs else {}
    parameters = list(loop.model.parameters())
    return {
        "n_tensors": len(loop.model.state_dict()),
        "n_elements": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "step": {key: summarize_times(times) for key, times in seconds.items()},
        "evaluation": {key: summarize_times(times) for key, times in evaluations.items()},
    }


def _use_kernels(dtype: torch.dtype) -> None:
    """Use the kernels once, so that the process has loaded Numba and their code."""
    small = torch.nn.Linear(2, 2).to(dtype)
    ema = fastema.EMA(small, DECAY, shadow_dtype=torch.float32)
    ema.update()
    with ema.swapped():
        pass


def peak(name: str, quick: bool, way: str) -> int:
    """Return the peak memory in bytes of this process, training with one average or none."""
    torch.set_num_threads(machine.cores())
    loop = LOOPS[name](quick)
    average = loop.build(way) if way in (THEIRS, OURS) else None
    if way == KERNELS:
        _use_kernels(next(loop.model.parameters()).dtype)
    loop.run(3)
    if average is not None and average.evaluate is not None:
        average.evaluate()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cases(settings: Settings) -> list[str]:
    """Return the names of all loops."""
    return list(LOOPS)


def rows(settings: Settings) -> Rows:
    """Measure the chosen loops in fresh processes; a quick run measures one, and no memory."""
    quick = settings.quick
    names = [QUICK] if quick and not settings.cases else filter(settings.wants, LOOPS)
    evaluations = []
    for name in names:
        found = call_in_subprocess(measure, name, quick)
        peaks = {
            way: call_in_subprocess(peak, name, quick, way, environment=ALLOCATOR)
            for way in (() if quick else WAYS)
        }
        yield Row(STEPS, name, _step_figures(found, peaks))
        if times := found["evaluation"]:
            evaluations.append(Row(EVALUATION, name, _compare_times(times)))
        print(name, file=sys.stderr)
    yield from evaluations


def _compare_times(times: dict[str, dict[str, Any]]) -> dict[str, Any]:
    theirs, ours = times[THEIRS]["ms"], times[OURS]["ms"]
    return {"peer_ms": theirs, "ours_ms": ours, "faster": theirs / ours, "timings": times}


def _step_figures(found: dict[str, Any], peaks: dict[str, int]) -> dict[str, Any]:
    """Return the averages' shares of a step, and their memory where it was measured."""
    times = found["step"]
    step = times[STEP]["ms"]
    compared = _compare_times(times)
    figures = {
        "weights": found["n_elements"] / 1e6,
        "in_tensors": found["n_tensors"],
        "dtype": found["dtype"],
        "step_ms": step,
        **compared,
        "share_before": compared["peer_ms"] / (step + compared["peer_ms"]),
        "share_after": compared["ours_ms"] / (step + compared["ours_ms"]),
    }
    return figures | _memory_figures(peaks, 4 * found["n_elements"]) if peaks else figures


def _memory_figures(peaks: dict[str, int], copy: int) -> dict[str, Any]:
    """Return the averages' memory in copies of ``copy`` bytes."""
    return {
        "copies_before": (peaks[THEIRS] - peaks[NONE]) / copy,
        "copies_after": (peaks[OURS] - peaks[KERNELS]) / copy,
        "kernels_mb": (peaks[KERNELS] - peaks[NONE]) / 1e6,
        "peak_bytes": peaks,
    }


METHOD = """\
A loop's weights are trained once; the peer's average and ours follow them in the same run, in
turns. Medians. *Share* is the averaging's part of a step that is averaged. *Evaluation* is the
average put into the model and taken back, where the script does that. *Memory* is how much higher
the process with the average peaks than the one without, in copies of the average (float32); it runs
three steps and an evaluation. For ours the process without it has loaded Numba and its kernels,
which takes once what the last column says. The models are small, the batches smaller, so that a
step on a CPU takes no longer than a fraction of a second: with larger batches the shares shrink, by
either class alike. transformers has no average of its own: the peer there is a callback around
torch's `AveragedModel`."""

PACKAGES = (
    *("numpy", "numba", "torch", "timm", "diffusers", "torch-ema", "ema-pytorch", "lightning"),
    *("transformers", "accelerate"),
)

QUESTION = Question(
    "Existing loops before and after install()",
    METHOD,
    rows,
    cases,
    PACKAGES,
    figures={
        "weights": Figure("weights", "{:.1f}M".format),
        "in_tensors": Figure("tensors", str),
        "step_ms": Figure("step, ms", number),
        "peer_ms": Figure("peer, ms", number),
        "ours_ms": Figure("ours, ms", number),
        "faster": Figure("faster by", "{:.1f}×".format),
        "share_before": Figure("share before", "{:.1%}".format),
        "share_after": Figure("share after", "{:.1%}".format),
        "copies_before": Figure("memory before", "{:.2f}".format),
        "copies_after": Figure("after", "{:.2f}".format),
        "kernels_mb": Figure("kernels, MB", number),
    },
)
