"""``fastema plan``: the arithmetic of what an average costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def planned(fastema: Any) -> Callable[[str], dict[str, dict[str, Any]]]:
    return lambda line: {way["name"]: way for way in json.loads(fastema(f"plan {line} --json").out)}


def test_each_way_costs_what_its_bytes_say(planned: Any) -> None:
    found = planned("--params 64e9 --dtype bf16 --world 64 --hbm 2000 --link 50 --host 80")
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


@pytest.mark.parametrize("text", ["7B", "7b", "7000M", "0.007T", "7e9"])
def test_weights_are_counted_as_people_count_them(text: str, fastema: Any) -> None:
    assert fastema(f"plan --params {text}").out.startswith("7,000,000,000 weights")


def test_the_table_has_a_row_and_a_call_for_each(fastema: Any) -> None:
    out = fastema("plan --params 7e9 --step 0.5").out
    assert out.startswith("7,000,000,000 weights in bf16; per rank")
    assert out.count("bf16+16") == 3
    assert "of a step" in out
    assert 'fastema.EMA(model, shadow_dtype="bf16+16")' in out
