"""Averages in files: what is written is the average, all of it, and nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import fastema  # noqa: E402

from .weights import assert_bits, net, refresh_, snapshot  # noqa: E402

pytestmark = pytest.mark.torch


def file_of(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def trained(shadow_dtype: str = "float32") -> fastema.EMA:
    model = net()
    ema = fastema.EMA(model, 0.5, shadow_dtype=shadow_dtype)
    refresh_(model, 1)
    ema.update()
    refresh_(model, 2)
    return ema


def test_a_file_holds_one_average() -> None:
    model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(10)))
    ema = fastema.EMA(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size < len(file_of(ema.state_dict())) < 1.05 * size
    with ema.swapped():
        assert size < len(file_of(ema.state_dict())) < 1.05 * size


def test_the_same_run_writes_the_same_file() -> None:
    """No memory that nobody wrote gets into it, such as gaps between tensors."""
    first = file_of(trained().state_dict())
    for n in range(10):
        left = [torch.full((64 * n + 7,), float(n)) for _ in range(20)]
        del left
        assert file_of(trained().state_dict()) == first


def test_the_shadow_loads_into_a_module() -> None:
    ema, model = trained(), net(9)
    model.load_state_dict(dict(ema.shadow))
    assert_bits(model, snapshot(dict(ema.shadow)))
    other = net(9)
    other.load_state_dict(ema.state_dict()["shadow"][0], assign=True)
    assert_bits(other, snapshot(dict(ema.shadow)))


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    ema = trained()
    safetensors.save_file(dict(ema.shadow), tmp_path / "average.safetensors")
    found = safetensors.load_file(tmp_path / "average.safetensors")
    assert_bits(found, snapshot(dict(ema.shadow)))


@pytest.mark.parametrize("shadow_dtype", ["float32", "bfloat16"])
def test_a_state_taken_before_a_block_and_written_within_it(shadow_dtype: str) -> None:
    """A thread that writes checkpoints may come to it while the average is evaluated."""
    ema = trained(shadow_dtype)
    average = snapshot(dict(ema.shadow))
    state = ema.state_dict()
    with ema.swapped():
        written = torch.load(io.BytesIO(file_of(state)), weights_only=True)
    assert_bits(written["shadow"], average)
