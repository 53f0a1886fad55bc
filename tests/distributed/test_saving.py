"""Checkpoints of sharded averages: torch.distributed.checkpoint and state dicts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import cases, saving
from .layouts import LAYOUTS

NEEDS = ("torch",)


Run = Callable[..., list[Any]]

SAVED = ["fsdp 4", "fsdp 2", "tp 4", "fsdp on tp", "hsdp", "one"]
LOADED = ["fsdp 4", "fsdp 3", "fsdp 2", "fsdp 1", "one", "tp 4", "fsdp on tp", "hsdp"]


@pytest.mark.each_value
@pytest.mark.parametrize("loaded", LOADED)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("kind", cases.MAKE)
def test_checkpoint_loads_in_any_other_layout(
    run: Run, tmp_path: Path, kind: str, saved: str, loaded: str
) -> None:
    run(saving.save, saved, kind, str(tmp_path / "c"), "plain")
    run(saving.load, loaded, kind, str(tmp_path / "c"))


@pytest.mark.parametrize(
    "how", ["thread", "staged", pytest.param("process", marks=pytest.mark.full)]
)
def test_updates_continue_during_an_asynchronous_save(run: Run, tmp_path: Path, how: str) -> None:
    run(saving.save, "fsdp 4", "bf16", str(tmp_path / "c"), how)
    run(saving.load, "fsdp 3", "bf16", str(tmp_path / "c"))


@pytest.mark.each_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", cases.MAKE)
def test_states_load_between_one_process_and_shards(run: Run, kind: str, layout: str) -> None:
    run(saving.check_state_exchange, layout, kind)


def test_checkpoint_without_an_average_is_an_error(run: Run, tmp_path: Path) -> None:
    run(saving.check_missing_average, str(tmp_path / "c"))
