"""The benchmark of quality: scores, paired comparisons and stored results."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.questions import quality
from bench.race.report import RESULTS, Row, load

NEEDS = ("matplotlib", "sklearn")

pytestmark = pytest.mark.torch

REGRESSION, _, CLASSIFIER = quality.TASKS
SHORT = quality.QualitySizes(epochs=1, seeds=2, tuning_seeds=1, rates=2)


def record_results(function: Any, kept: list[Any]) -> Any:
    return lambda *given: kept.append(function(*given)) or kept[-1]


@pytest.mark.parametrize("task", [REGRESSION, CLASSIFIER], ids=lambda task: task.name)
def test_run_scores_each_set_of_weights_like_numpy(
    task: quality.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = quality.split(task, 0, validation=False)
    made: dict[str, list[Any]] = {"build_network": [], "averages": []}
    for name, kept in made.items():
        monkeypatch.setattr(quality, name, record_results(getattr(quality, name), kept))
    with quality.make_reproducible():
        first, again = (quality.train(task, data, 0.01, "constant", 1, 7) for _ in range(2))
    assert first == again
    assert tuple(first) == quality.WEIGHTS
    assert len({tuple(scores.values()) for scores in first.values()}) == len(quality.WEIGHTS)
    model = made["build_network"][0].eval()
    for weights, scores in first.items():
        average = made["averages"][0].get(weights)
        state = dict(average.shadow) if average else model.state_dict()
        with torch.no_grad():
            outputs = torch.func.functional_call(model, state, data.x_held).double().numpy()
        assert scores == pytest.approx(rescore(task, outputs, data), rel=1e-5), weights


def rescore(task: quality.Task, outputs: np.ndarray, data: quality.Split) -> dict[str, float]:
    y = data.y_held.numpy()
    if not task.classes:
        return {"RMSE": np.sqrt(np.mean((data.scale * (outputs - y)) ** 2))}
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    right = shares[np.arange(len(y)), y]
    return {"log loss": -np.log(right).mean(), "error %": 100.0 * (shares.argmax(1) != y).mean()}


def test_interval_is_paired_and_covers_the_truth() -> None:
    """Proportional pairs give width zero; otherwise about 95% of intervals cover the truth."""
    generator = np.random.default_rng(1)
    theirs = generator.uniform(1.0, 100.0, 20)
    assert quality.relative_change(0.98 * theirs, theirs) == pytest.approx((-2.0, -2.0, -2.0))
    held = 0
    for _ in range(100):
        theirs = generator.normal(10.0, 1.0, 20)
        _, low, high = quality.relative_change(theirs * generator.normal(0.97, 0.02, 20), theirs)
        held += low <= -3.0 <= high
        assert 0.5 < high - low < 4.0  # 4 * 2 % / sqrt(20) = 1.8 %
    assert 80 <= held <= 99


def test_stored_comparisons_follow_from_the_stored_scores() -> None:
    stored = load(RESULTS / "quality.json")[1]
    compared = [row for row in stored if "p" in row.figures]
    assert len(compared) == quality.TESTS
    raw = [row for row in stored if "sd" in row.figures and "p" not in row.figures]
    scores = {row.table: np.array(row["scores"]) for row in raw}
    assert len(scores) == len(raw)
    for row in compared:
        again = quality.compare(np.array(row["scores"]), scores[row.table])
        for name, value in again.items():
            assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


@pytest.mark.slow
def test_short_run_covers_all_tasks_and_draws_the_picture(tmp_path: Path) -> None:
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
        assert run["rate"] == quality.choose_rate(task, tried)
    rows: list[Row] = list(quality.tables(tuned, runs))
    quality.draw(rows, {"command": "", "date_utc": ""}, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)
