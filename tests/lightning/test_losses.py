"""Real Lightning runs: smoothed losses in loggers, histories and checkpoints."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from fastema.errors import ArgumentError
from fastema.lightning import LossAverages

from ..support.lightning_runs import MARKS, quiet_trainer
from ..support.smoothing import assert_close, ema, sma

NEEDS = ("tensorboard",)


pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended and your dataloader is"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

WINDOW, DECAY = 5, 0.8


class Regression(pl.LightningModule):
    """Record the loss and the size of each batch in ``training_step``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.seen: list[tuple[float, int]] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def loss_of(self, batch: Any) -> torch.Tensor:
        x, y = batch
        loss = (self.layer(x) - y).square().mean()
        self.seen.append((loss.item(), len(x)))
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss_of(batch)

    @property
    def losses(self) -> list[float]:
        return [loss for loss, _ in self.seen]

    @property
    def curves(self) -> dict[str, np.ndarray]:
        """The expected averages of the losses, weighted by batch size."""
        sizes = [float(size) for _, size in self.seen]
        return {
            "train_loss_raw": np.array(self.losses),
            "train_loss_sma": sma(self.losses, WINDOW, sizes),
            "train_loss_ema": ema(self.losses, DECAY, sizes),
        }


def loader(samples: int = 43, batch: int = 8) -> DataLoader[Any]:
    """Return a loader of six batches, the last one short."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(samples, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    return quiet_trainer(folder, *callbacks, **{"max_epochs": 3, **options})


def build_module(kind: type[Regression] = Regression, *given: Any) -> Regression:
    torch.manual_seed(1)
    return kind(*given)


def record_run(
    folder: Path, *callbacks: Callback, module: Regression | None = None, **options: Any
) -> tuple[Regression, LossAverages]:
    """Train with averages that record their history."""
    module, averages = module or build_module(), LossAverages(WINDOW, DECAY, record=True)
    trainer(folder, averages, *callbacks, **options).fit(module, loader())
    return module, averages


def csv_column(folder: Path, name: str) -> dict[int, float]:
    """Return a column of a CSVLogger by step."""
    with open(next(folder.rglob("metrics.csv")), newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_loggers_and_history_match_the_definition(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    module, averages = record_run(tmp_path, logger=loggers)
    assert len(module.losses) == 18
    assert len({size for _, size in module.seen}) == 2  # a short last batch
    found = EventAccumulator(str(next((tmp_path / "tb").rglob("events.*")).parent)).Reload()
    for name, curve in module.curves.items():
        assert_close(averages.history[name], curve)
        logged = csv_column(tmp_path / "csv", name)
        assert list(logged) == list(range(18))
        assert_close(list(logged.values()), curve)  # in full double precision
        points = found.Scalars(name)
        assert [point.step for point in points] == list(range(18))
        np.testing.assert_array_equal([p.value for p in points], curve.astype(np.float32))
        assert averages.averages[name] == averages.history[name][-1]
    assert list(averages.steps["train_loss"]) == list(range(18))


class Logging(Regression):
    """Log the loss and other metrics: per step, per epoch, both, or at some steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss_of(batch)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("error", 4.0 * loss, on_step=True, on_epoch=False)
        self.log("by_epoch", loss, on_step=False, on_epoch=True)
        if batch_idx % 2:
            self.log("odd", -loss, on_step=True, on_epoch=False)
        return {"loss": loss, "prediction": batch[1]}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", batch[1].square().mean(), on_step=True, on_epoch=True)


def test_only_metrics_logged_per_step_are_smoothed(tmp_path: Path) -> None:
    module, averages = build_module(Logging), LossAverages(WINDOW, DECAY, record=True)
    run = trainer(
        tmp_path, averages, logger=CSVLogger(tmp_path), num_sanity_val_steps=1, val_check_interval=2
    )
    run.fit(module, loader(), loader())
    losses, sizes = np.array(module.losses, np.float32), [float(size) for _, size in module.seen]
    at_odd = [k for k in range(18) if k % 6 % 2]
    want = {
        "train_loss": (losses.astype(float), sizes),
        "error": ((4.0 * losses).astype(float), sizes),
        "odd": (-losses[at_odd].astype(float), [sizes[k] for k in at_odd]),
    }
    assert set(averages.steps) == set(want)
    for name, (values, weights) in want.items():
        np.testing.assert_array_equal(averages.history[f"{name}_raw"], values)
        assert_close(averages.history[f"{name}_sma"], sma(values, WINDOW, weights))
        assert_close(averages.history[f"{name}_ema"], ema(values, DECAY, weights))
    assert list(averages.steps["odd"]) == at_odd
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    # The module's own metrics are not logged again, and each name occurs once.
    assert not [name for name in header if name.endswith("_raw")]
    assert sorted(n for n in header if n.endswith("_ema")) == [f"{n}_ema" for n in sorted(want)]


