"""Averages in files: what is written is the average, all of it, and nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from .kinds import KINDS, trained_kind, which
from .weights import assert_bits, net, snapshot

pytestmark = pytest.mark.torch


def file_of(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


# What a file holds, in bytes for each byte of a float32 model.
SIZES = {
    **{"EMA": 1.0, "three": 3.0, "SWA": 1.0, "PowerEMA": 2.0},
    **{"split": 1.0, "three split": 3.0, "random": 0.5},
    "SMA": 5.0,  # the mean, its remainder and three slots
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_average_once(kind: str) -> None:
    model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(10)))
    average = KINDS[kind](model)
    size = SIZES[kind] * sum(p.numel() * p.element_size() for p in model.parameters())
    assert size < len(file_of(average.state_dict())) < 1.05 * size
    with average.swapped(**which(average)):
        assert size < len(file_of(average.state_dict())) < 1.05 * size


def test_the_shadow_loads_into_a_module_and_goes_through_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    average = trained_kind("EMA")
    want, model, other = snapshot(dict(average.shadow)), net(9), net(9)
    model.load_state_dict(dict(average.shadow))
    assert_bits(model, want)
    other.load_state_dict(average.state_dict()["shadow"][0], assign=True)
    assert_bits(other, want)
    safetensors.save_file(dict(average.shadow), tmp_path / "average.safetensors")
    assert_bits(safetensors.load_file(tmp_path / "average.safetensors"), want)
