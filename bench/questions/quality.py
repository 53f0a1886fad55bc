"""Measure whether averaging the weights helps.

Small networks are trained with small batches on the real data that ships with scikit-learn. Each
run ends with four sets of weights: the raw weights, their EMA, SWA and SMA. So every comparison is
paired: same split, same start, same batches. The learning rate is chosen beforehand for the raw
weights, on validation rows of other seeds. The averages' settings are fixed in advance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import wilcoxon
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fastema
from bench.race.quality_picture import draw, format_signed
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows

Schedule = Literal["constant", "cosine"]
Scores = dict[str, dict[str, float]]  # by set of weights and metric
Scored = dict[str, Any]  # a run, or the mean of several: task, schedule, rate and scores

SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine")
RAW = "raw"
AVERAGES = ("EMA", "SWA", "SMA")
WEIGHTS = (RAW, *AVERAGES)

MOMENTUM = 0.9
DROPOUT = 0.2
VALIDATION_SHARE = 0.25  # of the rows that are not test rows
FIRST_TUNING_SEED = 1_000
RESAMPLES = 10_000


@dataclass(frozen=True)
class QualitySizes:
    """Sizes of the measurement."""

    epochs: int
    seeds: int
    tuning_seeds: int
    rates: int  # learning rates to try, from the middle of each task's list


FULL = QualitySizes(epochs=40, seeds=20, tuning_seeds=4, rates=5)
QUICK = QualitySizes(epochs=4, seeds=3, tuning_seeds=1, rates=2)


# -- data -----------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The rows of a data set."""

    x: NDArray[np.float64]  # (rows, features)
    y: NDArray[Any]  # (rows,) classes, or (rows, targets)
    strata: NDArray[np.int64] | None  # (rows,) labels to stratify splits by


class Split(NamedTuple):
    """Rows to train on and rows held out, standardized."""

    x: Tensor  # (train, features) f32
    y: Tensor  # (train,) i64 classes, or (train, targets) f32
    x_held: Tensor
    y_held: Tensor
    scale: float  # standard deviation of the targets, in their original unit


@dataclass(frozen=True)
class Task:
    """A data set, its network, and the learning rates to choose from."""

    name: str
    what: str
    load: Callable[[], Data]
    metrics: tuple[str, ...]  # the first chooses the learning rate
    batch_size: int
    width: int
    test_share: float
    rates: tuple[float, ...]  # learning rates to choose from

    @property
    def classes(self) -> bool:
        return "log loss" in self.metrics


def diabetes() -> Data:
    bunch = load_diabetes()
    return Data(bunch.data, bunch.target[:, None], None)


def halves() -> Data:
    bunch = load_digits()
    return Data(bunch.data[:, :32], bunch.data[:, 32:], bunch.target)


def digits() -> Data:
    bunch = load_digits()
    return Data(bunch.data, bunch.target, bunch.target)


