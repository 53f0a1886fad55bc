"""``python -m bench QUESTION... [--quick]``: measure, print the tables, and store them."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.race import baseline, report
from bench.race.question import Question, Settings

QUESTIONS = {
    "loop": "updates in a training loop, right after the optimizer's step",
    "cpu": "updates and swaps of PyTorch models, beside peers and the memory's limit",
    "counts": "modules, operations, allocations, bytes: what no machine changes",
    "first-update": "how long until the first update: imports, compiling, the cache",
    "averages": "several decays, windows, 16 bits, guards, synthesis from snapshots",
    "bridges": "a leaf of each framework, and a large JAX tree beside optax",
    "tracking": "moving averages of numbers, one by one and as series",
    "drop-in": "training loops before and after install(): time, share of a step, memory",
    "keras-step": "a training step and an evaluation in Keras, on three backends",
    "keras-losses": "batch losses in Keras, on three backends: time and exactness",
    "tensorflow-apply": "apply of TensorFlow variables beside tf.train's",
    "checkpoints": "averaging finished checkpoints, beside a loop with safetensors",
    "sharded": "two ranks: steps, memory, and one folder of their parts",
    "offload": "averages on the host: how long training waits, and memory",
    "launch": "the host's share of a GPU update, without a GPU",
    "kernels-gpu": "registers and instructions of the GPU kernels, without a GPU",
    "gpu": "on a machine with a CUDA GPU: build, test, benchmark",
}
QUICK = ("counts", "loop", "first-update", "averages", "bridges", "tracking", "drop-in")
"""Questions that ``--quick`` runs when none is named."""

ALL = "all"
"""Selects every question except ``gpu``."""


def load(name: str) -> Question:
    """Import a question's module, with the packages it measures, and return the question."""
    module = "bench.gpu.check" if name == "gpu" else f"bench.questions.{name.replace('-', '_')}"
    question: Question = importlib.import_module(module).QUESTION
    return question


def render_page(
    question: Question, header: dict[str, Any], rows: list[report.Row], remark: str = ""
) -> str:
    """Return a result as a Markdown page."""
    remark = f": quick, small shapes and few rounds{remark}" if header["quick"] else remark
    title = question.title + remark
    return report.render_markdown(title, question.method, header, rows, question.figures)


def answer_question(name: str, question: Question, settings: Settings, command: str) -> bool:
    """Measure one question and store the result; return True if nothing failed.

    A quick run of all cases is also checked for slow updates and compared with the baseline, or
    written to it.
    """
    from bench.race import machine

    header = {
        **machine.header(command, settings.quick, question.packages or machine.PACKAGES),
        **question.header(settings),
    }
    if question.result_name is not None:
        stem = question.result_name(settings)
    else:
        part = bool(settings.cases and question.cases(settings))
        stem = name + "-quick" * settings.quick + "-part" * part
    if question.draw is not None:
        header["picture"] = f"{stem}.png"
    rows: list[report.Row] = []
    for row in question.rows(settings):
        if question.keeps_parts and rows and row.table != rows[-1].table:
            text = render_page(question, header, rows, ": incomplete")
            report.store(settings.out, stem, header, rows, text)
        rows.append(row)
    print(text := render_page(question, header, rows))
    failed = [row for row in rows if row.failed]
    if failed and not question.keeps_parts:
        print(f"{name}: {len(failed)} failed, nothing was stored", file=sys.stderr)
        return False
    report.store(settings.out, stem, header, rows, text)
    if question.draw is not None:
        question.draw(rows, header, settings.out / header["picture"])
    compared = settings.baseline and settings.quick and not settings.cases
    if compared and settings.baseline == "write":
        baseline.write(name, rows)
    return not failed and (not compared or baseline.check(name, rows))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    width = max(map(len, QUESTIONS))
    listed = "\n".join(f"  {name:{width}}  {about}" for name, about in QUESTIONS.items())
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"questions:\n{listed}\n  {ALL:{width}}  all of them but gpu",
    )
    made.add_argument("questions", nargs="*", metavar="QUESTION", choices=[*QUESTIONS, ALL, []])
    made.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    made.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only these cases")
    made.add_argument(
        "--out",
        type=Path,
        default=report.RESULTS,
        metavar="DIR",
        help="folder of the results; it is made if need be (default: bench/results)",
    )
    made.add_argument(
        "--readme",
        choices=("write", "check"),
        help="write or check the figures in README.md and docs/, from stored results",
    )
    made.add_argument(
        "--machines",
        action="store_true",
        help="write bench/results/machines.md, from stored results",
    )
    made.add_argument(
        "--baseline",
        choices=("write", "check"),
        default="check",
        help="with --quick: compare with bench/results/baseline.json, or write it (%(default)s)",
    )
    gpu = made.add_argument_group("gpu")
    gpu.add_argument(
        "--preflight",
        action="store_true",
        help="say in seconds what a run would lose here: kernels, packages, device, results; "
        "status 1 if anything. With --device cpu: all but the device",
    )
    gpu.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu is a dry run")
    gpu.add_argument(
        "--minutes", type=float, default=Settings.minutes, help="time limit of the whole check"
    )
    gpu.add_argument(
        "--only", nargs="+", choices=Settings.stages, default=Settings.stages, metavar="STAGE"
    )
    gpu.add_argument("--select", default="", metavar="EXPR", help="only these tests (-k)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m bench`` and return its exit status."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.readme:
        from bench.race import readme

        return readme.main(check=options.readme == "check")
    if options.machines:
        from bench.race import machines

        machines.write(options.out)
        return 0
    names = list(options.questions) or (list(QUICK) if options.quick else [])
    if not names:
        command_line.print_help()
        return 0
    if ALL in names:
        names = [name for name in QUESTIONS if name != "gpu"]
    if len(names) > 1:
        if options.case or "gpu" in names:
            command_line.error("--case and the question gpu need a single question")
        # One process per question: frameworks compete for memory and cores, and some cannot
        # be loaded together.
        flags = ["--quick"] * options.quick + ["--baseline", options.baseline]
        flags += ["--out", str(options.out.resolve())]
        calls = [[sys.executable, "-m", "bench", name, *flags] for name in names]
        return max([subprocess.run(call, cwd=report.ROOT).returncode for call in calls])
    settings = Settings(
        quick=options.quick,
        cases=tuple(options.case),
        out=options.out.resolve(),
        baseline=options.baseline,
        device=options.device,
        minutes=options.minutes,
        stages=tuple(options.only),
        select=options.select,
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    (name,) = names
    if options.preflight:
        if name != "gpu":
            command_line.error("--preflight is of the question gpu")
        from bench.gpu import preflight

        return preflight.main(settings)
    question = load(name)
    known = question.cases(settings)
    for case in options.case:
        if not any(case in (one, *one.split(":")) for one in known):
            command_line.error(f"no case is called {case!r}; there are: {', '.join(known)}")
    command = ["python", "-m", "bench", name, *["--quick"] * options.quick]
    command += ["--case", *options.case] if options.case else []
    return 0 if answer_question(name, question, settings, shlex.join(command)) else 1


if __name__ == "__main__":
    sys.exit(main())
