"""Run a peer's test files with its classes replaced. ``python -m tests.gate`` starts it.

A process that a test spawns runs this file up to its end as well, so that it has our classes too.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fastema.compat
from bench.race import without_torchvision
from fastema.compat import installation

ASKED: dict[str, Any] = json.loads(os.environ["FASTEMA_GATE"])


class Recorder:
    """A pytest plugin that marks tests as the table says, and records what became of each."""

    def __init__(self) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for pattern in (*ASKED["left_out"], *ASKED["differs"]):
            if not any(re.search(pattern, item.nodeid) for item in items):
                self.problems.append(f"no test is named {pattern}, as tests/gate/suites.py says")
        for item in items:
            if why := _find(ASKED["left_out"], item.nodeid):
                item.add_marker(pytest.mark.skip(reason=why))
            elif difference := _find(ASKED["differs"], item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=difference[0], strict=True))
        modules = {item.module for item in items}  # type: ignore[attr-defined]
        self.problems += sorted(name_theirs(modules))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        result = self.results[item.nodeid] = {"outcome": "passed", "ours": False, "why": ""}

        def look(frame: FrameType, *_: object) -> None:
            if str(frame.f_globals.get("__name__")).startswith("fastema."):
                result["ours"] = True
                sys.setprofile(None)

        sys.setprofile(look)
        try:
            return (yield)
        finally:
            sys.setprofile(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed:
            return
        result, text = self.results[report.nodeid], str(report.longrepr)
        if report.failed:
            result.update(outcome="failed", why=text)
        elif not hasattr(report, "wasxfail"):
            why = report.longrepr[2].removeprefix("Skipped: ")  # type: ignore[index,union-attr]
            result.update(outcome="left out", why=why)
        elif (known := _find(ASKED["differs"], report.nodeid)) and known[1] not in text:
            result.update(outcome="failed", why=f"expected {known[1]!r} in\n{text}")
        else:
            result.update(outcome="differs", why=report.wasxfail)


def _find(table: dict[str, Any], test: str) -> Any:
    return next((entry for pattern, entry in table.items() if re.search(pattern, test)), None)


def name_theirs(modules: set[Any]) -> Iterator[str]:
    """Name what is still the peer's own where it is defined and in modules of tests."""
    for place in installation._installed[ASKED["peer"]]:
        if getattr(place.module, place.name) is not place.ours:
            yield f"{place.module.__name__}.{place.name} is not fastema's"
        for module in modules:
            for name, value in vars(module).items():
                if value is place.theirs:
                    yield f"{module.__name__}.{name} is not fastema's"


def build_instead_of_download() -> None:
    """Build the model that diffusers' tests download: only its structure matters to them."""
    from diffusers import UNet2DConditionModel

    load = UNet2DConditionModel.from_pretrained.__func__

    def from_pretrained(cls: type, path: Any, **options: Any) -> Any:
        if path != "hf-internal-testing/tiny-stable-diffusion-pipe":
            return load(cls, path, **options)
        return cls(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
        ).eval()

    UNet2DConditionModel.from_pretrained = classmethod(from_pretrained)


if ASKED["peer"] == "timm":
    without_torchvision.stand_in()
fastema.compat.install(ASKED["peer"])
if ASKED["peer"] == "diffusers":
    build_instead_of_download()

if __name__ == "__main__":
    recorder = Recorder()
    status = pytest.main(sys.argv[1:], plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        recorder.problems.append(f"pytest returned {status!r}")
    found = {"tests": recorder.results, "problems": recorder.problems}
    Path(ASKED["report"]).write_text(json.dumps(found), encoding="utf-8")
