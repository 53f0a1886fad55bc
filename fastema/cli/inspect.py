"""``fastema inspect``: describe what a checkpoint holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastema.cli.arguments import add_state_arguments

if TYPE_CHECKING:
    from fastema.checkpoint import Description

SUMMARY = "Describe a checkpoint: its library, schedule, step, tensors and integrity."
EXTRA = "torch"
NEEDS: dict[str, str] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema inspect``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  fastema inspect ema.safetensors\n"
        "  fastema inspect runs/checkpoint-500 --check\n"
        "  fastema inspect last.ckpt --key callbacks.ema --json\n"
    )
    parser.add_argument("path", type=Path, help="a checkpoint: a file or a folder")
    add_state_arguments(parser)
    parser.add_argument(
        "--check", action="store_true", help="read all of it and verify the checksums"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print the description as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the description and return the exit code."""
    from fastema.checkpoint import inspect

    found = inspect(args.path, key=args.key, index=args.index, check=args.check)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    for name, value in _lines(found):
        print(f"{name:<12}{value}")
    if args.tensors:
        for name, one in found.checkpoint.tensors.items():
            print(f"  {name!r}: {one.kind.code}{list(one.shape)}")
    for note in found.average.notes:
        print(f"note: {note}")
    return 0


def _lines(found: Description) -> Iterator[tuple[str, str]]:
    from fastema.average.reports import describe_schedule
    from fastema.cli.sizes import size

    average, checkpoint = found.average, found.checkpoint
    what = {
        "model": "a model's weights; no separate average was found",
        "state dict": "a custom program: an average next to a model",
    }
    yield "path", str(average.path)
    yield "written by", what.get(average.library, average.library)
    yield "format", checkpoint.format
    if checkpoint.step is not None:
        yield "step", f"{checkpoint.step:,}"
    if average.num_updates is not None:
        yield "updates", f"{average.num_updates:,}"
    if average.schedule is not None:
        yield "schedule", describe_schedule(average.schedule)
    if average.options:
        yield "options", ", ".join(f"{name}={value}" for name, value in average.options.items())
    if found.reach is not None:
        age, spread = found.reach.mean_age, found.reach.std_age
        yield "lag", f"{age:,.4g} +/- {spread:,.4g} steps behind the model"
    kinds = ", ".join(f"{count} {code}" for code, count in found.dtypes.items())
    number = len(checkpoint.tensors)
    plural = "" if number == 1 else "s"
    yield "tensors", f"{number} tensor{plural} ({kinds}), {found.parameters:,} elements"
    yield "size", size(found.nbytes)
    if average.names != "full":
        yield "names", {"places": "none: stored as a list"}.get(average.names, average.names)
    if average.weights is not None:
        yield "also", "the training weights"
    yield "whole", "yes, by its checksums" if found.checked == "checksums" else "yes, by its sizes"
