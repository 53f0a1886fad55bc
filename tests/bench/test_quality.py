"""The quality question compares fairly: in pairs, and test rows choose nothing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.questions import quality
from bench.race.report import RESULTS, Row, load

NEEDS = ("matplotlib", "sklearn")


pytestmark = pytest.mark.torch

REGRESSION, _, CLASSIFIER = quality.TASKS
SHORT = quality.Amount(epochs=1, seeds=2, tuning_seeds=1, rates=2)


def task_of(rows: quality.Data, task: quality.Task = REGRESSION) -> quality.Task:
    return replace(task, load=lambda: rows)


# -- data -----------------------------------------------------------------------------------------


def numbered(count: int = 60) -> quality.Task:
    """Classes are left as they are, so a class of its own tells each row."""
    x = np.random.default_rng(3).normal(size=(count, 4)) * 7.0 + 2.0
    return task_of(quality.Data(x, np.arange(count), None), replace(CLASSIFIER, test_share=1 / 3))


@pytest.mark.parametrize("seed", [0, 1, 1_000])
def test_splits_share_no_row(seed: int) -> None:
    task = numbered()
    final, tuning = (quality.split(task, seed, validation=v) for v in (False, True))
    test = set(final.y_held.tolist())
    assert len(test) == 20
    assert set(final.y.tolist()) == set(range(60)) - test
    fitted, validated = set(tuning.y.tolist()), set(tuning.y_held.tolist())
    assert len(validated) == 10
    assert not fitted & validated
    assert fitted | validated == set(final.y.tolist())
    other = quality.split(task, seed + 1, validation=False)
    assert set(other.y_held.tolist()) != test


@pytest.mark.parametrize("task", quality.TASKS, ids=lambda task: task.name)
def test_only_training_rows_give_the_scale(task: quality.Task) -> None:
    rows = task.load()
    data = quality.split(task, 5, validation=False)
    scale = rows.x.max()
    everything = np.arange(len(rows.x))
    by_row = task_of(
        quality.Data(rows.x, everything, rows.strata), replace(task, metrics=("log loss",))
    )
    held = quality.split(by_row, 5, validation=False).y_held.numpy()
    kept = np.setdiff1d(everything, held)
    x, y = rows.x.copy(), rows.y.copy()
    x[held] += 3.0 * scale
    moved = quality.split(task_of(quality.Data(x, y, rows.strata), task), 5, validation=False)
    assert torch.equal(moved.x, data.x)
    assert torch.equal(moved.y, data.y)
    assert moved.x_held.mean() > data.x_held.mean() + 1.0
    assert math.isclose(data.x.mean(), 0.0, abs_tol=1e-5)
    assert math.isclose(data.x.std(), 1.0, rel_tol=1e-3)
    if not task.classes:
        assert math.isclose(data.scale, rows.y[kept].std(), rel_tol=1e-12)
        back = data.y_held.double() * data.scale + rows.y[kept].mean()
        assert sorted(back.flatten().tolist()) == pytest.approx(
            sorted(rows.y[held].flatten()), abs=1e-3
        )


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [200, 1_480])
def test_averages_are_what_the_text_says(steps: int) -> None:
    path = np.random.default_rng(steps).normal(size=(steps + 1, 3)) + 4.0  # the start, then steps
    model = torch.nn.Linear(3, 1, bias=False)

    def hold(row: np.ndarray) -> None:
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(row))

    hold(path[0])
    kept = quality.averages(model, steps)
    assert tuple(kept) == quality.AVERAGES
    ema = path[0].copy()
    for row in path[1:]:
        hold(row)
        ema += (row - ema) / (0.05 * steps)
        for average in kept.values():
            average.update()
    every = steps // 100
    expected = {
        "EMA": ema,
        "SWA": path[steps - steps // 4 + 1 :].mean(0),
        "SMA": path[every::every][-10:].mean(0),
    }
    for name, average in kept.items():
        got = average.shadow["weight"].double().numpy()[0]
        np.testing.assert_allclose(got, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("schedule", quality.SCHEDULES)
def test_learning_rates_of_a_run(
    schedule: quality.Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def recorded(self: torch.optim.SGD, closure: None = None) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    data = quality.split(REGRESSION, 0, validation=False)
    with quality.reproducible():
        quality.train(REGRESSION, data, 0.002, schedule, 2, 0)
    steps = 2 * (len(data.x) // REGRESSION.batch_size)
    turns = np.arange(steps) / steps if schedule == "cosine" else np.zeros(steps)
    np.testing.assert_allclose(rates, 0.001 * (1.0 + np.cos(np.pi * turns)), rtol=1e-9)


@pytest.mark.parametrize("task", [REGRESSION, CLASSIFIER], ids=lambda task: task.name)
def test_a_run_scores_each_set_of_weights(
    task: quality.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = quality.split(task, 0, validation=False)
    models: list[torch.nn.Module] = []
    kept: list[dict[str, object]] = []
    network, averages = quality.network, quality.averages
    monkeypatch.setattr(
        quality, "network", lambda *given: models.append(network(*given)) or models[-1]
    )
    monkeypatch.setattr(
        quality, "averages", lambda *given: kept.append(averages(*given)) or kept[-1]
    )
    with quality.reproducible():
        first, again = (quality.train(task, data, 0.01, "constant", 1, 7) for _ in range(2))
    assert first == again
    assert tuple(first) == quality.WEIGHTS
    assert len({tuple(scores.values()) for scores in first.values()}) == len(quality.WEIGHTS)
    model = models[0].eval()
    for weights, scores in first.items():
        state = model.state_dict() if weights == quality.RAW else dict(kept[0][weights].shadow)
        with torch.no_grad():
            outputs = torch.func.functional_call(model, state, data.x_held).double().numpy()
        assert scores == pytest.approx(by_numpy(task, outputs, data), rel=1e-5), weights


def by_numpy(task: quality.Task, outputs: np.ndarray, data: quality.Split) -> dict[str, float]:
    y = data.y_held.numpy()
    if not task.classes:
        return {"RMSE": np.sqrt(np.mean((data.scale * (outputs - y)) ** 2))}
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    right = shares[np.arange(len(y)), y]
    return {"log loss": -np.log(right).mean(), "error %": 100.0 * (shares.argmax(1) != y).mean()}


# -- choice of the learning rate ------------------------------------------------------------------


def test_test_rows_choose_nothing() -> None:
    """With NaN for every test row of the one tuning seed, tuning finds the same."""
    rows = CLASSIFIER.load()
    everything = quality.Data(rows.x, np.arange(len(rows.x)), rows.strata)
    final = quality.split(
        task_of(everything, CLASSIFIER), quality.FIRST_TUNING_SEED, validation=False
    )
    poisoned = rows.x.copy()
    poisoned[final.y_held.numpy()] = np.nan
    blind = task_of(quality.Data(poisoned, rows.y, rows.strata), CLASSIFIER)
    with quality.reproducible():
        found = quality.tune(CLASSIFIER, "constant", SHORT)
        assert quality.tune(blind, "constant", SHORT) == found
    assert [row["rate"] for row in found] == [0.003, 0.01]
    assert all(
        math.isfinite(row["scores"][w]["log loss"]) for row in found for w in quality.WEIGHTS
    )


def test_the_raw_weights_choose() -> None:
    def row(rate: float, raw: float, ema: float) -> quality.Scored:
        return {"rate": rate, "scores": {"raw": {"RMSE": raw}, "EMA": {"RMSE": ema}}}

    rows = [
        row(0.1, math.nan, 0.5),
        row(0.2, 3.0, 1.0),
        row(0.3, 2.0, 4.0),
        row(0.4, 2.5, math.inf),
    ]
    assert quality.chosen(REGRESSION, rows) == 0.3
    assert quality.chosen(REGRESSION, rows, "EMA") == 0.1
    assert quality.chosen(REGRESSION, rows[::-1]) == 0.3


# -- comparison -----------------------------------------------------------------------------------


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided, over all signs that the differences could have had."""
    ranks = np.argsort(np.argsort(abs(differences))) + 1
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    seen = ranks[differences > 0].sum()
    tails = (np.mean([s <= seen for s in sums]), np.mean([s >= seen for s in sums]))
    return min(1.0, 2 * float(min(tails)))


