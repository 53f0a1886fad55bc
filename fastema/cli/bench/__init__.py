"""``fastema bench``: time an update of your own model against the installed libraries."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from importlib.util import find_spec
from typing import Any

from fastema.cli.arguments import dtype_name, number, picture_path
from fastema.errors import ArgumentError

SUMMARY = "Time an update for your own model's shapes, against other libraries' averages."
EXTRA = "torch"
NEEDS = {"torch": "torch"}

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema bench``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  fastema bench                                       shapes of GPT-2 small\n"
        "  fastema bench --model timm:resnet50 --dtype float32\n"
        "  fastema bench --model transformers:Qwen2Config --average bfloat16\n"
        "  fastema bench --checkpoint model.safetensors -o bench.png\n"
        '  fastema bench --shapes shapes.json --json           {"name": [768, 768], ...}\n'
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        metavar="LIBRARY:NAME",
        help="shapes of a timm or torchvision model, or of a transformers config class; no weights "
        "are created or downloaded",
    )
    source.add_argument("--checkpoint", metavar="PATH", help="shapes of a checkpoint's weights")
    source.add_argument(
        "--shapes",
        metavar="FILE",
        help="JSON file: a mapping of names to shapes, or a list of shapes",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name(*_DTYPES),
        default="bfloat16",
        help="dtype of the weights (%(default)s)",
    )
    parser.add_argument(
        "--average",
        metavar="DTYPE",
        type=dtype_name(*_DTYPES),
        default="float32",
        help="dtype of the average (%(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="torch device to run on (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=number(float, lambda value: 0.0 < value < 1e6, "a number above 0"),
        default=3.0,
        help="seconds of timing per library (%(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument(
        "-o", "--output", type=picture_path, help="picture to write: .png, .svg or .pdf"
    )


def run(args: argparse.Namespace) -> int:
    """Time all ways, print the table and draw the picture; return the exit code."""
    from fastema.cli.bench.race import time_contenders
    from fastema.cli.bench.shapes import shapes_of

    if args.output is not None and find_spec("matplotlib") is None:
        raise ArgumentError("--output needs matplotlib: pip install matplotlib")
    title, shapes = shapes_of(args)
    found: list[Any] = []
    for one in time_contenders(shapes, args):
        found.append(one)
        if sys.stderr.isatty():
            print(f"\r{len(found)} libraries timed", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    elements = sum(shape.numel() for shape in shapes)
    head = {"model": title, "tensors": len(shapes), "elements": elements}
    head |= {"weights": args.dtype, "average": args.average, "device": args.device}
    if args.json:
        print(json.dumps({**head, "ways": [one._asdict() for one in found]}, indent=2))
    else:
        _print(head, found)
    if args.output is not None:
        from fastema.cli.bench.picture import draw

        draw(head, found, args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def _print(head: dict[str, Any], found: list[Any]) -> None:
    from fastema.cli.sizes import LINE, figure

    text = (
        f"{head['model']}: {head['elements']:,} weights in {head['tensors']:,} tensors, "
        f"{head['weights']}, average {head['average']}, on {head['device']}"
    )
    print(f"{textwrap.fill(text, LINE)}\n")
    rows = [("", "ms", "x fastema", "GB/s", "of plain memory")]
    rows += [
        (
            one.name,
            figure(one.ms),
            f"{one.ratio:.2f}",
            f"{one.gbps:.3g}",
            "" if one.share is None else f"{one.share:.0%}",
        )
        for one in found
        if one.ms is not None
    ]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    wide[0] = max(len(one.name) for one in found)
    for name, *cells in rows:
        figures = [cell.rjust(w) for cell, w in zip(cells, wide[1:], strict=True)]
        print("  ".join([name.ljust(wide[0]), *figures]).rstrip())
    for one in found:
        if one.ms is None:
            why = textwrap.shorten(one.why, LINE - wide[0] - 2, placeholder="...")
            print(f"{one.name.ljust(wide[0])}  {why}")
    text = (
        "Medians; each library was timed in turns with fastema. GB/s counts the bytes that an "
        "update must move. Plain memory is the fastest kernel that only moves as many bytes."
    )
    print(f"\n{textwrap.fill(text, LINE)}")
