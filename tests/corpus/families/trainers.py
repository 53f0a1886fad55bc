"""Callbacks of Lightning and transformers, with an optimizer that writes the hash's values."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from fastema.compat import lightning as compat
from fastema.lightning import EMACallback, LossAverages
from fastema.transformers import EMACallback as HFCallback
from fastema.transformers import LossAverages as HFLosses

from ..cases import Cases, case
from ..inputs import numbers
from ..record import attempt
from ..weights import fill

CASES: Cases = {}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()


class Writer(torch.optim.Optimizer):
    """An optimizer whose step n writes the values of step n into the weights."""

    def __init__(self, named: Any) -> None:
        self.named = dict(named)
        super().__init__(list(self.named.values()), {"lr": 0.1})
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        self.count += 1
        fill(self.named, self.count)
        return loss


def _data() -> list[Any]:
    return [torch.tensor(numbers("x", step, (3,))) for step in range(8)]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5, affine=False)
        fill(self, 0)
        self.seen: list[Any] = []

    def configure_optimizers(self) -> Any:
        return Writer(self.named_parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": (self.layer(batch) ** 2).mean()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.seen.append(self.layer.weight.detach().clone())


def _fit(folder: str, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    module = Module()
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[*callbacks], **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(_data(), batch_size=2)
    trainer.fit(module, loader, loader)
    return trainer, module


LIGHTNING: dict[str, dict[str, Any]] = {
    "default": {},
    "float64": {"shadow_dtype": "float64"},
    "bf16+16": {"shadow_dtype": "bf16+16"},
    "raw": {"evaluate_with_average": False},
    "at the end raw": {"at_end": "raw"},
    "every 3": {"update_every": 3, "start_after": 1},
    "two": {"decay": (0.5, 0.9), "which": 1},
    "refused": {"at_end": "nothing"},
}


@case(CASES, options=LIGHTNING)
def lightning_runs(options: dict[str, Any]) -> Any:
    callback = attempt(lambda: EMACallback(**({"decay": 0.9} | options)))
    if isinstance(callback, Exception):
        return {"refused": callback}
    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(folder, save_weights_only=False)
        outcome = attempt(lambda: _fit(folder, callback, saver))
        if isinstance(outcome, Exception):
            return {"refused": outcome}
        trainer, module = outcome
        path = next(iter(sorted(Path(folder).rglob("*.ckpt"))))
        stored = torch.load(path, weights_only=False)
        own = {k: v for k, v in stored["callbacks"].items() if "EMACallback" in k}
        return {
            "file": path.name,
            "seen": module.seen,
            "weights": module.layer.state_dict(),
            "checkpoint": {k: v for k, v in stored["state_dict"].items() if "layer" in k},
            "callback": {key: _weights_of(value) for key, value in own.items()},
            "steps": trainer.global_step,
            "keys": sorted(key for key in stored if "ema" in key.lower() or "averag" in key),
        }


def _weights_of(state: Any) -> Any:
    """Leave out statistics of batches, which torch's own kernels compute."""
    if isinstance(state, dict):
        return {k: _weights_of(v) for k, v in state.items() if "running" not in str(k)}
    return [_weights_of(one) for one in state] if isinstance(state, list | tuple) else state


class Peers:
    plain = staticmethod(lambda: compat.WeightAveraging())
    ema = staticmethod(lambda: compat.EMAWeightAveraging(decay=0.9))
    weights = staticmethod(lambda: compat.EMAWeightAveraging(decay=0.9, use_buffers=False))
    every = staticmethod(lambda: compat.EMAWeightAveraging(decay=0.9, update_every_n_steps=3))
    late = staticmethod(lambda: compat.EMAWeightAveraging(decay=0.9, update_starting_at_step=4))
    epoch = staticmethod(lambda: compat.EMAWeightAveraging(decay=0.9, update_starting_at_epoch=1))


@case(CASES, peer=("plain", "ema", "weights", "every", "late", "epoch"))
def lightning_drop_ins(peer: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        callback = getattr(Peers, peer)()
        saver = ModelCheckpoint(folder)
        _, module = _fit(folder, callback, saver)
        stored = torch.load(next(iter(sorted(Path(folder).rglob("*.ckpt")))), weights_only=False)
        return {
            "seen": module.seen,
            "weights": module.layer.state_dict(),
            "checkpoint": {k: v for k, v in stored["state_dict"].items() if "layer" in k},
            "current": _weights_of(stored.get("current_model_state", {})),
            "averaging": _weights_of(stored.get("averaging_state", {})),
            "keys": sorted(stored),
            "state": _weights_of(callback.state_dict()),
        }


class Loss(Callback):
    """Count the hooks that other callbacks get."""


@case(CASES, rtol=1e-4, options={"default": {}, "window": {"window_size": 3, "decay": None}})
def lightning_losses(options: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        callback = LossAverages(record=True, prog_bar=False, **options)
        trainer, _ = _fit(folder, callback)
        metrics = {name: float(one) for name, one in trainer.callback_metrics.items()}
        return {"metrics": metrics, "steps": callback.steps, "history": callback.history}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        fill(self, 0)
        self.seen: list[Any] = []

    def forward(self, x: Any, labels: Any = None) -> Any:
        if not self.training:
            self.seen.append(self.layer.weight.detach().clone())
        out = self.layer(x)
        return {"loss": (out**2).mean(), "logits": out}


def _trainer(folder: str, **options: Any) -> Any:
    model = Network()
    arguments = transformers.TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=2, per_device_eval_batch_size=8,
        eval_strategy="steps", eval_steps=4, save_steps=4, logging_steps=2, report_to="none",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, max_grad_norm=0.0,
    )  # fmt: skip
    data = [{"x": one, "labels": torch.zeros(1)} for one in _data()]
    optimizer = Writer(model.named_parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, optimizers=(optimizer, schedule)
    )


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "default": {},
    "float64": {"shadow_dtype": "float64"},
    "raw": {"evaluate_with_average": False},
    "at the end raw": {"at_end": "raw"},
    "every 3": {"update_every": 3},
    "two": {"decay": (0.5, 0.9), "which": 0},
}


@case(CASES, options=TRANSFORMERS)
def transformers_runs(options: dict[str, Any]) -> Any:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder)
        callback = HFCallback(**({"decay": 0.9} | options)).attach(trainer)
        outcome = attempt(lambda: trainer.train().global_step)
        if isinstance(outcome, Exception):
            return {"refused": outcome}
        with callback.swapped():
            inside = trainer.model.layer.weight.detach().clone()
        files = sorted(Path(folder).rglob("*.safetensors"))
        return {
            "seen": trainer.model.seen,
            "inside": inside,
            "weights": trainer.model.layer.state_dict(),
            "average": dict(callback.ema.shadows[0]),
            "updates": callback.ema.num_updates,
            "files": {str(one.relative_to(folder)): _load(load_file, one) for one in files},
        }


def _load(load: Any, path: Path) -> Any:
    return attempt(lambda: load(str(path)))


@case(CASES, rtol=1e-2, options={"default": {}, "window": {"window_size": 3, "decay": None}})
def transformers_losses(options: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder)
        HFLosses(**options).attach(trainer)
        trainer.train()
        logs = [one for one in trainer.state.log_history if "loss" in one]
        return [{k: v for k, v in one.items() if "loss" in k or k == "step"} for one in logs]
