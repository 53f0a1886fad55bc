"""``python -m bench.quality [--quick] [--out DIR]``: does averaging the weights help?

Small networks on the real data that ships with scikit-learn, trained with small batches. One run
gives four sets of weights at its end: the raw ones, their EMA, SWA and SMA. So every comparison is
paired: same split, same start, same batches. The learning rate is chosen beforehand, for the raw
weights, on validation rows of other seeds; what the averages do is fixed in advance.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import wilcoxon
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fastema
from bench import machine, report

Schedule = Literal["constant", "cosine"]
Scores = dict[str, dict[str, float]]  # of each set of weights, each metric
Row = dict[str, Any]

SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")
RAW = "raw"
AVERAGES = ("EMA", "SWA", "SMA")
WEIGHTS = (RAW, *AVERAGES)

MOMENTUM = 0.9
DROPOUT = 0.2
VALIDATION_SHARE = 0.25  # of the rows that are not for testing
FIRST_TUNING_SEED = 1_000
RESAMPLES = 10_000


@dataclass(frozen=True)
class Settings:
    """How much is run."""

    epochs: int
    seeds: int
    tuning_seeds: int
    rates: int  # of each task's, from the middle


FULL = Settings(epochs=40, seeds=20, tuning_seeds=4, rates=5)
QUICK = Settings(epochs=4, seeds=3, tuning_seeds=1, rates=2)


# -- data -----------------------------------------------------------------------------------------


class Rows(NamedTuple):
    x: NDArray[np.float64]  # (rows, features)
    y: NDArray[Any]  # (rows,) classes, or (rows, targets)
    strata: NDArray[np.int64] | None  # (rows,) what every split holds alike shares of


class Split(NamedTuple):
    x: Tensor  # (train, features) f32, standardised
    y: Tensor  # (train,) i64 classes, or (train, targets) f32, standardised
    x_held: Tensor
    y_held: Tensor
    scale: float  # standard deviation of the targets, in their own unit


@dataclass(frozen=True)
class Task:
    name: str
    what: str
    load: Callable[[], Rows]
    metrics: dict[str, str]  # to its format; the first chooses the learning rate
    batch_size: int
    width: int
    test_share: float
    rates: tuple[float, ...]  # learning rates to choose from

    @property
    def classes(self) -> bool:
        return "log loss" in self.metrics


def diabetes() -> Rows:
    bunch = load_diabetes()
    return Rows(bunch.data, bunch.target[:, None], None)


def halves() -> Rows:
    bunch = load_digits()
    return Rows(bunch.data[:, :32], bunch.data[:, 32:], bunch.target)


def digits() -> Rows:
    bunch = load_digits()
    return Rows(bunch.data, bunch.target, bunch.target)


TASKS = (
    Task(
        name="diabetes",
        what="disease progression after a year from 10 measurements of 442 patients",
        load=diabetes,
        metrics={"RMSE": ".2f"},
        batch_size=8,
        width=64,
        test_share=1 / 3,
        rates=(0.0001, 0.0003, 0.001, 0.003, 0.01),
    ),
    Task(
        name="digit halves",
        what="the lower half of 1,797 handwritten digits, 32 pixels of 0 to 16, from the upper",
        load=halves,
        metrics={"RMSE": ".3f"},
        batch_size=16,
        width=128,
        test_share=1 / 2,
        rates=(0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    Task(
        name="digits",
        what="the class of 1,797 handwritten digits of 8 × 8 pixels",
        load=digits,
        metrics={"log loss": ".4f", "error %": ".2f"},
        batch_size=16,
        width=128,
        test_share=1 / 2,
        rates=(0.001, 0.003, 0.01, 0.03, 0.1),
    ),
)


def split(task: Task, seed: int, *, validation: bool) -> Split:
    """Rows to train on and rows held out, standardised by the former.

    Held out is the test share; for validation that is put aside and a part of the rest held out.
    """
    rows = task.load()
    everything = np.arange(len(rows.x))

    def parted(among: NDArray[np.int64], share: float) -> tuple[NDArray[Any], NDArray[Any]]:
        strata = None if rows.strata is None else rows.strata[among]
        kept, held = train_test_split(among, test_size=share, random_state=seed, stratify=strata)
        return kept, held

    kept, held = parted(everything, task.test_share)
    if validation:
        kept, held = parted(kept, VALIDATION_SHARE)
    # One scale for all columns: pixels share theirs, those of the diabetes data come standardised.
    x = torch.from_numpy((rows.x - rows.x[kept].mean()) / rows.x[kept].std()).float()
    scale = 1.0
    if task.classes:
        y = torch.from_numpy(rows.y)
    else:
        scale = float(rows.y[kept].std())
        y = torch.from_numpy((rows.y - rows.y[kept].mean()) / scale).float()
    return Split(x[kept], y[kept], x[held], y[held], scale)


# -- training -------------------------------------------------------------------------------------


def network(task: Task, data: Split) -> nn.Sequential:
    outputs = 10 if task.classes else data.y.shape[1]
    return nn.Sequential(
        nn.Linear(data.x.shape[1], task.width),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(task.width, task.width),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(task.width, outputs),
    )


def averages(model: nn.Module, steps: int) -> dict[str, Any]:
    """The averages of a run of so many steps.

    What is in the EMA, and in the SMA, is 5 % of the training old on average.
    """
    return {
        "EMA": fastema.EMA(model, decay=1.0 - 1.0 / (0.05 * steps)),
        "SWA": fastema.SWA(model, start_after=steps - steps // 4),
        "SMA": fastema.SMA(model, window=10, update_every=max(1, steps // 100)),
    }


def loss_of(task: Task, outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y) if task.classes else F.mse_loss(outputs, y)


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, data: Split) -> dict[str, float]:
    """Every metric of the weights the model holds, on the rows held out."""
    model.eval()
    outputs = model(data.x_held)
    model.train()
    loss = loss_of(task, outputs, data.y_held).item()
    if not task.classes:
        return {"RMSE": data.scale * math.sqrt(loss)}
    wrong = (outputs.argmax(1) != data.y_held).double().mean().item()
    return {"log loss": loss, "error %": 100.0 * wrong}


def train(
    task: Task, data: Split, rate: float, schedule: Schedule, epochs: int, seed: int
) -> Scores:
    """Train once; the scores of all four sets of weights at the end."""
    torch.manual_seed(seed)
    model = network(task, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    per_epoch = len(data.x) // task.batch_size  # what is left over waits for the next shuffle
    steps = epochs * per_epoch
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    kept = averages(model, steps)
    for _ in range(epochs):
        order = torch.randperm(len(data.x))
        for rows in order[: per_epoch * task.batch_size].view(per_epoch, task.batch_size):
            optimizer.zero_grad()
            loss_of(task, model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
            if schedule == "cosine":
                annealing.step()
            for average in kept.values():
                average.update()
    scores = {RAW: evaluate(task, model, data)}
    for name, average in kept.items():
        with average.swapped():
            scores[name] = evaluate(task, model, data)
    return scores


@contextmanager
def reproducible() -> Iterator[None]:
    """One thread: steps this small gain nothing from more, and sums do not depend on the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


