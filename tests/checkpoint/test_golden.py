"""Files of version 1 of the format are read for ever: docs/reference/formats.md.

``python -m tests.checkpoint.test_golden`` writes those that are missing. A file that is there is
never written again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

import fastema
from fastema.checkpoint import inspect, load_into, save

NEEDS = ("safetensors", "torch")

GOLDEN = Path(__file__).with_name("golden")

KINDS: dict[str, Callable[..., Any]] = {
    "ema": lambda model: fastema.EMA(model, 0.75, seed=7),
    "two split": lambda model: fastema.EMA(model, (0.5, 0.75), shadow_dtype="bf16+16"),
    "debiased": lambda model: fastema.EMA(model, 0.5, zero_debias=True),
    "bf16": lambda model: fastema.EMA(model, 0.5, shadow_dtype="bfloat16", update_every=2),
    "sma": lambda model: fastema.SMA(model, window=2),
    "swa": lambda model: fastema.SWA(model, start_after=1),
    "power": lambda model: fastema.PowerEMA(model, sigma_rels=0.2),
}

WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "safetensors": save,
    "pt": lambda ema, path: torch.save(ema.state_dict(), path),
    "dcp": lambda ema, path: torch.distributed.checkpoint.save(
        {"ema": ema.state_dict()}, checkpoint_id=path, no_dist=True
    ),
}

FILES = [f"{kind}.{ending}" for kind in KINDS for ending in ("safetensors", "pt")] + ["ema.dcp"]


def build(start: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.ModuleDict({"é": nn.BatchNorm1d(2)}))
    fill(model, start)
    return model


def fill(model: nn.Module, step: int) -> None:
    """Give every weight a value of few bits, so that its averages are exact."""
    with torch.no_grad():
        for at, one in enumerate(model.state_dict().values()):
            values = torch.arange(one.numel()).reshape(one.shape) % 7 + 2 * at + 16 * step
            one.copy_(values)


def train(kind: str) -> tuple[nn.Module, Any]:
    model = build(0)
    ema = KINDS[kind](model)
    for step in (1, 2, 3, 4):
        fill(model, step)
        ema.update()
    return model, ema


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert found[name].dtype == one.dtype
        assert torch.equal(found[name], one), name


@pytest.mark.parametrize("file", FILES)
def test_golden_file_continues_the_run(file: str) -> None:
    kind = file.partition(".")[0]
    model, ema = train(kind)
    other = KINDS[kind](build(9))
    load_into(other, GOLDEN / file)
    assert other.schedule == ema.schedule
    for step in (5, 6):
        assert_equal(other.state_dict(), ema.state_dict())
        fill(model, step)
        for one in (ema, other):
            one.update(model)
    found = inspect(GOLDEN / file, check=True)
    assert (found.average.library, found.average.num_updates) == ("fastema", 4)


def test_safetensors_and_torch_read_and_write_states_as_they_are(tmp_path: Path) -> None:
    for kind in KINDS:
        _, ema = train(kind)
        state = ema.state_dict()
        save_file(state, tmp_path / "x.safetensors")
        torch.save(state, tmp_path / "x.pt")
        for found in (
            load_file(tmp_path / "x.safetensors"),
            load_file(GOLDEN / f"{kind}.safetensors"),
            torch.load(tmp_path / "x.pt", weights_only=True),
        ):
            assert_equal(found, state)
            other = KINDS[kind](build(9))
            other.load_state_dict(found)
            assert_equal(other.state_dict(), state)
        load_into(KINDS[kind](build(9)), tmp_path / "x.safetensors")


def test_size_of_a_header_does_not_depend_on_counters() -> None:
    ema = KINDS["ema"](build(0))
    before = ema.state_dict()["fastema"].shape
    for _ in range(1000):
        ema.update()
    assert ema.state_dict()["fastema"].shape == before


if __name__ == "__main__":
    for file in FILES:
        name, _, ending = file.partition(".")
        if not (GOLDEN / file).exists():
            WRITERS[ending](train(name)[1], GOLDEN / file)
