"""Real Hugging Face Trainer runs: smoothed losses in its logs."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from fastema.errors import ArgumentError
from fastema.transformers import LossAverages

from ..support.smoothing import assert_close, ema, sma
from . import averaged
from .network import Network
from .runs import MARKS

NEEDS = ("accelerate", "tensorboard")


pytestmark = MARKS

WINDOW, DECAY = 3, 0.7


trainer = partial(averaged.trainer, num_train_epochs=3, logging_steps=4)


def column(run: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


class LogRecorder(TrainerCallback):
    """Record the logs passed to callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.logs.append({**(logs or {}), "step": state.global_step})


def test_logs_and_history_match_the_definition(tmp_path: Path, capsys: Any) -> None:
    model, seeing = Network(), LogRecorder()
    run = trainer(tmp_path, LossAverages(WINDOW, DECAY), seeing, model=model)
    run.train()
    losses = column(run, "loss")
    at = [4, 8, 12, 16]
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == at
    # The Trainer logs the mean loss since the last log, in float32.
    means = [np.mean(model.losses[end - 4 : end]) for end in at]
    np.testing.assert_allclose(losses, means, rtol=1e-6)
    for name, curve in (("loss_sma", sma(losses, WINDOW)), ("loss_ema", ema(losses, DECAY))):
        assert_close(column(run, name), curve)
        assert [logs[name] for logs in seeing.logs if name in logs] == column(run, name)
    assert not column(run, "loss_raw")
    printed = capsys.readouterr().out
    assert f"'loss_ema': '{column(run, 'loss_ema')[-1]:.4g}'" in printed
    # The summary at the end of the run holds no averages.
    assert not {"loss_sma", "loss_ema"} & run.state.log_history[-1].keys()


@pytest.mark.parametrize("restored", [False, True])
def test_resumed_run_draws_a_bit_identical_curve(tmp_path: Path, restored: bool) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8, "logging_steps": 2}
    whole = trainer(tmp_path / "whole", LossAverages(WINDOW, DECAY), **options)
    whole.train()
    saved = tmp_path / "whole" / "checkpoint-8"
    json.loads((saved / "trainer_state.json").read_text())

    averages, seeing = LossAverages(WINDOW, DECAY), LogRecorder()
    rest = trainer(
        tmp_path / "rest", seeing, restore_callback_states_from_checkpoint=restored, **options
    )
    averages.attach(rest).attach(rest)
    rest.train(resume_from_checkpoint=str(saved))
    assert column(rest, "loss") == column(whole, "loss")
    for name in ("loss_sma", "loss_ema"):
        assert column(rest, name) == column(whole, name)
        assert [logs[name] for logs in seeing.logs if name in logs] == column(whole, name)[4:]
        assert averages.averages[name] == column(whole, name)[-1]

    # A resumed run may use another window than the first run.
    wider = trainer(tmp_path / "wider", LossAverages(WINDOW + 2, DECAY), **options)
    wider.train(resume_from_checkpoint=str(saved))
    assert_close(column(wider, "loss_sma")[4:], sma(column(whole, "loss"), WINDOW + 2)[4:])


def test_evaluations_are_smoothed_and_loggers_that_come_first_are_named(tmp_path: Path) -> None:
    averages = LossAverages(WINDOW, DECAY, metrics=["loss", "eval_loss"])
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 6, "logging_steps": 5}
    run = trainer(tmp_path, averages, report_to="tensorboard", **options)
    with pytest.warns(UserWarning, match=r"\['tensorboard'\] are called before.*attach"):
        run.train()
    assert len(column(run, "eval_loss")) == 3
    for name in ("loss", "eval_loss"):
        assert_close(column(run, f"{name}_ema"), ema(column(run, name), DECAY))


def test_invalid_arguments_are_refused() -> None:
    for options, sequences in (
        ({"metrics": "loss"}, r"metrics='loss': expected names, such as \('loss',\)"),
        ({"metrics": ()}, r"metrics=\(\)"),
        ({"decay": 1.5}, "decay"),
    ):
        with pytest.raises(ArgumentError, match=sequences):
            LossAverages(**options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"attach\(Linear\): expected a transformers.Trainer"):
        LossAverages().attach(torch.nn.Linear(1, 1))