def test_metrics_are_chosen_by_name_and_unknown_names_warn(tmp_path: Path) -> None:
    averages = LossAverages(metrics=("error", "by_epoch", "nothing"), loss="objective", record=True)
    with pytest.warns(UserWarning, match=r"logged 'by_epoch', 'nothing'; call .*on_step=True"):
        trainer(tmp_path, averages).fit(build_module(Logging), loader())
    assert set(averages.steps) == {"objective", "error"}
    averages = LossAverages(metrics=(), record=True)
    trainer(tmp_path, averages).fit(module := build_module(Logging), loader())
    assert set(averages.steps) == {"train_loss"}
    np.testing.assert_array_equal(averages.history["train_loss_raw"], module.losses)
    averages = LossAverages(loss=None, metrics=("odd",), raw=False, decay=None, record=True)
    trainer(tmp_path, averages).fit(build_module(Logging), loader())
    assert set(averages.averages) == {"odd_sma"}


@pytest.mark.parametrize("stop_after", [6, 8])
def test_resumed_run_continues_the_curve(tmp_path: Path, stop_after: int) -> None:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "saved", every_n_train_steps=stop_after, save_top_k=-1)

    run = trainer(tmp_path, LossAverages(WINDOW, DECAY), saving(), max_steps=stop_after)
    run.fit(module := build_module(), loader())
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    torch.load(path, weights_only=True)  # loads without trusting the file

    averages = LossAverages(WINDOW, DECAY, record=True)
    run = trainer(tmp_path, averages, saving())
    run.fit(resumed := build_module(), loader(), ckpt_path=path)
    rest = len(resumed.losses)
    assert rest >= 10
    # A plain loader restarts within an epoch, so append the losses that were really seen.
    module.seen += resumed.seen
    for name in ("train_loss_sma", "train_loss_ema"):
        assert_close(averages.history[name][-rest:], module.curves[name][-rest:])

    if stop_after == 6:  # between epochs, bit-identical to an uninterrupted run
        _, whole = record_run(tmp_path)
        for name, curve in whole.history.items():
            np.testing.assert_array_equal(averages.history[name][-rest:], curve[-rest:])

    other = LossAverages(WINDOW + 1, DECAY, record=True)
    with pytest.warns(UserWarning, match="LossAverages starts again"):
        trainer(tmp_path, other, saving()).fit(resumed := build_module(), loader(), ckpt_path=path)
    assert_close(other.history["train_loss_ema"], resumed.curves["train_loss_ema"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": "acc"}, r"metrics='acc': expected names, such as \('acc',\)"),
        ({"metrics": (), "loss": None}, "nothing to smooth"),
        ({"window_size": 0}, "window_size"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LossAverages(**options)


def test_bar_gets_every_batch_and_loggers_some_also_in_a_continued_run(tmp_path: Path) -> None:
    logged: dict[str, list[int]] = {}
    shown: dict[str, bool] = {}

    class Watching(Regression):
        def log(self, name: str, *args: Any, **options: Any) -> None:
            logged.setdefault(name, []).append(len(self.seen) - 1)
            shown[name] = options["prog_bar"]
            super().log(name, *args, **options)

    module, averages = build_module(Watching), LossAverages(WINDOW, DECAY, record=True)
    run = trainer(tmp_path, averages, accumulate_grad_batches=4, log_every_n_steps=50)
    for run.fit_loop.max_epochs in (1, 2):
        run.fit(module, loader())
    assert logged["train_loss_raw"] == [5, 11]  # the last of each epoch
    assert logged["train_loss_ema"] == list(range(12))
    assert shown == {"train_loss_raw": False, "train_loss_sma": True, "train_loss_ema": True}
    # A power of two divides exactly.
    np.testing.assert_array_equal(averages.history["train_loss_raw"], module.losses)


def test_weight_of_a_batch_is_the_length_of_its_first_tensor() -> None:
    length = LossAverages().batch_size
    assert length({"name": "x", "ids": torch.ones(4, 9), "label": torch.ones(2)}) == 4
    assert length(("text", [None, (torch.ones(5), torch.ones(6))])) == 5
    assert length({"no": "tensor"}) == length(torch.tensor(2.0)) == 1
