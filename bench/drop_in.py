"""``python -m bench.drop_in [--quick]``: existing training loops, before and after ``install()``.

The share of a step that the averaging takes, and the memory that it adds, with the peer's class and
with ours in its place. Each loop runs in a process of its own, and for its memory in three.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastema
from bench import machine, report
from bench.clock import interleave, spread
from bench.loops import DECAY, LOOPS, OURS, STEP, THEIRS, Loop
from bench.memory import ALLOCATOR

PACKAGES = (
    *("numpy", "numba", "torch", "timm", "diffusers", "torch-ema", "ema-pytorch", "lightning"),
    *("transformers", "accelerate"),
)
NONE, KERNELS = "none", "kernels alone"
WAYS = (NONE, KERNELS, THEIRS, OURS)
WARM_UP = 3


def _assert_agreement(name: str, loop: Loop) -> None:
    """Both have averaged the same weights, to a few roundings."""
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
    """Time a loop with both averages."""
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
        "loop": name,
        "peer": type(loop).peer,
        "n_tensors": len(loop.model.state_dict()),
        "n_elements": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "steps": len(seconds[THEIRS]),
        "ms": {key: 1e3 * median(times) for key, times in seconds.items()},
        "spread_ms": {key: [1e3 * one for one in spread(t)] for key, t in seconds.items()},
        "evaluate_ms": {key: 1e3 * median(times) for key, times in evaluations.items()},
    }


def _use_kernels(dtype: torch.dtype) -> None:
    """Bring in what the first use of the kernels costs: Numba, and their code."""
    small = torch.nn.Linear(2, 2).to(dtype)
    ema = fastema.EMA(small, DECAY, shadow_dtype=torch.float32)
    ema.update()
    with ema.swapped():
        pass


def peak(name: str, quick: bool, way: str) -> int:
    """Bytes of a process that trains with one average or none, at its largest."""
    loop = LOOPS[name](quick)
    average = loop.build(way) if way in (THEIRS, OURS) else None
    if way == KERNELS:
        _use_kernels(next(loop.model.parameters()).dtype)
    loop.run(3)
    if average is not None and average.evaluate is not None:
        average.evaluate()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _apart(*arguments: str, quick: bool, **environment: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-m", "bench.drop_in", *arguments]
    done = subprocess.run(
        command + (["--quick"] if quick else []),
        check=True,
        cwd=report.ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def rows(quick: bool, names: list[str]) -> list[dict[str, Any]]:
    """Measure the loops, each in processes of its own."""
    found = []
    for name in names:
        row = _apart("--loop", name, quick=quick)
        row["peak_bytes"] = {
            way: _apart("--loop", name, "--way", way, quick=quick, **ALLOCATOR) for way in WAYS
        }
        print(f"{name}: {row['ms']}", file=sys.stderr)
        found.append(row)
    return found


_METHOD = (
    "A loop's weights are trained once; the peer's average and ours follow them in the same run, "
    "in turns. Medians. *Share* is the averaging's part of a step that is averaged. *Evaluation* "
    "is the average put into the model and taken back, where the script does that. *Memory* is how "
    "much higher the process with the average peaks than the one without, in copies of the average "
    "(float32); it runs three steps and an evaluation. For ours the process without it has loaded "
    "Numba and its kernels, which takes {kernels:.0f} MB once. The models are small, the batches "
    "smaller, so that a step on a CPU takes no longer than a fraction of a second: with larger "
    "batches the shares shrink, by either class alike. transformers has no average of its own: the "
    "peer there is a callback around torch's `AveragedModel`."
)


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of a result."""
    parts = ["# Existing loops before and after install()", report.provenance(result["header"])]
    head = ["loop", "weights", "step", "peer", "ours", "faster by", "share before", "share after"]
    head += ["memory before", "after"]
    body, evaluated = [], []
    for row in result["rows"]:
        ms, copy = row["ms"], 4 * row["n_elements"]
        before, after = (ms[which] / (ms[STEP] + ms[which]) for which in (THEIRS, OURS))
        peaks = row["peak_bytes"]
        extra = [(peaks[w] - peaks[b]) / copy for w, b in ((THEIRS, NONE), (OURS, KERNELS))]
        body.append(
            [
                row["loop"],
                f"{row['n_elements'] / 1e6:.1f}M in {row['n_tensors']}",
                report.number(ms[STEP]),
                report.number(ms[THEIRS]),
                report.number(ms[OURS]),
                f"{ms[THEIRS] / ms[OURS]:.1f}×",
                f"{100 * before:.1f} %",
                f"{100 * after:.1f} %",
                *(f"{one:.2f}" for one in extra),
            ]
        )
        if row["evaluate_ms"]:
            times = row["evaluate_ms"]
            evaluated.append(
                [
                    row["loop"],
                    report.number(times[THEIRS]),
                    report.number(times[OURS]),
                    f"{times[THEIRS] / times[OURS]:.1f}×",
                ]
            )
    peaks = [row["peak_bytes"] for row in result["rows"]]
    kernels = median((one[KERNELS] - one[NONE]) / 1e6 for one in peaks)
    parts += [
        _METHOD.format(kernels=kernels),
        "### A step of training, ms",
        report.aligned(head, body),
    ]
    parts += ["### Evaluation, there and back, ms"]
    parts += [report.aligned(["loop", "peer", "ours", "faster by"], evaluated)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.drop_in", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, few steps")
    parser.add_argument("--only", nargs="+", default=[], metavar="LOOP", choices=LOOPS)
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop is not None:
        torch.set_num_threads(machine.cores())
        found = (
            measure(options.loop, options.quick)
            if options.way is None
            else peak(options.loop, options.quick, options.way)
        )
        print(json.dumps(found))
        return 0
    command = "python -m bench.drop_in" + (" --quick" if options.quick else "")
    result = {
        "header": machine.header(command, "drop-in", PACKAGES),
        "rows": rows(options.quick, options.only or list(LOOPS)),
    }
    text = markdown(result)
    print(text)
    name = "drop-in-quick" if options.quick else "drop-in"
    report.store(options.out, name + ("-part" if options.only else ""), result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