@pytest.mark.parametrize("seed", range(5))
def test_comparison_of_pairs(seed: int) -> None:
    generator = np.random.default_rng(seed)
    theirs = generator.normal(10.0, 1.0, 10)
    ours = theirs * generator.normal(0.98, 0.02, 10)
    found = quality.compare(ours, theirs)
    change = 100 * (ours.sum() - theirs.sum()) / theirs.sum()
    assert found["change_percent"][0] == pytest.approx(change)
    assert found["better"] == [sum(a < b for a, b in zip(ours, theirs, strict=True)), 10]
    assert found["mean"] == pytest.approx(ours.mean())
    assert found["sd"] == pytest.approx(np.sqrt(np.sum((ours - ours.mean()) ** 2) / 9))
    assert found["p"] == pytest.approx(signed_rank_p(ours - theirs))


def test_the_interval_is_paired_and_covers() -> None:
    """Pairs in proportion leave no doubt; else about 95 of 100 intervals hold the truth."""
    generator = np.random.default_rng(1)
    theirs = generator.uniform(1.0, 100.0, 20)
    change, low, high = quality.relative_change(0.98 * theirs, theirs)
    assert (change, low, high) == pytest.approx((-2.0, -2.0, -2.0))
    held = 0
    for _ in range(100):
        theirs = generator.normal(10.0, 1.0, 20)
        _, low, high = quality.relative_change(theirs * generator.normal(0.97, 0.02, 20), theirs)
        held += low <= -3.0 <= high
        assert 0.5 < high - low < 4.0  # 4 * 2 % / sqrt(20) = 1.8 %
    assert 80 <= held <= 99