# -- choice of the learning rate ------------------------------------------------------------------


def tune(task: Task, schedule: Schedule, settings: Settings) -> list[Row]:
    """The mean validation scores of all weights at each learning rate."""
    skipped = (len(task.rates) - settings.rates) // 2
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + settings.tuning_seeds)
    splits = {seed: split(task, seed, validation=True) for seed in seeds}
    rows = []
    for rate in task.rates[skipped : skipped + settings.rates]:
        runs = [
            train(task, data, rate, schedule, settings.epochs, seed)
            for seed, data in splits.items()
        ]
        scores = {
            weights: {
                metric: float(np.mean([run[weights][metric] for run in runs]))
                for metric in task.metrics
            }
            for weights in WEIGHTS
        }
        rows.append({"task": task.name, "schedule": schedule, "rate": rate, "scores": scores})
    return rows


def chosen(task: Task, rows: list[Row], weights: str = RAW) -> float:
    """The learning rate at which these weights did best; one that diverged did worst."""
    metric = next(iter(task.metrics))

    def key(row: Row) -> float:
        score = row["scores"][weights][metric]
        return score if math.isfinite(score) else math.inf

    return float(min(rows, key=key)["rate"])


# -- comparison -----------------------------------------------------------------------------------


def relative_change(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, ...]:
    """Change of the mean in percent, and its 95 % bootstrap interval over the seeds, paired."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(ours), size=(RESAMPLES, len(ours)))  # (resamples, seeds)
    resampled = ours[drawn].mean(1) / theirs[drawn].mean(1) - 1.0
    low, high = np.percentile(100.0 * resampled, [2.5, 97.5])
    return 100.0 * float(ours.mean() / theirs.mean() - 1.0), float(low), float(high)


def compare(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Row:
    """Two scores per seed, lower being better: size and certainty of the difference."""
    change, low, high = relative_change(ours, theirs)
    same = bool(np.all(ours == theirs))
    return {
        "n": len(ours),
        "mean": float(ours.mean()),
        "sd": float(ours.std(ddof=1)),
        "change_percent": change,
        "interval_percent": [low, high],
        "better": int(np.sum(ours < theirs)),
        "worse": int(np.sum(ours > theirs)),
        "p": 1.0 if same else float(wilcoxon(ours, theirs).pvalue),
    }


def values(runs: list[Row], task: str, schedule: str, weights: str, metric: str) -> NDArray[Any]:
    """One score per seed."""
    return np.array(
        [
            run["scores"][weights][metric]
            for run in runs
            if (run["task"], run["schedule"]) == (task, schedule)
        ]
    )


def comparisons(runs: list[Row]) -> list[Row]:
    """All weights against the raw ones, as COMPARED says; the raw ones themselves have no p."""
    rows = []
    for task in TASKS:
        for metric in task.metrics:
            for _, ours, theirs in COMPARED:
                raw = values(runs, task.name, theirs, RAW, metric)
                for weights in WEIGHTS:
                    if (weights, ours) == (RAW, theirs):
                        found = {"n": len(raw), "mean": raw.mean(), "sd": raw.std(ddof=1)}
                    else:
                        found = compare(values(runs, task.name, ours, weights, metric), raw)
                    of = {"task": task.name, "metric": metric, "schedule": ours, "weights": weights}
                    rows.append(of | {"against": theirs} | found)
    return rows


# -- table ----------------------------------------------------------------------------------------


COMPARED = (  # title, schedule of the averages, schedule of the raw weights
    ("Constant learning rate", "constant", "constant"),
    ("Cosine learning rate", "cosine", "cosine"),
    ("Averages at a constant learning rate against raw weights with cosine", "constant", "cosine"),
)


def own(rows: list[Row], task: Task, metric: str, schedule: str) -> dict[str, Row]:
    """Of each set of weights, the comparison with the raw ones of the same runs."""
    return {
        row["weights"]: row
        for row in rows
        if (row["task"], row["metric"]) == (task.name, metric)
        and row["schedule"] == row["against"] == schedule
    }


def signed(number: float, places: int) -> str:
    text = f"{number:+.{places}f}"
    return text if float(text) else text[1:]


def percent(row: Row) -> str:
    """A change and its interval, with more places where all of it is small."""
    numbers = (row["change_percent"], *row["interval_percent"])
    places = 1 if max(map(abs, numbers)) >= 0.95 else 2
    change, low, high = (signed(number, places) for number in numbers)
    return f"{change} % ({low} to {high})"


def chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def comparison_table(rows: list[Row], task: Task, metric: str, ours: str, theirs: str) -> str:
    body = [
        [
            f"{row['schedule']}, {row['weights']}",
            format(row["mean"], task.metrics[metric]),
            format(row["sd"], task.metrics[metric]),
            *(
                [percent(row), f"{row['better']} of {row['n']}", chance(row["p"])]
                if "p" in row
                else ["", "", ""]
            ),
        ]
        for row in rows
        if (row["task"], row["metric"]) == (task.name, metric)
        and (row["schedule"], row["against"]) in {(ours, theirs), (theirs, theirs)}
        and (ours == row["schedule"] or row["weights"] == RAW)
    ]
    return report.aligned(["learning rate, weights", metric, "sd", "change", "better", "p"], body)


def tuning_table(rows: list[Row], task: Task) -> str:
    """Validation scores of the first metric; the best of each set of weights is marked."""
    metric = next(iter(task.metrics))
    body = []
    for schedule in SCHEDULES:
        of_schedule = [row for row in rows if row["schedule"] == schedule]
        best = {weights: chosen(task, of_schedule, weights) for weights in WEIGHTS}
        for row in of_schedule:
            scores = {w: format(row["scores"][w][metric], task.metrics[metric]) for w in WEIGHTS}
            marked = (f"**{scores[w]}**" if best[w] == row["rate"] else scores[w] for w in WEIGHTS)
            body.append([f"{schedule}, {row['rate']:g}", *marked])
    head = ["learning rate", *(f"{metric}, {weights}" for weights in WEIGHTS)]
    return report.aligned(head, body)


def summary(result: Row) -> str:
    """Changes against the raw weights of the same runs: a row for each metric and schedule."""
    rows = result["comparisons"]
    tests = sum("p" in row for row in rows)
    body = []
    for task in TASKS:
        for metric, number in task.metrics.items():
            for schedule in SCHEDULES:
                found = own(rows, task, metric, schedule)
                cells = [
                    percent(found[weights]) + ("" if found[weights]["p"] < 0.05 / tests else " ?")
                    for weights in AVERAGES
                ]
                raw = format(found[RAW]["mean"], number)
                body.append([f"{task.name}, {metric}, {schedule}", raw, *cells])
    return report.aligned(["learning rate", RAW, *AVERAGES], body)


def claim(result: Row) -> str:
    """What is said of RMSE, and the least and greatest change of it that was found here."""
    found = []
    for schedule in SCHEDULES:
        for task in TASKS:
            if "RMSE" in task.metrics:
                rows = own(result["comparisons"], task, "RMSE", schedule)
                changes = [rows[weights]["change_percent"] for weights in AVERAGES]
                low, high = signed(min(changes), 1), signed(max(changes), 1)
                change = low if low == high else f"{low} to {high}"
                found.append(f"{change} % ({task.name}, {schedule} learning rate)")
    return (
        "Averages of weights are said to lower the RMSE of a regression by 2 to 5 %. Here they "
        f"change it by {', '.join(found)}."
    )


METHOD = """\
Lower is better everywhere. Networks of two hidden layers ({widths} units) with dropout {dropout},
SGD with momentum {momentum}, batches of {batches}, {epochs} epochs; the learning rate is constant,
or decays to zero along a cosine. At the end of one run: *raw*, the weights as they are; *EMA*,
decay 1 - 1/(0.05 steps), from the first step on; *SWA*, the mean over the last 25 % of the steps;
*SMA*, the mean of ten sets of weights that are 1 % of the steps apart. What the averages do was
fixed beforehand and not tuned.

