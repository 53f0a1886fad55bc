"""``fastema average``: averages of finished checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastema.cli.arguments import count, decay, number

SUMMARY = "Average finished checkpoints: safetensors, torch files, Hugging Face and DCP folders."
EXTRA = "posthoc"
NEEDS: dict[str, str] = {}


def _numbers(text: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, got {text}") from None


_width = number(float, lambda value: 0.0 < value < 0.289, "a number in (0, 0.288]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema average``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  fastema average step-100.safetensors step-200.safetensors -o mean.safetensors\n"
        "  fastema average --dir runs/llama --last 10 --ema 0.9998 -o runs/llama-ema\n"
        "  fastema average --dir runs/llama --window 40000 --swa --wsm 1-sqrt -o runs/merged\n"
    )
    parser.add_argument("paths", nargs="*", type=Path, help="checkpoints, oldest first")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="take those of a folder instead")
    parser.add_argument("--last", type=count, metavar="N", help="with --dir: the newest N")
    parser.add_argument(
        "--window",
        type=count,
        metavar="STEPS",
        help="with --dir: those less than STEPS older than the newest",
    )
    parser.add_argument(
        "--min-spacing",
        type=count,
        metavar="STEPS",
        help="with --dir: leave out those less than STEPS older than the one taken before",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help="a safetensors file, or a folder where the newest checkpoint is one; several averages "
        "get names of their own: out-swa, out-ema0.99",
    )
    parser.add_argument("--key", help="where the weights are in a checkpoint, such as trainer.ema")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    group = parser.add_argument_group(
        "averages, all made in one pass of reading; --sma, --ema and --sigma-rel as often as wanted"
    )
    group.add_argument("--swa", action="store_true", help="the mean of all (the default)")
    group.add_argument(
        "--sma", type=count, action="append", metavar="N", help="the mean of the last N"
    )
    group.add_argument(
        "--ema",
        type=decay,
        action="append",
        metavar="DECAY",
        help="an exponential average, by its decay per step: each checkpoint counts with the steps "
        "since the one before",
    )
    group.add_argument("--wma", action="store_true", help="the j-th counts j-fold")
    group.add_argument(
        "--wsm",
        choices=("linear", "cosine", "1-sqrt"),
        help="as if the learning rate had decayed from the oldest to the newest",
    )
    group.add_argument(
        "--sigma-rel",
        type=_width,
        action="append",
        metavar="WIDTH",
        help="the power-function average of this relative width, from snapshots of fastema.posthoc",
    )
    group.add_argument(
        "--weights",
        type=_numbers,
        metavar="W1,W2,...",
        help="these weights, exactly (--weights=-1,2 where the first is negative)",
    )


def run(args: argparse.Namespace) -> int:
    """Choose, check, average, write; the exit code."""
    from fastema.cli.average import command

    command.run(args)
    return 0