def test_no_difference_at_all() -> None:
    same = np.array([2.0, 3.0, 2.5])
    found = quality.compare(same, same.copy())
    assert (found["p"], found["better"]) == (1.0, [0, 3])
    assert found["change_percent"] == [0.0, 0.0, 0.0]


def made(score: dict[tuple[str, str], float], seeds: int = 6) -> list[quality.Scored]:
    """Runs whose scores are known: a base per seed, times a factor per schedule and weights."""
    return [
        {
            "task": task.name,
            "schedule": schedule,
            "seed": seed,
            "rate": 0.1,
            "scores": {
                weights: {
                    metric: (10.0 + seed) * score.get((schedule, weights), 1.0)
                    for metric in task.metrics
                }
                for weights in quality.WEIGHTS
            },
        }
        for task in quality.TASKS
        for seed in range(seeds)
        for schedule in quality.SCHEDULES
    ]


def test_each_is_compared_with_the_right_raw_weights() -> None:
    factors = {
        ("constant", "raw"): 1.0,
        ("constant", "EMA"): 0.9,
        ("constant", "SWA"): 0.8,
        ("constant", "SMA"): 1.1,
        ("cosine", "raw"): 0.5,
        ("cosine", "EMA"): 0.6,
        ("cosine", "SWA"): 0.55,
        ("cosine", "SMA"): 0.45,
    }
    rows = list(quality.comparisons(made(factors)))
    metrics = sum(len(task.metrics) for task in quality.TASKS)
    assert len(rows) == (4 + 4 + 5) * metrics
    assert sum("p" in row.figures for row in rows) == quality.TESTS == (3 + 3 + 4) * metrics
    for row in rows:
        against = factors[row["against"], "raw"]
        factor = factors[row["schedule"], row["weights"]] / against
        if "p" in row.figures:
            assert row["change_percent"] == pytest.approx([100 * (factor - 1)] * 3)
        else:
            assert row["weights"] == "raw"
            assert row["mean"] == pytest.approx(12.5 * against)


# -- tables ---------------------------------------------------------------------------------------


def test_stored_comparisons_are_those_of_the_stored_scores() -> None:
    compared = [row for row in load(RESULTS / "quality.json")[1] if "p" in row.figures]
    assert len(compared) == quality.TESTS
    stored = load(RESULTS / "quality.json")[1]
    for row in compared:
        (raw,) = (
            other
            for other in stored
            if other.table == row.table and "sd" in other.figures and "p" not in other.figures
        )
        again = quality.compare(np.array(row["scores"]), np.array(raw["scores"]))
        for name, value in again.items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


@pytest.mark.slow
def test_a_short_run_gives_everything(tmp_path: Path) -> None:
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    tuned, runs = quality.measure(SHORT)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    seen = {(run["task"], run["schedule"], run["seed"]) for run in runs}
    names = [task.name for task in quality.TASKS]
    assert seen == set(itertools.product(names, quality.SCHEDULES, range(SHORT.seeds)))
    for run in runs:
        tried = [
            one for one in tuned if (one["task"], one["schedule"]) == (run["task"], run["schedule"])
        ]
        (task,) = (task for task in quality.TASKS if task.name == run["task"])
        assert run["rate"] == quality.chosen(task, tried)
    rows: list[Row] = list(quality.tables(tuned, runs))
    quality.draw(rows, {"command": "", "date_utc": ""}, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
