"""``fastema demo``: train a small network on real digits, with and without averaging.

The data (1,797 handwritten digits of 8 x 8 pixels) ships with scikit-learn.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path

from fastema.cli.arguments import PICTURE_SUFFIXES, count, decay, number, picture_path
from fastema.cli.demo.choices import MODEL_NAMES, TRAIN_IMAGES, Recipe

SUMMARY = "Train a small model on handwritten digits and compare raw with averaged weights."
EXTRA = "demo"
NEEDS = {"torch": "torch", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastema demo``."""
    parser.add_argument(
        "--model", choices=MODEL_NAMES, default=Recipe.model, help="network to train (%(default)s)"
    )
    parser.add_argument(
        "--decay",
        type=decay,
        default=Recipe.decay,
        help="weight of the old average in each update, in [0, 1), warmed up: the n-th update "
        "uses (1 + n)/(10 + n) if that is smaller (%(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=count,
        default=Recipe.epochs,
        help="passes over the training images (%(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=number(
            int, lambda size: 1 <= size <= TRAIN_IMAGES, f"a whole number from 1 to {TRAIN_IMAGES}"
        ),
        default=Recipe.batch_size,
        help="images per step (%(default)s)",
    )
    parser.add_argument(
        "--lr",
        type=number(float, lambda lr: 0.0 < lr < math.inf, "a number above 0"),
        default=Recipe.lr,
        help="learning rate, constant (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        # The range that both scikit-learn and torch accept.
        type=number(int, lambda seed: 0 <= seed < 2**32, "a whole number in [0, 2**32)"),
        default=Recipe.seed,
        help="random seed; it fixes all losses and accuracies (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=picture_path,
        default=Path("fastema-demo.png"),
        help=f"picture to write: a {', '.join(PICTURE_SUFFIXES)} file (%(default)s)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print the summary only, not the table"
    )


def run(args: argparse.Namespace) -> int:
    """Train, report and draw; return the exit code 0."""
    from fastema.cli.demo import picture, report, speed, train

    with train.reproducible():
        names = [field.name for field in fields(Recipe)]
        setup = train.prepare(Recipe(**{name: getattr(args, name) for name in names}))
        machine = speed.measure(setup.model)
        reporter = report.Reporter(setup, machine, quiet=args.quiet)
        reporter.introduce()
        with reporter.watching() as on_evaluation:
            history = train.train(setup, machine.yardstick, on_evaluation)
    picture.draw(setup, machine, history, args.out)
    reporter.conclude(history, args.out)
    return 0
