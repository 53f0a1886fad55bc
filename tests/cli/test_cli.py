"""The commands: version, doctor, plan, bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastema import EMA, __version__, cli, get_num_threads
from fastema.cli.bench import race, shapes

from ..support.process import run_python

NEEDS = ("torch",)

# The names are refused as an import hook, or an installation without the extra, would do it.
WITHOUT = """
import sys
from fastema.cli import main

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
sys.exit(main(["demo"]))
"""


def test_version_and_what_is_no_command(fastema: Any) -> None:
    done = run_python("-m", "fastema", "--version")
    assert (done.returncode, done.stdout) == (0, f"fastema {__version__}\n")
    assert "demo" in fastema("", code=2).err
    assert "polish" in fastema("polish", code=2).err


@pytest.mark.parametrize(
    ("missing", "named"),
    [("sklearn", "scikit-learn is"), ("matplotlib rich", "matplotlib and rich are")],
)
def test_missing_packages_are_named_with_the_way_to_get_them(missing: str, named: str) -> None:
    done = run_python("-c", WITHOUT, *missing.split())
    assert (done.returncode, done.stdout) == (2, "")
    way = 'get what this command needs with: pip install "fastema[demo]"'
    assert done.stderr == f"fastema demo: {named} not installed; {way}\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch, fastema: Any) -> None:
    def run(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS["plan"], "run", run)
    assert fastema("plan --params 7B", code=130).err == "fastema plan: interrupted\n"


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, fastema: Any) -> Callable[..., Any]:
    """``doctor("--json")`` with a yardstick of a few bytes: output, and errors."""
    monkeypatch.setattr(cli.doctor, "_BYTES", 48_000)
    return lambda *options, **how: fastema("doctor", *options, **how)


def test_what_is_there_is_said(doctor: Callable[..., Any]) -> None:
    out, err = doctor()
    assert err == ""
    for said in (
        f"numpy {np.__version__}",
        "8 of 8 as their references",
        f"{get_num_threads()} thread",
        "GB/s, read and written",
    ):
        assert said in out
    found = json.loads(doctor("--json").out)
    assert set(found["checks"].values()) == {"right"}
    assert found["packages"]["fastema"] == __version__
    assert found["GB/s"] > 0
    assert not set(found["missing"]) & set(found["packages"])


def test_wrong_kernels_and_swaps_are_noticed(
    doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = EMA._restore

    def update(self: Any) -> None:
        for one in self.shadow.values():
            one += 1

    def spoilt(self: Any, model: Any) -> Any:
        found = restore(self, model)
        self._container.weight.data[0, 0] += 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(EMA, "update", update)
        out, err = doctor(code=1)
    assert "of 8 as their references" in out
    assert "update of float32 is wrong: off by" in err
    assert "swap" not in err
    monkeypatch.setattr(EMA, "_restore", spoilt)
    said = "swap and back of float32 is wrong: the weights did not come back"
    assert said in doctor(code=1).err


def test_each_way_costs_what_its_bytes_say(fastema: Any) -> None:
    line = "plan --params 64e9 --dtype bf16 --world 64 --hbm 2000 --link 50 --host 80 --json"
    found = {way["name"]: way for way in json.loads(fastema(line).out)}
    whole = found["on each GPU, float32"]
    assert (whole["gpu_bytes"], whole["moved"], whole["seconds"]) == (256e9, 640e9, 0.32)
    part = found["sharded, float32"]
    assert (part["gpu_bytes"], part["moved"], part["seconds"]) == (4e9, 10e9, 0.005)
    assert found["sharded, bf16+16"]["gpu_bytes"] == 4e9
    rough = found["sharded, bf16, rounded at random"]
    assert (rough["gpu_bytes"], rough["moved"]) == (2e9, 6e9)
    assert found["sharded, every 10 steps"]["seconds"] == pytest.approx(0.0005)
    host = found["on the host, float32"]
    assert (host["gpu_bytes"], host["host_bytes"], host["link_bytes"]) == (0.0, 6e9, 2e9)
    assert host["seconds"] == max(2 / 50, 12 / (80 / 8))


def test_weights_are_counted_as_people_count_them(fastema: Any) -> None:
    for line in ("7b", "7000M", "0.007T", "7e9", "7B --world 1 --every 10", "7B --step 0.5"):
        out = fastema(f"plan --params {line}").out
        assert out.startswith("7,000,000,000 weights in bf16")
    assert out.count("bf16+16") == 3
    assert "of a step" in out
    assert 'fastema.EMA(model, shadow_dtype="bf16+16")' in out


@pytest.fixture
def bench(fastema: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``bench(options)`` where a file has a few small shapes: output, errors."""
    monkeypatch.chdir(tmp_path)
    Path("shapes.json").write_text('{"a": [3, 5], "b": [7], "c": []}')
    return lambda line, **how: fastema(f"bench --seconds 0.001 {line}", **how)


def test_every_way_has_a_line_a_figure_and_a_place_in_the_picture(bench: Any) -> None:
    out, err = bench("--shapes shapes.json --dtype float32")
    assert err == ""
    assert "shapes.json: 23 weights in 3 tensors, float32, average float32, on cpu" in out
    lines = {line.split("  ")[0] for line in out.splitlines()}
    assert {"fastema.EMA", *race.WAYS} <= lines
    out, err = bench("--shapes shapes.json --json -o bench.png")
    found = json.loads(out)
    assert "bench.png" in err
    assert Path("bench.png").stat().st_size > 5_000
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


def test_shapes_of_a_checkpoint_and_of_a_config(bench: Any) -> None:
    tensors = {"w": torch.ones(4, 2), "n": torch.ones(3, dtype=torch.int64)}
    torch.save({"model": tensors}, "model.pt")
    assert "model.pt: 8 weights in 1 tensor" in bench("--checkpoint model.pt").out
    assert sum(one.numel() for one in shapes._gpt2()) == 124_439_808
    pytest.importorskip("transformers")
    assert len(shapes._of_model("transformers:GPT2Config")) == 148


WRONG = {
    "--model resnet50": "expected one of timm:NAME",
    "--model transformers:NopeConfig": "transformers cannot make it",
    "--shapes nope.json": "nope.json: No such file",
    "--shapes empty.json": "expected JSON with shapes",
    "--shapes text.json": "expected JSON with shapes",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_be_timed_is_one_line(line: str, bench: Any) -> None:
    if ":" in line:
        pytest.importorskip("transformers")
    Path("empty.json").write_text("{}")
    Path("text.json").write_text("nope")
    out, err = bench(line, code=2)
    assert out == ""
    assert WRONG[line] in err
    assert len(err.splitlines()) == 1
