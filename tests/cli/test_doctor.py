"""``fastema doctor``: what it finds is there, and a wrong kernel is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.cli import doctor, main
from fastema.engine import limit

NEEDS = ("torch",)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``run("--json")`` with a yardstick of a few bytes: exit code, output, and errors."""
    monkeypatch.setattr(doctor, "_BYTES", 48_000)

    def called(*options: str) -> tuple[int, str, str]:
        code = main(["doctor", *options])
        return code, *capsys.readouterr()

    return called


def test_what_is_there_is_said(run: Callable[..., Any]) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert f"numpy {np.__version__}" in out
    assert "8 of 8 as their references" in out
    assert f"{fastema.get_num_threads()} thread" in out
    assert "GB/s, read and written" in out


def test_the_findings_for_programs(run: Callable[..., Any]) -> None:
    code, out, _ = run("--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["checks"].values()) == {"right"}
    assert found["packages"]["fastema"] == fastema.__version__
    assert found["GB/s"] > 0
    assert not set(found["missing"]) & set(found["packages"])


def test_a_wrong_kernel_is_noticed(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(self: Any) -> None:
        for one in self.shadow.values():
            one += 1

    monkeypatch.setattr(fastema.EMA, "update", update)
    code, out, err = run()
    assert code == 1
    assert "of 8 as their references" in out
    assert "update of float32 is wrong: off by" in err
    assert "swap" not in err


def test_a_swap_that_loses_weights_is_noticed(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = fastema.EMA._restore

    def spoilt(self: Any, model: Any) -> Any:
        found = restore(self, model)
        self._container.weight.data[0, 0] += 1
        return found

    monkeypatch.setattr(fastema.EMA, "_restore", spoilt)
    code, _, err = run()
    assert code == 1
    assert "swap and back of float32 is wrong: the weights did not come back" in err


def test_packages_that_are_missing_have_a_command(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "jax" else "1")
    monkeypatch.setattr(limit, "StreamCopy", limit.ReadReadWrite)
    _, out, _ = run()
    assert 'missing    jax, for JAX pytrees: pip install "fastema[jax]"' in out