TASKS = (
    Task(
        name="diabetes",
        what="disease progression after a year from 10 measurements of 442 patients",
        load=diabetes,
        metrics=("RMSE",),
        batch_size=8,
        width=64,
        test_share=1 / 3,
        rates=(0.0001, 0.0003, 0.001, 0.003, 0.01),
    ),
    Task(
        name="digit halves",
        what="the lower half of 1,797 handwritten digits, 32 pixels of 0 to 16, from the upper",
        load=halves,
        metrics=("RMSE",),
        batch_size=16,
        width=128,
        test_share=1 / 2,
        rates=(0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    Task(
        name="digits",
        what="the class of 1,797 handwritten digits of 8 × 8 pixels",
        load=digits,
        metrics=("log loss", "error %"),
        batch_size=16,
        width=128,
        test_share=1 / 2,
        rates=(0.001, 0.003, 0.01, 0.03, 0.1),
    ),
)


def split(task: Task, seed: int, *, validation: bool) -> Split:
    """Split a task's rows into training and held-out rows, standardized by the training rows.

    The test rows are held out. With `validation`, they are set aside, and a part of the remaining
    rows is held out instead.
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
    # One scale for all columns: pixels share a scale, and the diabetes data is standardized.
    x = torch.from_numpy((rows.x - rows.x[kept].mean()) / rows.x[kept].std()).float()
    scale = 1.0
    if task.classes:
        y = torch.from_numpy(rows.y)
    else:
        scale = float(rows.y[kept].std())
        y = torch.from_numpy((rows.y - rows.y[kept].mean()) / scale).float()
    return Split(x[kept], y[kept], x[held], y[held], scale)


# -- training -------------------------------------------------------------------------------------


def build_network(task: Task, data: Split) -> nn.Sequential:
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
    """Return the averages for a run of `steps` steps.

    The mean age of the weights in the EMA and in the SMA is 5 % of the run.
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
    """Return every metric of the model's current weights on the held-out rows."""
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
    """Train once, and return the scores of all four sets of weights at the end."""
    torch.manual_seed(seed)
    model = build_network(task, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    per_epoch = len(data.x) // task.batch_size  # leftover rows are dropped until the next shuffle
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
def make_reproducible() -> Iterator[None]:
    """Run a block on one thread with a forked random state.

    Steps this small gain nothing from more threads, and sums do not depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


# -- choice of the learning rate ------------------------------------------------------------------


def tune(task: Task, schedule: Schedule, amount: QualitySizes) -> list[Scored]:
    """Return the mean validation scores of all sets of weights at each learning rate."""
    skipped = (len(task.rates) - amount.rates) // 2
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + amount.tuning_seeds)
    splits = {seed: split(task, seed, validation=True) for seed in seeds}
    rows = []
    for rate in task.rates[skipped : skipped + amount.rates]:
        runs = [
            train(task, data, rate, schedule, amount.epochs, seed) for seed, data in splits.items()
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


def choose_rate(task: Task, rows: list[Scored], weights: str = RAW) -> float:
    """Return the learning rate with the best score of these weights; divergence counts as worst."""
    metric = task.metrics[0]

    def key(row: Scored) -> float:
        score = row["scores"][weights][metric]
        return score if math.isfinite(score) else math.inf

    return float(min(rows, key=key)["rate"])


# -- comparison -----------------------------------------------------------------------------------


def relative_change(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> tuple[float, ...]:
    """Return the change of the mean in percent and its paired 95 % bootstrap interval."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(ours), size=(RESAMPLES, len(ours)))  # (resamples, seeds)
    resampled = ours[drawn].mean(1) / theirs[drawn].mean(1) - 1.0
    low, high = np.percentile(100.0 * resampled, [2.5, 97.5])
    return 100.0 * float(ours.mean() / theirs.mean() - 1.0), float(low), float(high)


def compare(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> dict[str, Any]:
    """Return size and significance of the difference of paired scores; lower is better."""
    change, low, high = relative_change(ours, theirs)
    same = bool(np.all(ours == theirs))
    return {
        "mean": float(ours.mean()),
        "sd": float(ours.std(ddof=1)),
        "change_percent": [change, low, high],
        "better": [int(np.sum(ours < theirs)), len(ours)],
        "p": 1.0 if same else float(wilcoxon(ours, theirs).pvalue),
    }


def values(runs: list[Scored], task: str, schedule: str, weights: str, metric: str) -> NDArray[Any]:
    """Return one score per seed."""
    return np.array(
        [
            run["scores"][weights][metric]
            for run in runs
            if (run["task"], run["schedule"]) == (task, schedule)
        ]
    )


COMPARED = (  # title, schedule of the averages, schedule of the raw weights
    ("Constant learning rate", "constant", "constant"),
    ("Cosine learning rate", "cosine", "cosine"),
    ("Averages at a constant learning rate against raw weights with cosine", "constant", "cosine"),
)
TESTS = len(COMPARED) * (len(WEIGHTS) - 1) * sum(len(task.metrics) for task in TASKS) + sum(
    len(task.metrics) for task in TASKS
)
"""Number of p values printed; raw weights have one where their schedules differ."""


def comparisons(runs: list[Scored]) -> Iterator[Row]:
    """Yield comparisons of all weights with raw ones, as in `COMPARED`; the latter have no p."""
    for title, ours, theirs in COMPARED:
        for task in TASKS:
            for metric in task.metrics:
                raw = values(runs, task.name, theirs, RAW, metric)
                sets = [(ours, weights) for weights in WEIGHTS]
                for schedule, weights in dict.fromkeys([(theirs, RAW), *sets]):
                    found = values(runs, task.name, schedule, weights, metric)
                    if (schedule, weights) == (theirs, RAW):
                        figures = {"mean": float(raw.mean()), "sd": float(raw.std(ddof=1))}
                    else:
                        figures = compare(found, raw)
                    figures |= {"task": task.name, "metric": metric, "schedule": schedule}
                    figures |= {"weights": weights, "against": theirs, "scores": found.tolist()}
                    figures["same_runs"] = ours == theirs
                    yield Row(f"{title}: {task.name}, {metric}", f"{schedule}, {weights}", figures)


def summary(compared: Sequence[Row]) -> Iterator[Row]:
    """Yield changes against the raw weights of the same runs, by metric and schedule."""
    for row in sorted(compared, key=lambda row: [task.name for task in TASKS].index(row["task"])):
        if row["same_runs"]:
            line = f"{row['task']}, {row['metric']}, {row['schedule']}"
            figures: dict[str, Any] = {"mean": row["mean"]}
            if "p" in row.figures:
                certain = row["p"] < 0.05 / TESTS
                figures = {"change_percent": row["change_percent"], "uncertain": not certain}
            title = "In short: change against the raw weights of the same runs"
            yield Row(title, line, figures, row["weights"])


def validation(tuned: list[Scored]) -> Iterator[Row]:
    """Yield validation scores of the first metric; mark the best of each set of weights."""
    for task in TASKS:
        metric = task.metrics[0]
        for schedule in SCHEDULES:
            own = [one for one in tuned if (one["task"], one["schedule"]) == (task.name, schedule)]
            for one in own:
                for weights in WEIGHTS:
                    best = choose_rate(task, own, weights) == one["rate"]
                    figures = {"mean": one["scores"][weights][metric], "best": best}
                    title = f"Validation rows: {task.name}, {metric}"
                    yield Row(title, f"{schedule}, {one['rate']:g}", figures, weights)


def measure(amount: QualitySizes) -> tuple[list[Scored], list[Scored]]:
    """Choose learning rates and train on all seeds; return the tuning scores and the runs."""
    tuned: list[Scored] = []
    runs: list[Scored] = []
    with make_reproducible():
        for task in TASKS:
            rates = {}
            for schedule in SCHEDULES:
                tried = tune(task, schedule, amount)
                rates[schedule] = choose_rate(task, tried)
                tuned += tried
            for seed in range(amount.seeds):
                data = split(task, seed, validation=False)
                for schedule, rate in rates.items():
                    scores = train(task, data, rate, schedule, amount.epochs, seed)
                    of = {"task": task.name, "schedule": schedule, "seed": seed, "rate": rate}
                    runs.append(of | {"scores": scores})
    return tuned, runs


def tables(tuned: list[Scored], runs: list[Scored]) -> Iterator[Row]:
    """Yield all rows of a result."""
    compared = list(comparisons(runs))
    yield from summary(compared)
    yield from compared
    yield from validation(tuned)


def rows(settings: Settings) -> Rows:
    """Measure and compare, and yield all rows."""
    return tables(*measure(QUICK if settings.quick else FULL))


def percent(numbers: Sequence[float]) -> str:
    """Format a change and its interval, with one more decimal place if all values are small."""
    places = 1 if max(map(abs, numbers)) >= 0.95 else 2
    change, low, high = (format_signed(number, places) for number in numbers)
    return f"{change} % ({low} to {high})"


METHOD = f"""\
Lower is better everywhere. Networks of two hidden layers (64 or 128 units) with dropout {DROPOUT},
SGD with momentum {MOMENTUM}, batches of 8 or 16, {FULL.epochs} epochs (quick mode: {QUICK.epochs},
too short to tell); the learning rate is constant, or decays to zero along a cosine. At the end of
one run: *raw*, the weights as they are; *EMA*, decay 1 - 1/(0.05 steps), from the first step on;
*SWA*, the mean over the last 25 % of the steps; *SMA*, the mean of ten sets of weights that are 1 %
of the steps apart. What the averages do was fixed beforehand and not tuned.

Tasks: {"; ".join(f"*{task.name}*, {task.what}" for task in TASKS)}.

Learning rates were chosen from {FULL.rates} values, for each task and schedule, by the first metric
of the *raw* weights on validation rows, in runs of {FULL.tuning_seeds} seeds of their own, whose
test rows were put aside. Then {FULL.seeds} other seeds: each draws new test rows, weights and
batches. Nothing was chosen by test rows.

*sd* is that of the seeds; as their test rows differ, it is larger than what matters for pairs.
*Change*: of the mean, with its 95 % bootstrap interval over the seeds. *Better*: seeds with a lower
value. *p*: two-sided Wilcoxon signed-rank test over the pairs, each by itself; as there are {TESTS}
tests, 0.05 for all of them together asks for p < {0.05 / TESTS:.4f} (Bonferroni), and *?* marks
what does not reach it. All seeds split the same rows: intervals and p speak of further runs on this
data, not of other data."""

QUESTION = Question(
    "Does averaging the weights help?",
    METHOD,
    rows,
    packages=("numpy", "numba", "torch", "scikit-learn", "scipy"),
    figures={
        "mean": Figure("mean", "{:.4g}".format),
        "sd": Figure("sd", "{:.3g}".format),
        "change_percent": Figure("change", percent),
        "uncertain": Figure("", lambda uncertain: "?" if uncertain else ""),
        "better": Figure("better", lambda of: f"{of[0]} of {of[1]}"),
        "p": Figure("p", lambda p: f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"),
        "best": Figure("(best of its column)", lambda best: "(best)" if best else ""),
    },
    draw=draw,
)
