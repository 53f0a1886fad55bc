"""``fastema average``: average finished checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastema.cli.arguments import add_force, amount, count, decay, number

SUMMARY = "Average finished checkpoints: safetensors, torch, Hugging Face, DCP folders."
EXTRA = "posthoc"
NEEDS: dict[str, str] = {}


def _numbers(text: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected comma-separated numbers, got {text}") from None


_width = number(float, lambda value: 0.0 < value < 0.289, "a number in (0, 0.288]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema average``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  fastema average step-100.safetensors step-200.safetensors -o mean.safetensors\n"
        "  fastema average --dir runs/llama --last 10 --ema 0.9998 -o runs/llama-ema\n"
        "  fastema average --dir runs/llama --window 40K --swa --wsm 1-sqrt -o merged\n"
        "  fastema average --dir . --window 250B --unit tokens --tokens-per-step 4M -o m\n"
        "  fastema average --dir runs --best 5 --metric log.csv:eval_loss -o out\n"
    )
    parser.add_argument("paths", nargs="*", type=Path, help="checkpoints, oldest first")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="take the checkpoints in a folder instead"
    )
    parser.add_argument("--last", type=count, metavar="N", help="with --dir: the newest N")
    parser.add_argument(
        "--window",
        type=amount,
        metavar="N",
        help="with --dir: only checkpoints less than N steps older than the newest; K, M, B and T "
        "stand for thousands to trillions",
    )
    parser.add_argument(
        "--min-spacing",
        type=amount,
        metavar="N",
        help="with --dir: skip a checkpoint less than N steps older than the one last taken",
    )
    parser.add_argument(
        "--unit",
        choices=("steps", "tokens"),
        default="steps",
        help="unit of --window and --min-spacing (%(default)s); tokens are those that the Trainer "
        "counted in trainer_state.json, or steps times --tokens-per-step",
    )
    parser.add_argument(
        "--tokens-per-step", type=amount, metavar="N", help="training tokens in each step"
    )
    parser.add_argument(
        "--best",
        type=count,
        metavar="N",
        help="only the N checkpoints with the best scores by --metric, averaged equally",
    )
    parser.add_argument(
        "--metric",
        metavar="FILE[:NAME]",
        help="scores: a JSON file that maps paths, names or steps to numbers; or a metric in a log "
        "that fastema smooth reads, such as trainer_state.json:eval_loss",
    )
    parser.add_argument(
        "--mode",
        choices=("min", "max"),
        help="whether low or high scores are best; may be left out if NAME ends in loss: min",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help="a file, if the name ends in .safetensors; otherwise a folder, if the newest "
        "checkpoint is one; several averages are named out-swa, out-ema0.99, ...",
    )
    add_force(parser)
    parser.add_argument("--key", help="key of the weights inside a checkpoint, such as trainer.ema")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    group = parser.add_argument_group(
        "averages, computed in one read; --sma, --ema and --sigma-rel can be repeated"
    )
    group.add_argument(
        "--swa", action="store_true", help="the mean of all checkpoints (the default)"
    )
    group.add_argument(
        "--sma", type=count, action="append", metavar="N", help="the mean of the last N"
    )
    group.add_argument(
        "--ema",
        type=decay,
        action="append",
        metavar="DECAY",
        help="an exponential average with this decay per step: each checkpoint stands for the "
        "steps since the previous one",
    )
    group.add_argument("--wma", action="store_true", help="weight the j-th checkpoint by j")
    group.add_argument(
        "--wsm",
        choices=("linear", "cosine", "1-sqrt"),
        help="merge as if the learning rate had decayed from the oldest to the newest",
    )
    group.add_argument(
        "--sigma-rel",
        type=_width,
        action="append",
        metavar="WIDTH",
        help="a power-function average of this relative width, from fastema.posthoc snapshots",
    )
    group.add_argument(
        "--weights",
        type=_numbers,
        metavar="W1,W2,...",
        help="exactly these weights (write --weights=-1,2 if the first is negative)",
    )


def run(args: argparse.Namespace) -> int:
    """Select, check, average and write checkpoints; return the exit code."""
    from fastema.cli.average import command

    command.run(args)
    return 0
