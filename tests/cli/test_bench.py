"""``fastema bench``: shapes from anywhere, every way that is installed, a line for what is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastema.cli import main
from fastema.cli.bench import race, shapes

NEEDS = ("torch",)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """``run(*options)`` of a few small shapes: exit code, output, errors."""
    file = tmp_path / "shapes.json"
    file.write_text('{"a": [3, 5], "b": [7], "c": []}')

    def called(*options: str, source: tuple[str, ...] = ("--shapes", str(file))) -> Any:
        code = main(["bench", "--seconds", "0.001", *source, *options])
        return code, *capsys.readouterr()

    return called


def test_every_way_has_a_line(run: Callable[..., Any]) -> None:
    code, out, err = run("--dtype", "float32")
    assert (code, err) == (0, "")
    assert "shapes.json: 23 weights in 3 tensors, float32, average float32, on cpu" in out
    lines = {line.split("  ")[0] for line in out.splitlines()}
    assert {"fastema.EMA", *race.WAYS} <= lines


def test_figures_for_programs_and_a_picture(run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = run("--json", "-o", str(tmp_path / "bench.png"))
    found = json.loads(out)
    assert code == 0
    assert "bench.png" in err
    assert (tmp_path / "bench.png").stat().st_size > 5_000
    assert (found["elements"], found["weights"], found["average"]) == (23, "bfloat16", "float32")
    ways = {one["name"]: one for one in found["ways"]}
    assert ways["fastema.EMA"]["ratio"] == 1.0
    assert ways["torch mul_/add_ loop"]["ms"] > 0
    assert "raises RuntimeError" in ways["torch AveragedModel"]["why"]  # mixes no dtypes


@pytest.mark.parametrize("name", [*race.WAYS, "fastema"])
def test_a_way_does_the_update_that_it_is_timed_for(name: str) -> None:
    package, setup = race.WAYS.get(name, ("torch", race._ours))
    if package != "torch":
        pytest.importorskip(package)
    if package == "timm":
        pytest.importorskip("torchvision")
    model = torch.nn.ParameterList([torch.full((3, 5), 2.0), torch.full((7,), 2.0)])
    way = setup(model, torch.float32)
    for one in model:
        one.data.fill_(5.0)
    way.update()
    for one in way.averages():
        torch.testing.assert_close(one.detach(), torch.full_like(one, 2.003), rtol=1e-6, atol=0)


def test_shapes_of_a_checkpoint_and_of_a_config(run: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(4, 2), "n": torch.ones(3, dtype=torch.int64)}},
               tmp_path / "model.pt")  # fmt: skip
    code, out, _ = run(source=("--checkpoint", str(tmp_path / "model.pt")))
    assert code == 0
    assert "model.pt: 8 weights in 1 tensor" in out
    assert sum(one.numel() for one in shapes._gpt2()) == 124_439_808
    pytest.importorskip("transformers")
    assert len(shapes._of_model("transformers:GPT2Config")) == 148


WRONG = {
    "no library": (("--model", "resnet50"), "expected one of timm:NAME"),
    "no such model": (("--model", "transformers:NopeConfig"), "transformers cannot make it"),
    "no such file": (("--shapes", "nope.json"), "nope.json: No such file"),
    "no shapes": (("--shapes", "{}"), "expected JSON with shapes"),
    "not JSON": (("--shapes", "nope"), "expected JSON with shapes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_timed_is_one_line(
    case: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    source, said = WRONG[case]
    if source[0] == "--model":
        pytest.importorskip(source[1].partition(":")[0] if ":" in source[1] else "torch")
    elif not source[1].endswith(".json"):
        (tmp_path / "wrong").write_text(source[1])
        source = ("--shapes", str(tmp_path / "wrong"))
    code, out, err = run(source=source)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
