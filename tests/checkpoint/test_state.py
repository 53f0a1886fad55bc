"""States of averages in files: they come back whole, and damage is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastema
from fastema import rules
from fastema.checkpoint import files
from fastema.checkpoint.state import read_state, write_state
from fastema.errors import CheckpointError

from ..support.damage import damaged_header, header_of, with_header

NEEDS = ("safetensors",)


def average(seed: int, **options: Any) -> fastema.EMA:
    generator = np.random.default_rng(seed)
    weights = {"w": generator.normal(size=5), "b": generator.normal(size=3).astype(np.float32)}
    return fastema.EMA(weights, (rules.warmup(0.99), 0.5), **options)


@pytest.mark.parametrize("place", [-1, -30, -60])
def test_a_changed_byte_of_a_tensor_is_damage(place: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_state(path, average(1).state_dict())
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: "):
        read_state(files.read(path), np.zeros(1))


@pytest.mark.parametrize("seed", range(150))
def test_a_damaged_state_is_our_error_whatever_is_wrong(seed: int, tmp_path: Path) -> None:
    ema = average(1, zero_debias=True)
    ema.update(steps=3)
    path = tmp_path / "a.safetensors"
    write_state(path, ema.state_dict())
    whole = path.read_bytes()
    header = header_of(whole)
    if seed % 2:  # damage within the plain values
        text = header["__metadata__"]["state"]
        inner = damaged_header(json.loads(text), seed)
        header["__metadata__"]["state"] = inner.decode(errors="surrogateescape")
        damaged = json.dumps(header).encode()
    else:
        damaged = damaged_header(header, seed)
    path.write_bytes(with_header(whole, damaged))
    other = average(2, zero_debias=True)
    before = [dict(one) for one in other.state_dict()["shadow"]]
    try:
        other.load_state_dict(read_state(files.read(path), np.zeros(1)))
    except CheckpointError:
        assert other.num_updates == 0
        for one, was in zip(other.shadows, before, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], was[name])
    else:
        other.update()
