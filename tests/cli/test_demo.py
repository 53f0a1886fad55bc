"""The demo: what it prints and draws, and that a seed fixes every number but the times."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastema.cli import demo
from fastema.cli.demo import picture, speed, summary, train
from fastema.cli.demo.choices import Recipe
from fastema.cli.demo.train import Evaluation, History, Score, Times

NEEDS = ("matplotlib", "rich", "sklearn")

pytestmark = pytest.mark.torch

SHORT = "demo --model mlp --epochs 2 --batch-size 64"


def _rows(printed: str) -> list[list[str]]:
    """The cells of the table, without the epoch: scores of raw and average, then times."""
    return [row.split() for row in re.findall(r"^ +\d+ (.* \d+%) *$", printed, re.MULTILINE)]


def _train(**recipe: Any) -> tuple[train.Setup, History]:
    with train.reproducible():
        setup = train.prepare(Recipe(**recipe))
        return setup, train.train(setup, lambda: None, lambda _: None)


def _history(pairs: list[tuple[float, float]], loss: float = 0.1) -> History:
    """One evaluation per epoch with these raw and averaged accuracies."""
    history = History()
    for epoch, (raw, ema) in enumerate(pairs, start=1):
        history.evaluations.append(Evaluation(float(epoch), Score(loss, raw), Score(loss, ema)))
        history.times.append(Times([2e-3], [1e-3], [1e-3]))
    return history


def test_a_short_run(tmp_path: Path, fastema: Callable[..., Any]) -> None:
    out = tmp_path / "a [bold]picture.png"
    printed = fastema(SHORT, "--out", out).out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in printed  # not a terminal: no colours, no moving cursor
    assert printed.splitlines()[-1] == f"Picture: {out}"
    assert [len(row) for row in _rows(printed)] == [9, 9]
    assert "GB/s" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


@pytest.mark.slow
def test_again_in_a_new_process_it_says_the_same(
    tmp_path: Path, python: Callable[..., str]
) -> None:
    script = "import sys; from fastema.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*SHORT.split(), "--out", str(tmp_path / "a.png")]
    said = []
    # Another number of threads is another order of sums, unless the demo sees to it.
    for threads in ("1", "4"):
        printed = python(script, *arguments, OMP_NUM_THREADS=threads)
        words = re.findall(r"^  (?:raw|EMA) weights .*$", printed, re.MULTILINE)
        said.append(([row[:4] for row in _rows(printed)], words))
    assert said[0] == said[1]
    assert [len(part) for part in said[0]] == [2, 2]


WRONG = {
    "--decay 1": "expected a number in [0, 1), got 1",
    "--decay nan": "expected a number in [0, 1), got nan",
    "--epochs 1.5": "expected a whole number of at least 1, got 1.5",
    "--batch-size 899": "expected a whole number from 1 to 898, got 899",
    "--lr 0": "expected a number above 0, got 0",
    "--lr inf": "expected a number above 0, got inf",
    "--seed -1": "expected a whole number in [0, 2**32), got -1",
    "--model gpt": "invalid choice: 'gpt'",
    "--out a.txt": "expected a name that ends in .png, .svg, .pdf, got a.txt",
    "--out nowhere/a.png": "cannot write nowhere/a.png: ",
}


@pytest.mark.parametrize("line", WRONG)
def test_bad_arguments_are_refused_before_training(line: str, fastema: Callable[..., Any]) -> None:
    assert f"{line.split()[0]}: {WRONG[line]}" in fastema(f"demo {line}", code=2).err


@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_a_seed_fixes_all_numbers(model: str) -> None:
    recipe: Any = {"model": model, "epochs": 1, "batch_size": 64}
    (setup, history), (again_setup, again) = (_train(**recipe, seed=3) for _ in range(2))
    assert again.evaluations == history.evaluations
    torch.testing.assert_close(again.ema_answers, history.ema_answers, rtol=0, atol=0)
    for ours, theirs in zip(setup.model.parameters(), again_setup.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert _train(**recipe, seed=4)[1].evaluations != history.evaluations


def test_the_takeaway_says_what_happened() -> None:
    for raw, ema, said in (
        (98.0, 99.0, "Averaging the weights removes 50 % of the test errors"),
        (100.0, 100.0, "Raw and averaged weights do equally well in this run"),
        (98.0, 98.05, "Raw and averaged weights do equally well in this run"),
        (60.0, 20.0, "The average has not caught up with the raw weights: 20.0 % against 60.0 %"),
    ):
        assert summary.takeaway(summary.tail(_history([(raw, ema)]))).startswith(said)


@pytest.mark.parametrize("suffix", demo.PICTURE_SUFFIXES)
def test_pictures_of_odd_runs(suffix: str, tmp_path: Path) -> None:
    with train.reproducible():
        setup = train.prepare(Recipe(model="mlp", epochs=1, batch_size=898))
        machine = speed.measure(setup.model)
    labels = setup.digits.test_labels
    diverged, perfect = _history([(10.0, 10.0)] * 2, loss=math.nan), _history([(100.0, 100.0)])
    for history, answers in ((diverged, labels.roll(1)), (perfect, labels)):
        history.raw_answers, history.ema_answers = labels, answers
        out = tmp_path / f"picture{suffix}"
        picture.draw(setup, machine, history, out)
        assert out.stat().st_size > 5_000
        out.unlink()