Learning rates were chosen from {rates} values, for each task and schedule, by the first metric of
the *raw* weights on validation rows, in runs of {tuning_seeds} seeds of their own, whose test rows
were put aside. Then {seeds} other seeds: each draws test rows, initial weights and batches anew.
Nothing was chosen by test rows.

*sd* is that of the seeds; as their test rows differ, it is larger than what matters for pairs.
*Change*: of the mean, with its 95 % bootstrap interval over the seeds. *Better*: seeds with a lower
value. *p*: two-sided Wilcoxon signed-rank test over the pairs, each by itself; as there are {tests}
tests, 0.05 for all of them together asks for p < {level} (Bonferroni), and *?* marks what does not
reach it. All seeds split the same rows: intervals and p speak of further runs on this data, not of
other data."""


def markdown(result: Row) -> str:
    settings = Settings(**result["settings"])
    rows = result["comparisons"]
    tests = sum("p" in row for row in rows)
    method = METHOD.format(
        widths=" or ".join(map(str, sorted({task.width for task in TASKS}))),
        batches=" or ".join(map(str, sorted({task.batch_size for task in TASKS}))),
        dropout=DROPOUT,
        momentum=MOMENTUM,
        tests=tests,
        level=f"{0.05 / tests:.4f}",
        **asdict(settings),
    )
    quick = " Quick mode: too short to tell" if settings == QUICK else ""
    parts = [
        "# Does averaging the weights help?" + quick,
        report.provenance(result["header"]),
        "## In short: change against the raw weights of the same runs",
        summary(result),
        claim(result),
        f"![Change against the raw weights, per seed]({result['header']['mode']}.png)",
        method,
    ]
    for title, ours, theirs in COMPARED:
        parts.append(f"## {title}")
        for task in TASKS:
            parts.append(f"{task.name.capitalize()}: {task.what}.")
            parts += [comparison_table(rows, task, metric, ours, theirs) for metric in task.metrics]
    parts.append(
        "## Validation: what the learning rates were chosen from\n\nBold: the best of its column."
    )
    for task in TASKS:
        tuned = [row for row in result["tuning"] if row["task"] == task.name]
        parts += [f"{task.name.capitalize()}:", tuning_table(tuned, task)]
    return "\n\n".join(parts) + "\n"


# -- picture --------------------------------------------------------------------------------------

INK, GREY = "#20242a", "#6b7280"
COLOURS = {"EMA": "#1b5fa6", "SWA": "#e07b27", "SMA": "#3a8f5c"}
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#b6bcc4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": GREY,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e3e7ec",
    "axes.axisbelow": True,
}


def panel(axes: Axes, result: Row, task: Task, metric: str) -> None:
    """Change against raw: a point per seed, the change of the mean and its interval."""
    height, ticks, labels = 0.0, [], []
    axes.axvline(0.0, color=INK, lw=1)
    right_of = axes.get_yaxis_transform()  # x in shares of the axes
    for schedule in SCHEDULES:
        raw = values(result["runs"], task.name, schedule, RAW, metric)
        unit = " %" if metric.endswith("%") else ""
        axes.text(
            0.0,
            height + 0.62,
            f"{schedule} learning rate; raw: {raw.mean():{task.metrics[metric]}}{unit}",
            transform=right_of,
            va="center",
            fontsize=9,
            color=GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
        for weights, row in own(result["comparisons"], task, metric, schedule).items():
            if weights == RAW:
                continue
            ours = values(result["runs"], task.name, schedule, weights, metric)
            colour, change = COLOURS[weights], row["change_percent"]
            axes.plot(
                row["interval_percent"],
                [height] * 2,
                color=colour,
                lw=9,
                alpha=0.25,
                solid_capstyle="butt",
            )
            axes.scatter(
                100.0 * (ours / raw - 1.0), [height] * len(raw), s=13, color=colour, alpha=0.5, lw=0
            )
            axes.scatter(change, height, s=70, color=colour, ec="white", lw=1.2, zorder=3)
            axes.text(
                1.02,
                height,
                f"{signed(change, 1)} %",
                transform=right_of,
                va="center",
                color=colour,
                fontweight="bold",
            )
            ticks.append(height)
            labels.append(weights)
            height -= 1.0
        height -= 0.8
    axes.set_yticks(ticks, labels)
    axes.set_ylim(min(ticks) - 0.7, 1.0)
    name = metric.replace("%", "rate")
    axes.set_title(
        f"{task.name.capitalize()}: {name}", loc="left", fontweight="bold", fontsize=11, pad=8
    )
    axes.set_xlabel("←  better      change against raw, %      worse  →", fontsize=9)


def draw(result: Row, out: Path) -> None:
    """Write the picture: a panel for each metric of each task."""
    header, seeds = result["header"], result["settings"]["seeds"]
    panels = [(task, metric) for task in TASKS for metric in task.metrics]
    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 8.2), dpi=150, facecolor="white")
        grid = figure.subplots(2, len(panels) // 2)
        figure.subplots_adjust(
            left=0.065, right=0.925, top=0.83, bottom=0.115, hspace=0.42, wspace=0.34
        )
        for axes, (task, metric) in zip(grid.flat, panels, strict=True):
            panel(axes, result, task, metric)
        figure.text(
            0.03,
            0.955,
            "What averaging the weights does to the test error",
            fontsize=18,
            fontweight="bold",
            va="center",
        )
        figure.text(
            0.03,
            0.905,
            f"Small points: averaged against raw weights of one run, for each of {seeds} seeds. "
            "Large points and bars: the change of the mean, its 95 % interval.",
            color=GREY,
            va="center",
        )
        figure.text(
            0.03,
            0.025,
            f"{header['command']}, {header['date_utc'][:10]}. Small networks on data that ships "
            "with scikit-learn; learning rates chosen for the raw weights, on other seeds. Scales "
            "differ between panels.",
            color=GREY,
            fontsize=8.5,
            va="center",
        )
        figure.savefig(out)


# -- all of it ------------------------------------------------------------------------------------


def measure(settings: Settings) -> Row:
    """Choose learning rates, train on all seeds, compare."""
    tuning: list[Row] = []
    runs: list[Row] = []
    with reproducible():
        for task in TASKS:
            rates = {}
            for schedule in SCHEDULES:
                tuned = tune(task, schedule, settings)
                rates[schedule] = chosen(task, tuned)
                tuning += tuned
            for seed in range(settings.seeds):
                data = split(task, seed, validation=False)
                for schedule, rate in rates.items():
                    of = {"task": task.name, "schedule": schedule, "seed": seed, "rate": rate}
                    scores = train(task, data, rate, schedule, settings.epochs, seed)
                    runs.append(of | {"scores": scores})
    return {
        "settings": asdict(settings),
        "tuning": tuning,
        "runs": runs,
        "comparisons": comparisons(runs),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and keep tables and picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few epochs and seeds, seconds")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    name = "quick-quality" if options.quick else "quality"
    command = "python -m bench.quality" + (" --quick" if options.quick else "")
    with reproducible():
        header: dict[str, Any] = machine.header(command, name)
    for package in ("scikit-learn", "scipy"):
        header["versions"][package] = version(package)
    result = {"header": header, **measure(QUICK if options.quick else FULL)}
    text = markdown(result)
    print(text)
    report.store(options.out, name, result, text)
    draw(result, options.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
