"""Run ``fastema average``: select checkpoints, compute their weights, and write the averages."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fastema.checkpoint import weights
from fastema.checkpoint.merge import Merge, check, merge, prepare, warn_of
from fastema.checkpoint.select import best, select
from fastema.checkpoint.source import Checkpoint
from fastema.checkpoint.stored import open_weights
from fastema.cli.arguments import check_new
from fastema.cli.average.scores import read_scores
from fastema.cli.sizes import size
from fastema.errors import ArgumentError, CheckpointError

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Write the requested averages, or print what a dry run would write."""
    checkpoints, notes = _best(args, _checkpoints(args))
    made = prepare(checkpoints)
    made.notes[:0] = notes
    averages = _averages(args, made.checkpoints)
    if args.out is None and not args.dry_run:
        raise ArgumentError("name the output: -o OUT")
    outputs = _outputs(args.out or Path("out"), list(averages), made)
    wanted = dict(zip(outputs, averages.values(), strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if args.out is not None:
            check(made, wanted)
            for out in outputs:
                check_new(out, args.force)
        if args.weights is not None:
            warn_of(args.weights)
        if not args.json:
            _print_table(made, averages)
        if not args.dry_run:
            began = time.monotonic()
            with _progress(made.nbytes, args.json) as advance:
                merge(made, wanted, advance)
            spent = time.monotonic() - began
    for one in dict.fromkeys(str(one.message) for one in caught):
        print(f"warning: {one}", file=sys.stderr)
    if args.json:
        print(json.dumps(_summary(made, averages, outputs, args.dry_run), indent=2))
        return
    for note in made.notes:
        print(f"note: {note}")
    written = ", ".join(map(str, outputs))
    if args.dry_run:
        print(f"would read {size(made.nbytes)} and write {written}")
    else:
        rate = size(made.nbytes / max(spent, 1e-9))
        print(f"{written}: {size(made.nbytes)} read in {spent:.1f} s, {rate}/s")


def _checkpoints(args: argparse.Namespace) -> list[Checkpoint]:
    if (args.unit == "tokens" or args.tokens_per_step) and not (args.window or args.min_spacing):
        raise ArgumentError("--unit and --tokens-per-step need --window or --min-spacing")
    if args.dir is not None:
        if args.paths:
            raise ArgumentError("give either checkpoints or --dir, not both")
        return select(
            args.dir,
            last=args.last,
            window=args.window,
            min_spacing=args.min_spacing or 0,
            unit=args.unit,
            tokens_per_step=args.tokens_per_step,
            key=args.key,
        )
    if args.last or args.window or args.min_spacing:
        raise ArgumentError("--last, --window and --min-spacing need --dir")
    if not args.paths:
        raise ArgumentError("name checkpoints, or a folder of them: --dir DIR")
    return [open_weights(path, args.key) for path in args.paths]


def _best(
    args: argparse.Namespace, checkpoints: list[Checkpoint]
) -> tuple[list[Checkpoint], list[str]]:
    """Return the checkpoints that ``--best`` leaves, and a note that says how they were chosen."""
    if args.best is None:
        if args.metric or args.mode:
            raise ArgumentError("--metric and --mode need --best")
        return checkpoints, []
    if args.metric is None:
        raise ArgumentError("--best needs the scores: --metric FILE[:NAME]")
    if args.sma or args.ema or args.wma or args.wsm or args.sigma_rel or args.weights:
        raise ArgumentError(
            "--best averages equally: leave out --sma, --ema, --wma, --wsm, --sigma-rel, --weights"
        )
    scores, name = read_scores(args.metric)
    mode: Literal["min", "max"] = args.mode or "min"
    if args.mode is None and not name.lower().endswith("loss"):
        raise ArgumentError(
            f"is a low or a high {name or 'score'} better? Add --mode min or --mode max"
        )
    chosen = best(checkpoints, scores, args.best, mode=mode)
    which = "lowest" if mode == "min" else "highest"
    note = f"the {len(chosen)} of {len(checkpoints)} checkpoints with the {which} {name or 'score'}"
    return chosen, [note]


def _averages(
    args: argparse.Namespace, checkpoints: Sequence[Checkpoint]
) -> dict[str, list[float]]:
    """Return a mapping from the name of each requested average to its checkpoint weights."""
    n = len(checkpoints)
    found: dict[str, list[float]] = {}
    if args.swa:
        found["swa"] = weights.swa(n)
    found |= {f"sma{size}": weights.sma(n, size) for size in args.sma or ()}
    for decay in args.ema or ():
        found[f"ema{decay:g}"] = weights.ema(_steps(checkpoints, "--ema"), decay)
    if args.wma:
        found["wma"] = weights.wma(n)
    if args.wsm:
        found[f"wsm-{args.wsm}"] = weights.wsm(n, args.wsm)
    for width in args.sigma_rel or ():
        found[f"sigma{width:g}"] = _of_width(checkpoints, width)
    if args.weights is not None:
        if len(args.weights) != n:
            raise ArgumentError(f"--weights has {len(args.weights)} numbers for {n} checkpoints")
        found["weights"] = args.weights
    return found or {"swa": weights.swa(n)}


def _steps(checkpoints: Sequence[Checkpoint], option: str) -> list[int]:
    unknown = [one.path.name for one in checkpoints if one.step is None]
    if unknown:
        raise CheckpointError(
            f"{option} needs the step of every checkpoint, in its name or its metadata; "
            f"{unknown[0]} has none"
        )
    return [one.step or 0 for one in checkpoints]


def _of_width(checkpoints: Sequence[Checkpoint], width: float) -> list[float]:
    """Return the weights of snapshots that synthesize a power-function average of `width`."""
    steps, gammas = [], []
    for one in checkpoints:
        try:
            start = int(one.metadata["start"])
            steps.append(int(one.metadata["step"]) - start)
            gammas.append(float(one.metadata["gamma"]))
        except (KeyError, ValueError):
            raise CheckpointError(
                f"--sigma-rel: {one.path} is no snapshot of a power-function average; "
                "fastema.posthoc.save_snapshot writes these"
            ) from None
    found, error = weights.sigma_rel(steps, gammas, width)
    if error > 0.05:
        warnings.warn(
            f"the profile is off by {error:.2g}: these snapshots cannot produce this width",
            stacklevel=1,
        )
    return found


def _outputs(out: Path, names: Sequence[str], made: Merge) -> list[Path]:
    if len(names) == 1:
        return [out]
    suffix = "" if made.writes_folder(out) else out.suffix
    stem = out.name.removesuffix(suffix) if suffix else out.name
    return [out.with_name(f"{stem}-{name}{suffix}") for name in names]


def _print_table(made: Merge, averages: dict[str, list[float]]) -> None:
    """Print one line per checkpoint, with its weight in each average."""
    head = ["checkpoint", "step", "size", *averages]
    rows = [
        [
            one.path.name,
            "?" if one.step is None else str(one.step),
            size(sum(tensor.nbytes for tensor in one.tensors.values())),
            *(f"{found[i]:.6g}" for found in averages.values()),
        ]
        for i, one in enumerate(made.checkpoints)
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        first, *rest = (
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]))


def _summary(
    made: Merge, averages: dict[str, list[float]], outputs: Sequence[Path], dry: bool
) -> dict[str, Any]:
    return {
        "checkpoints": [
            {"path": str(one.path), "format": one.format, "step": one.step}
            for one in made.checkpoints
        ],
        "outputs": [
            {"path": str(out), "average": name, "weights": found, "written": not dry}
            for out, (name, found) in zip(outputs, averages.items(), strict=True)
        ],
        "bytes_read": made.nbytes,
        "notes": made.notes,
    }


@contextmanager
def _progress(nbytes: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; yield a function that takes the bytes just read."""
    if quiet or not sys.stderr.isatty():
        yield lambda n: None
        return
    try:
        from rich import progress as bars
        from rich.console import Console
    except ImportError:
        yield lambda n: None
        return
    columns = (
        *(bars.TextColumn("averaging"), bars.BarColumn(), bars.DownloadColumn()),
        *(bars.TransferSpeedColumn(), bars.TimeRemainingColumn()),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("averaging", total=nbytes)
        yield lambda n: bar.advance(task, n)
