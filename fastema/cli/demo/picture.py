"""Draw the loss and accuracy of raw and averaged weights, and the digits they disagree on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fastema.cli.demo import summary
from fastema.cli.demo.speed import Machine
from fastema.cli.demo.summary import Level, Tail
from fastema.cli.demo.train import MOMENTUM, History, Score, Setup
from fastema.tracking.plots.picture import heights_of, label_end, spread_labels, write_title
from fastema.tracking.plots.style import EDGE, EMA, GREY, PALE, RAW, STYLE

TILES = 14
MARGIN = 0.045  # left of all text, as a share of the figure's width
LABEL_HEIGHT = 0.19  # three lines of text and some space, as a share of an axes' height
ACCURACIES = (0, 30, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8)  # percent


def draw(setup: Setup, machine: Machine, history: History, out: Path) -> None:
    """Write the picture of a run to `out`; the suffix chooses the format."""
    seen = summary.tail(history)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 7.6), dpi=150)
        rows = figure.add_gridspec(
            2,
            2,
            left=MARGIN + 0.03,
            right=0.885,
            top=0.80,
            bottom=0.135,
            height_ratios=(4.6, 1),
            hspace=0.5,
            wspace=0.46,
        )
        _headline(figure, seen)
        _loss(figure.add_subplot(rows[0, 0]), history, seen)
        _accuracy(figure.add_subplot(rows[0, 1]), history, seen)
        _disagreements(figure, rows[1, :], setup, history)
        _footer(figure, setup, machine, history)
        figure.savefig(out)


def _headline(figure: Figure, seen: Tail) -> None:
    figure.text(
        MARGIN, 0.945, summary.describe_outcome(seen), fontsize=20, fontweight="bold", va="center"
    )
    figure.text(
        MARGIN,
        0.893,
        "A small network learns to read handwritten digits with a learning rate that stays high. "
        "Thick line: the same network with averaged weights.",
        fontsize=11,
        color=GREY,
        va="center",
    )


def _loss(axes: Axes, history: History, seen: Tail) -> None:
    write_title(axes, "Test loss", "log scale", fontsize=10, pad=12)
    axes.set_yscale("log")
    _curves(axes, history, seen, lambda score: score.loss, remark_at=0.96)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    levels = (seen.raw_loss, seen.ema_loss)
    _levels(axes, [level.mean for level in levels], levels, ".3f")


def _accuracy(axes: Axes, history: History, seen: Tail) -> None:
    """Draw accuracy as errors on an inverted log scale: 98 to 99 % is as far as 80 to 90 %."""
    write_title(axes, "Test images read right", "log scale of the errors", fontsize=10, pad=12)
    least = 50.0 / len(history.raw_answers)  # half an image: zero has no logarithm

    def errors(accuracy: float) -> float:
        return max(100.0 - accuracy, least)

    axes.set_yscale("log")
    _curves(axes, history, seen, lambda score: errors(score.accuracy), remark_at=0.04)
    axes.yaxis.set_inverted(True)
    axes.yaxis.set_major_locator(FixedLocator([100.0 - accuracy for accuracy in ACCURACIES]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda wrong, _: f"{100.0 - wrong:g} %"))
    levels = (seen.raw_accuracy, seen.ema_accuracy)
    _levels(axes, [errors(level.mean) for level in levels], levels, ".1f", " %")


def _curves(
    axes: Axes, history: History, seen: Tail, pick: Callable[[Score], float], *, remark_at: float
) -> None:
    epochs = [evaluation.epoch for evaluation in history.evaluations]
    end = len(history.times)
    start = end - seen.epochs
    axes.axvspan(start, end, color=PALE, zorder=0, linewidth=0)
    axes.annotate(
        "last epoch" if seen.epochs == 1 else f"last {seen.epochs} epochs",
        xy=((start + end) / 2, remark_at),
        xycoords=("data", "axes fraction"),
        fontsize=8.5,
        color=GREY,
        ha="center",
        va="center",
    )
    raw = [pick(evaluation.raw) for evaluation in history.evaluations]
    ema = [pick(evaluation.ema) for evaluation in history.evaluations]
    axes.plot(epochs, raw, color=RAW, linewidth=1.2)
    axes.plot(epochs, ema, color=EMA, linewidth=2.8, solid_capstyle="round")
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("epoch")


def _levels(
    axes: Axes, heights: Sequence[float], levels: Sequence[Level], digits: str, unit: str = ""
) -> None:
    """Label both curves at their ends, with mean and deviation over the shaded part."""
    if not all(map(math.isfinite, heights)):
        return
    names, colors = ("raw weights", "EMA weights"), (RAW, EMA)
    ends = sorted(zip(heights_of(axes, heights), names, levels, colors, strict=True))
    apart = spread_labels([height for height, *_ in ends], LABEL_HEIGHT)
    for height, (_, name, level, color) in zip(apart, ends, strict=True):
        text = f"{name}\n{level.mean:{digits}}{unit}\n± {level.std:{digits}}"
        label_end(axes, text, height, color)


def _disagreements(figure: Figure, place: SubplotSpec, setup: Setup, history: History) -> None:
    """Show the test images that only one of the two sets of weights reads correctly."""
    labels = setup.digits.test_labels
    raw_right = history.raw_answers == labels
    ema_right = history.ema_answers == labels
    differ = (raw_right != ema_right).nonzero().flatten().tolist()
    if differ:
        remark = (
            f"the average corrects {int((ema_right & ~raw_right).sum())} test images that the "
            f"raw weights misread, and misreads {int((raw_right & ~ema_right).sum())} that they "
            "read correctly"
        )
    else:
        remark = "the average and the raw weights read the same test images correctly"
    strip = figure.add_subplot(place)
    strip.set_axis_off()
    write_title(strip, "After the last step", remark, fontsize=10, pad=12)

    tiles = place.subgridspec(1, TILES, wspace=0.3)
    for column, index in enumerate(differ[:TILES]):
        tile = figure.add_subplot(tiles[0, column])
        tile.imshow(setup.digits.test_images[index, 0].numpy(), cmap="gray_r")
        tile.set(xticks=[], yticks=[])
        tile.spines[:].set(visible=True, color=EDGE)
        for row, (answers, color) in enumerate(
            ((history.raw_answers, RAW), (history.ema_answers, EMA))
        ):
            right = bool(answers[index] == labels[index])
            tile.text(
                0.5,
                -0.12 - 0.29 * row,
                f"{int(answers[index])} {'✓' if right else '✗'}",
                transform=tile.transAxes,
                color=color,
                fontweight="bold" if right else "normal",
                ha="center",
                va="top",
            )


def _footer(figure: Figure, setup: Setup, machine: Machine, history: History) -> None:
    recipe = setup.recipe
    cost = summary.cost(history)
    figure.text(
        MARGIN,
        0.03,
        f"{recipe.model}, {setup.num_parameters / 1e6:.2f} M parameters · SGD, constant learning "
        f"rate {recipe.lr:g}, momentum {MOMENTUM:g}, batches of {recipe.batch_size} · decay "
        f"{recipe.decay:g}, warmed up · seed {recipe.seed} · an EMA update takes "
        f"{1e3 * cost.update_s:.2f} of {1e3 * cost.step_s:.1f} ms "
        f"({machine.gbps(cost.update_s):.0f} GB/s)",
        fontsize=8.5,
        color=GREY,
        va="center",
    )
