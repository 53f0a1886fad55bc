"""``fastema doctor``: what it finds is there, and a wrong kernel is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastema import EMA, __version__, cli, get_num_threads

NEEDS = ("torch",)


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, fastema: Any) -> Callable[..., Any]:
    """``doctor("--json")`` with a yardstick of a few bytes: output, and errors."""
    monkeypatch.setattr(cli.doctor, "_BYTES", 48_000)
    return lambda *options, **how: fastema("doctor", *options, **how)


def test_what_is_there_is_said(doctor: Callable[..., Any]) -> None:
    out, err = doctor()
    assert err == ""
    assert f"numpy {np.__version__}" in out
    assert "8 of 8 as their references" in out
    assert f"{get_num_threads()} thread" in out
    assert "GB/s, read and written" in out


def test_the_findings_for_programs(doctor: Callable[..., Any]) -> None:
    found = json.loads(doctor("--json").out)
    assert set(found["checks"].values()) == {"right"}
    assert found["packages"]["fastema"] == __version__
    assert found["GB/s"] > 0
    assert not set(found["missing"]) & set(found["packages"])


def test_a_wrong_kernel_is_noticed(
    doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(self: Any) -> None:
        for one in self.shadow.values():
            one += 1

    monkeypatch.setattr(EMA, "update", update)
    out, err = doctor(code=1)
    assert "of 8 as their references" in out
    assert "update of float32 is wrong: off by" in err
    assert "swap" not in err


def test_a_swap_that_loses_weights_is_noticed(
    doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = EMA._restore

    def spoilt(self: Any, model: Any) -> Any:
        found = restore(self, model)
        self._container.weight.data[0, 0] += 1
        return found

    monkeypatch.setattr(EMA, "_restore", spoilt)
    said = "swap and back of float32 is wrong: the weights did not come back"
    assert said in doctor(code=1).err
