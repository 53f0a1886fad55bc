"""Trainers for tests that run Lightning, and the warnings that these runs ignore."""

from pathlib import Path
from typing import Any

import pytest
from lightning import pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

# Deprecations among Lightning's dependencies, and Lightning's advice.
MARKS = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def quiet_trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    """Make a silent CPU trainer that saves nothing except through the given callbacks."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})
