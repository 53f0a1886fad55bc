"""``fastema smooth``: write moving averages of a log's metrics as columns and as a picture."""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO, TypeVar

from fastema.cli.arguments import (
    PICTURE_SUFFIXES,
    STANDARD,
    add_force,
    check_new,
    count,
    decay,
    picture_path,
    writable_path,
)
from fastema.errors import ArgumentError

_T = TypeVar("_T")

SUMMARY = "Smooth the curves of a training log: CSV, JSON, or TensorBoard event files."
EXTRA = "tracking"
NEEDS: dict[str, str] = {}  # each package is needed only for some logs and options

DECAY = 0.9
WINDOW_SIZE = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema smooth``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  fastema smooth metrics.csv --ema 0.9 --sma 20 -o smooth.csv --plot smooth.png\n"
        "  fastema smooth runs/ --metrics 'train/*' --ema 0.9,0.99 --plot runs.png\n"
        "  fastema smooth trainer_state.json --metrics loss | column -s, -t | less\n"
    )
    parser.add_argument(
        "log",
        type=Path,
        help="a CSV file with a header line, JSON lines, JSON such as trainer_state.json, a "
        "TensorBoard event file or a folder of them, or - for standard input",
    )
    parser.add_argument(
        "--ema",
        action="extend",
        type=_comma_separated(decay),
        metavar="DECAY",
        help="weight of the old average in an exponential moving average, in [0, 1); "
        f"comma-separated for several ({DECAY} and --sma {WINDOW_SIZE} if neither is given)",
    )
    parser.add_argument(
        "--sma",
        action="extend",
        type=_comma_separated(count),
        metavar="WINDOW",
        help="number of values in a simple moving average; comma-separated for several",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=_out_path,
        help="CSV file to write: the log plus new columns, such as loss_ema and loss_sma; - for "
        "standard output (the default, unless --plot is given)",
    )
    add_force(parser)
    parser.add_argument(
        "--plot",
        type=picture_path,
        metavar="PICTURE",
        help=f"picture to draw: a {', '.join(PICTURE_SUFFIXES)} file",
    )
    parser.add_argument(
        "--metrics",
        action="extend",
        type=_comma_separated(str),
        metavar="NAME",
        help="columns to smooth, comma-separated; patterns such as 'val_*' work too (all columns "
        "but steps, times and learning rates)",
    )
    parser.add_argument(
        "--weights",
        metavar="COLUMN",
        help="column with the weight of each row, such as the batch size",
    )
    parser.add_argument(
        "--step",
        metavar="COLUMN",
        help="column that counts the steps (by default the one named step, global_step, batch, "
        "iteration or epoch)",
    )
    parser.add_argument(
        "--debias",
        action="store_true",
        help="start exponential averages at zero and correct the bias, as Adam does, instead of "
        "starting at the first value",
    )
    parser.add_argument(
        "--on-nonfinite",
        choices=("show", "skip", "propagate", "raise"),
        default="show",
        help="what to do with a NaN or an infinity: show it until the next number but average only "
        "the others, leave it out, let it spoil the average, or stop (%(default)s)",
    )
    parser.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the metrics next to their averages",
    )
    parser.add_argument(
        "--log-scale",
        choices=("auto", "on", "off"),
        default="auto",
        help="log scale for panels whose values span a factor of 30, all, or none (%(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print no summary")


def run(args: argparse.Namespace) -> int:
    """Read, average, write and draw; return the exit code."""
    _run(args)
    return 0


def _run(args: argparse.Namespace) -> None:
    _check_paths(args)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("--plot needs the matplotlib package: pip install matplotlib")
    asked_for = not (args.ema is args.sma is None)
    if not asked_for:
        args.ema, args.sma = [DECAY], [WINDOW_SIZE]

    from fastema.cli.smooth import averages, summary
    from fastema.tracking import logs
    from fastema.tracking.plots import panels

    log = logs.read_table(_standard_input() if args.log == STANDARD else args.log)
    smoothed = averages.smooth(
        log,
        panels.averages(args.sma, args.ema, debias=args.debias, on_nonfinite=args.on_nonfinite),
        metrics=args.metrics,
        weights=args.weights,
    )
    step = log.step_column(args.step)
    out = args.out or (None if args.plot else STANDARD)
    if out == STANDARD:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(
                encoding="utf-8"
            )  # like the files we write, whatever the terminal uses
        averages.write(sys.stdout, log, smoothed, raw=args.raw)
        sys.stdout.flush()
    elif out:
        averages.save(out, log, smoothed, raw=args.raw)
    if args.plot:
        scale = {"auto": "auto", "on": True, "off": False}[args.log_scale]
        averages.draw(args.plot, log, smoothed, step, args.raw, asked_for, scale)
    if not args.quiet:
        print(summary.summary(log, smoothed, step, out, args.plot), file=sys.stderr)


def _standard_input() -> TextIO:
    """Return standard input, decoded like a file: UTF-8 with or without a byte order mark."""
    if sys.stdin is None:
        raise ArgumentError("standard input is closed; name a file")
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin if buffer is None else io.TextIOWrapper(buffer, encoding="utf-8-sig")


def _check_paths(args: argparse.Namespace) -> None:
    """Raise ArgumentError if an output would overwrite the log or the other output."""
    paths = {"--out": args.out, "--plot": args.plot}
    given = {name: path for name, path in paths.items() if path not in (None, STANDARD)}
    for name, path in given.items():
        if path.exists() and args.log.exists() and path.samefile(args.log):
            raise ArgumentError(f"{name} {path} is the log itself, which is never overwritten")
    if len({path.resolve() for path in given.values()}) < len(given):
        raise ArgumentError(f"--out and --plot are the same file, {args.out}")
    if "--out" in given:
        check_new(given["--out"], args.force)


def _comma_separated(parse: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    """Return an argparse type that applies `parse` to each comma-separated part."""
    return lambda text: [parse(part.strip()) for part in text.split(",")]


def _out_path(text: str) -> Path:
    return STANDARD if text == "-" else writable_path(text)
