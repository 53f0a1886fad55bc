"""The questions of quality and accuracy: fair pairs, exact references."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from bench.questions import accuracy, quality
from bench.race.report import RESULTS, Row, load

NEEDS = ("matplotlib", "sklearn")

pytestmark = pytest.mark.torch

REGRESSION, _, CLASSIFIER = quality.TASKS
SHORT = quality.Amount(epochs=1, seeds=2, tuning_seeds=1, rates=2)


@pytest.mark.parametrize("steps", [200, 1_480])
def test_averages_are_what_the_text_says(steps: int) -> None:
    path = np.random.default_rng(steps).normal(size=(steps + 1, 3)) + 4.0  # the start, then steps
    model = torch.nn.Linear(3, 1, bias=False)
    weight = model.weight.detach()
    weight.copy_(torch.from_numpy(path[0]))
    kept = quality.averages(model, steps)
    assert tuple(kept) == quality.AVERAGES
    ema = path[0].copy()
    for row in path[1:]:
        weight.copy_(torch.from_numpy(row))
        ema += (row - ema) / (0.05 * steps)
        for average in kept.values():
            average.update()
    swa, sma = path[steps - steps // 4 + 1 :], path[steps // 100 :: steps // 100][-10:]
    for name, expected in {"EMA": ema, "SWA": swa.mean(0), "SMA": sma.mean(0)}.items():
        got = kept[name].shadow["weight"].double().numpy()[0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)


def noted(function: Any, kept: list[Any]) -> Any:
    return lambda *given: kept.append(function(*given)) or kept[-1]


@pytest.mark.parametrize("task", [REGRESSION, CLASSIFIER], ids=lambda task: task.name)
def test_a_run_scores_each_set_of_weights(
    task: quality.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = quality.split(task, 0, validation=False)
    made: dict[str, list[Any]] = {"network": [], "averages": []}
    for name, kept in made.items():
        monkeypatch.setattr(quality, name, noted(getattr(quality, name), kept))
    with quality.reproducible():
        first, again = (quality.train(task, data, 0.01, "constant", 1, 7) for _ in range(2))
    assert first == again
    assert tuple(first) == quality.WEIGHTS
    assert len({tuple(scores.values()) for scores in first.values()}) == len(quality.WEIGHTS)
    model = made["network"][0].eval()
    for weights, scores in first.items():
        average = made["averages"][0].get(weights)
        state = dict(average.shadow) if average else model.state_dict()
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


def test_the_interval_is_paired_and_covers() -> None:
    """Pairs in proportion leave no doubt; else about 95 of 100 intervals hold the truth."""
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


def test_stored_comparisons_are_those_of_the_stored_scores() -> None:
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


# -- accuracy --------------------------------------------------------------------------------------

TINY = accuracy.Amount(elements=2_000, short=20, run_elements=256, marks=(40, 200))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize(
    ("average", "weights"), [("bf16", "bf16"), ("bf16", "f32"), ("f16", "f32"), ("f16", "f64")]
)
def test_one_update_in_units_of_the_last_place(
    average: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearest, at_random = (
        accuracy.one_update(average, weights, rounding, 5_000, generator())
        for rounding in ("nearest", "stochastic")
    )
    # What is rounded is off by up to a unit in the last place of a float32 itself.
    assert 0.45 < nearest <= 0.5 + 2.0**-12
    assert 0.9 < at_random <= 1 + 2.0**-12
    # An update that does nothing is seen.
    monkeypatch.setattr(fastema, "lerp_", lambda avg, x, weight: None)
    assert accuracy.one_update("f32", "f32", "nearest", 1_000, generator()) > 1_000


def test_exact_average_is_the_sum_in_closed_form() -> None:
    decay, path = 0.9, np.random.default_rng(5).normal(size=(31, 17)) + 3.0
    exact = accuracy.Exact(torch.from_numpy(path[0]), decay)
    for row in path[1:]:
        exact.update(torch.from_numpy(row))
    powers = decay ** np.arange(29, -1, -1)
    closed = decay**30 * path[0] + (1 - decay) * powers @ path[1:]
    np.testing.assert_allclose(exact.average, closed, rtol=1e-14)
    assert np.array_equal(exact.start, path[0])


@pytest.mark.slow
def test_long_run_sees_what_precision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "DECAYS", (0.999, 0.9999))
    with accuracy.one_thread():
        rows = list(accuracy.long_runs(TINY))

    def figures(name: str, figure: str) -> list[float]:
        found = [row[figure] for row in rows if row.entry == name and figure in row.figures]
        assert len(found) == len(accuracy.MODELS) * 2 * len(TINY.marks)
        return found

    assert max(figures("f32: fastema", "of_movement")) < 0.005
    # Two halves of a float32 are that float32.
    assert figures("bf16+16: fastema", "relative") == figures("f32: fastema", "relative")
    for dtype, stalled in (("bf16", 0.8), ("f16", 0.3)):
        nearest, at_random = (f"{dtype}, {how}: fastema" for how in ("nearest", "stochastic"))
        still, moving = figures(nearest, "still"), figures(at_random, "still")
        assert min(still) > stalled
        assert max(figures(nearest, "followed")) < 0.5
        assert all(one > other + 0.1 for one, other in zip(still, moving, strict=True))
