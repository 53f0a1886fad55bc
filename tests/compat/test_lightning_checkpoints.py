"""What Lightning saves and loads with an averaging callback, and which weights it tests."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import weight_averaging as peer

from fastema.compat import lightning as ours

from ..support.torch_states import assert_same, snapshot
from .lightning_case import (
    EPOCHS,
    LIBRARIES,
    MARKS,
    STEPS,
    Network,
    assert_near,
    differ,
    fit,
    fit_network,
    load,
    loader,
    resume_network,
    save_epochs,
    trainer,
)

pytestmark = MARKS


def validate(run: Any, module: Any = None, **options: Any) -> None:
    run.validate(module, loader(1), verbose=False, **options)


@pytest.mark.parametrize("first", [peer, ours], ids=["theirs", "ours"])
@pytest.mark.parametrize("second", [peer, ours], ids=["theirs", "ours"])
@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.8},
        {"decay": 0.8, "update_every_n_steps": 3},
        {"decay": 0.6, "use_buffers": False, "update_starting_at_epoch": 1},
    ],
    ids=["each step", "each third", "and epochs"],
)
def test_interrupted_run_resumes_in_either_library(
    tmp_path: Path, first: Any, second: Any, options: dict[str, Any]
) -> None:
    def callback(library: Any) -> Any:
        return library.EMAWeightAveraging(**options)

    whole = fit_network(tmp_path / "whole", callback(second))
    begun = fit_network(tmp_path, callback(first), save_epochs(tmp_path), max_epochs=2)
    saved = load(tmp_path / "epoch=1.ckpt")
    assert differ(saved["state_dict"], saved["current_model_state"])
    assert_same(saved["current_model_state"], begun.steps[-1])
    assert list(saved["averaging_state"]) == ["n_averaged"]
    assert "EMAWeightAveraging" in saved["callbacks"]

    module = resume_network(tmp_path / "epoch=1.ckpt", callback(second), num_sanity_val_steps=1)
    assert len(module.steps) == STEPS * EPOCHS
    assert_near(module.state_dict(), whole.state_dict())
    assert_near(module.steps[-1], whole.steps[-1])
    at_once, *later = module.validated
    assert_same(at_once, saved["state_dict"])
    for one, other in zip(later, whole.validated[2:], strict=True):
        assert_near(one, other)
    if first is second is ours:
        assert_same(snapshot(module), snapshot(whole))


@LIBRARIES
def test_testing_a_checkpoint_evaluates_the_average(tmp_path: Path, library: Any) -> None:
    run = trainer(tmp_path, library.EMAWeightAveraging(decay=0.8), save_epochs(tmp_path))
    module, path = fit(run), str(tmp_path / "epoch=1.ckpt")
    raw, average = module.steps[2 * STEPS - 1], module.validated[1]
    run.test(module, loader(1), ckpt_path=path, verbose=False)
    assert_same(module.tested[0], average if library is ours else raw)
    validate(run, module, ckpt_path=path)
    assert_same(module.validated[EPOCHS], average)
    other = trainer(tmp_path, library.EMAWeightAveraging(decay=0.8))
    for _ in range(2):
        fresh = Network()
        other.test(fresh, loader(1), ckpt_path=path, verbose=False)
        assert_same(fresh.tested[0], average)
