"""A small training run, and exact averages of it, for Lightning's averaging callbacks."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks import weight_averaging as peer
from torch.utils.data import DataLoader, TensorDataset

from fastema.compat import lightning as ours

from ..support.lightning_runs import MARKS as RUNS
from ..support.lightning_runs import quiet_trainer
from ..support.torch_states import State, snapshot
from ..support.torch_states import assert_near as all_near
from ..support.torch_states import differ as any_differs

MARKS = [
    *RUNS,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # From Lightning's callback when a test loads a checkpoint.
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
]
LIBRARIES = pytest.mark.parametrize("library", [peer, ours], ids=["theirs", "ours"])
STEPS, EPOCHS = 5, 4  # steps per epoch


class Network(pl.LightningModule):
    """Record the weights after each optimizer step, in each validation and in each test."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = torch.nn.Linear(3, 3, bias=False)
        self.norm = torch.nn.BatchNorm1d(3)
        self.second = torch.nn.Linear(3, 3)
        if tied:
            self.second.weight = self.first.weight
        self.steps: list[State] = []
        self.validated: list[State] = []
        self.tested: list[State] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)

    def loss_of(self, batch: Any) -> torch.Tensor:
        x, y = (part.to(self.first.weight.dtype) for part in batch)
        return (self.second(torch.tanh(self.norm(self.first(x)))) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss_of(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step > len(self.steps):
            self.steps.append(snapshot(self))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(snapshot(self))
        self.log("val_loss", self.loss_of(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.tested.append(snapshot(self))


class Alternating(Network):
    """Use two optimizers, whose steps share one count."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first = [*self.first.parameters(), *self.norm.parameters()]
        return [torch.optim.SGD(part, lr=0.1) for part in (first, self.second.parameters())]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss_of(batch))
            optimizer.step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(snapshot(self))


def save_epochs(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **options)


def loader(batches: int = STEPS) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * batches, 3, generator=generator)
    y = x.flip(1) + torch.randn(4 * batches, 3, generator=generator)
    return DataLoader(TensorDataset(x, y), 4)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    settings = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options}
    return quiet_trainer(folder, *callbacks, **settings)


def fit(run: pl.Trainer, module: Network | None = None, **options: Any) -> Network:
    module = module or Network()
    run.fit(module, loader(), loader(1), **options)
    return module


def fit_network(
    folder: Path, *callbacks: Callback, module: Network | None = None, **options: Any
) -> Network:
    return fit(trainer(folder, *callbacks, **options), module)


def resume_network(
    path: Path, *callbacks: Callback, module: Network | None = None, **options: Any
) -> Network:
    """Resume a module from a checkpoint; its entries for earlier steps are empty."""
    module = module or Network()
    module.steps = [{}] * load(path)["global_step"]
    run = trainer(path.parent / "resumed", *callbacks, **options)
    return fit(run, module, ckpt_path=str(path))


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def floats(state: State) -> State:
    """Return a state without its integers, which Lightning's callback truncates."""
    return {name: value for name, value in state.items() if value.is_floating_point()}


def assert_near(found: State, want: State) -> None:
    all_near(floats(found), floats(want))


def differ(one: State, other: State) -> bool:
    return any_differs(floats(one), floats(other))


def average_of(steps: list[State], decays: list[float | None], buffers: bool = True) -> State:
    """Average steps in float64, skipping those whose decay is None; the first one is copied."""
    result: State = {}
    for step, decay in zip(steps, decays, strict=True):
        if decay is None:
            continue
        for name, value in step.items():
            exact = value.double() if value.is_floating_point() else value
            averaged = name in result and value.is_floating_point()
            if averaged and (buffers or "running" not in name):
                result[name] = decay * result[name] + (1 - decay) * exact
            else:
                result[name] = exact
    return result
