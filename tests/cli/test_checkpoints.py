"""``fastema inspect`` and ``fastema convert`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastema import EMA
from fastema.checkpoint import save

NEEDS = ("safetensors", "torch")


@pytest.fixture
def run(tmp_path: Path, fastema: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run("inspect ema.safetensors")`` beside an average and its model: output, errors."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, decay=0.99)
    for _ in range(1000):
        ema.update()
    save(ema, tmp_path / "ema.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return fastema


def test_an_average_is_described(run: Any) -> None:
    out, err = run("inspect ema.safetensors --check --tensors")
    assert err == ""
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line[0] != " ")
    assert lines["updates"] == "1,000"
    assert lines["schedule"] == "decay 0.99"
    assert lines["lag"].startswith("99 +/- 99.46 ")
    assert lines["lag"].endswith("behind the model")
    assert lines["tensors"] == "2 tensors (2 f32), 8 elements"
    assert lines["whole"] == "yes, by its checksums"
    assert "  'weight': f32[2, 3]" in out.splitlines()
    found = json.loads(run("inspect ema.safetensors --json").out)
    assert (found["library"], found["num_updates"]) == ("fastema", 1000)
    shapes = {"bias": [2], "weight": [2, 3]}
    assert found["tensors"] == {n: {"dtype": "f32", "shape": s} for n, s in shapes.items()}


def test_an_average_is_converted_and_what_is_lost_is_said(run: Any, tmp_path: Path) -> None:
    out, err = run("convert ema.safetensors swa.pt --to swa_utils")
    assert err == ""
    assert out.splitlines() == [
        "swa.pt: swa_utils, 2 tensors of ema.safetensors (fastema)",
        "not carried: the schedule, decay 0.99",
    ]
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(3, 2))
    average.load_state_dict(torch.load(tmp_path / "swa.pt", weights_only=True))
    assert average.n_averaged == 1000
    out, _ = run("convert ema.safetensors ema.pt --to torch_ema --names model.pt")
    assert len(out.splitlines()) == 1


WRONG = {
    "inspect nowhere.pt": "fastema inspect: cannot read",
    "inspect model.pt --key a.b": "fastema inspect: model.pt has nothing at 'a.b'",
    "inspect ema.safetensors --index 3": "fastema inspect: index=3",
    "convert ema.safetensors out.pt --to keras": "fastema convert: to='keras'",
    "convert ema.safetensors nowhere/out.pt --to d2go": "fastema convert: cannot write",
    "convert ema.safetensors out.pt --to torch_ema": "fastema convert: torch_ema keeps a list",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_be_is_one_line(line: str, run: Any, tmp_path: Path) -> None:
    before = {one.name for one in tmp_path.iterdir()}
    out, err = run(line, code=2)
    assert out == ""
    assert err.startswith(WRONG[line])
    assert err.count("\n") == 1
    assert {one.name for one in tmp_path.iterdir()} == before
