"""The demo: its output and picture, and reproducible numbers except for the times."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastema.cli.demo import train
from fastema.cli.demo.choices import Recipe
from fastema.cli.demo.train import History

NEEDS = ("matplotlib", "rich", "sklearn")

pytestmark = pytest.mark.torch

SHORT = "demo --model mlp --epochs 2 --batch-size 64"


def parse_rows(printed: str) -> list[list[str]]:
    """Split the table into rows: scores of raw and average weights, then times."""
    return [row.split() for row in re.findall(r"^ +\d+ (.* \d+%) *$", printed, re.MULTILINE)]


def _train(**recipe: Any) -> tuple[train.Setup, History]:
    with train.reproducible():
        setup = train.prepare(Recipe(**recipe))
        return setup, train.train(setup, lambda: None, lambda _: None)


def test_short_demo_prints_and_draws(tmp_path: Path, fastema: Callable[..., Any]) -> None:
    out = tmp_path / "a [bold]picture.png"
    printed = fastema(SHORT, "--out", out).out
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in printed  # no terminal: no colors, no cursor movement
    assert printed.splitlines()[-1] == f"Picture: {out}"
    assert [len(row) for row in parse_rows(printed)] == [9, 9]
    assert "GB/s" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80


@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_equal_seeds_give_equal_numbers(model: str) -> None:
    recipe: Any = {"model": model, "epochs": 1, "batch_size": 64}
    (setup, history), (again_setup, again) = (_train(**recipe, seed=3) for _ in range(2))
    assert again.evaluations == history.evaluations
    torch.testing.assert_close(again.ema_answers, history.ema_answers, rtol=0, atol=0)
    for ours, theirs in zip(setup.model.parameters(), again_setup.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert _train(**recipe, seed=4)[1].evaluations != history.evaluations
