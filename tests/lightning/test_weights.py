"""``fastema.lightning.EMACallback``: what it averages, evaluates, saves and leaves behind."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer

import fastema
from fastema import rules
from fastema.errors import ArgumentError, StateError
from fastema.lightning import EMACallback
from fastema.lightning.packages import replace_method

from ..support.lightning_runs import MARKS, quiet_trainer
from ..support.replacements import read_lines

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

DECAY = 0.75
NAME = "fastema.lightning.EMACallback"


class Regression(pl.LightningModule):
    """Record the weights after each step and those that validation uses."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(3, 2)
        self.trained: list[torch.Tensor] = [self.layer.weight.detach().clone()]
        self.validated: list[torch.Tensor] = []
        self.fails_at = fails_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(self.layer.weight.detach().clone())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.layer.weight.detach().clone())
        if len(self.validated) == self.fails_at:
            raise RuntimeError("validation failed")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def _loader(self, seed: int) -> torch.utils.data.DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        data = torch.utils.data.TensorDataset(torch.randn(12, 3, generator=generator))
        return torch.utils.data.DataLoader(data, batch_size=3)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return self._loader(0)

    def val_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        return self._loader(1)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, epochs: int = 2, **options: Any) -> pl.Trainer:
        return quiet_trainer(tmp_path, *callbacks, max_epochs=epochs, **options)

    return make


def average_of(weights: list[torch.Tensor], decay: float = DECAY) -> torch.Tensor:
    average = weights[0].double()
    for x in weights[1:]:
        average = decay * average + (1 - decay) * x.double()
    return average.float()


def test_validation_and_the_end_use_the_average_but_training_does_not(
    trainer: Callable[..., pl.Trainer],
) -> None:
    module, ema = Regression(), EMACallback(DECAY)
    trainer(ema, num_sanity_val_steps=0).fit(module)
    assert len(module.trained) == 9
    torch.testing.assert_close(module.validated[0], average_of(module.trained[:5]))
    torch.testing.assert_close(module.validated[-1], average_of(module.trained))
    torch.testing.assert_close(module.layer.weight.detach(), average_of(module.trained))
    plain = Regression()
    trainer().fit(plain)
    assert all(map(torch.equal, module.trained, plain.trained))


def test_failed_validation_restores_the_weights(trainer: Callable[..., pl.Trainer]) -> None:
    module, ema = Regression(fails_at=2), EMACallback(DECAY)
    with pytest.raises(RuntimeError, match="validation failed"):
        trainer(ema, num_sanity_val_steps=0).fit(module)
    assert torch.equal(module.layer.weight, module.trained[-1])
    assert not ema.ema.applied


@pytest.mark.parametrize("at_end", ["average", "raw"])
def test_resumed_run_is_bit_identical(
    at_end: Any, trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    def callback() -> EMACallback:
        return EMACallback(
            (DECAY, rules.warmup(0.9)), which=0, shadow_dtype="bfloat16", at_end=at_end
        )

    saving = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, save_last=True)
    whole, ema = Regression(), callback()
    trainer(ema, saving).fit(whole)
    checkpoint = torch.load(saving.last_model_path, weights_only=True)
    average = ema.ema.shadows[0]["layer.weight"].float()
    assert torch.equal(checkpoint["state_dict"]["layer.weight"], average)
    assert torch.equal(checkpoint["current_model_state"]["layer.weight"], whole.trained[-1])

    first = sorted((tmp_path / "saved").glob("epoch=0*.ckpt"))[0]
    resumed, again = Regression(), callback()
    trainer(again).fit(resumed, ckpt_path=str(first))
    assert again.ema.num_updates == ema.ema.num_updates == 8
    for ours, theirs in zip(again.ema.shadows, ema.ema.shadows, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    is_average = torch.equal(whole.layer.weight, average)
    assert is_average == (at_end == "average")


def test_checkpoint_yields_the_average_without_the_callback(
    trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path / "saved")
    module, callback = Regression(), EMACallback(DECAY)
    trainer(callback, saving).fit(module)
    checkpoint = torch.load(saving.best_model_path, weights_only=True)
    fresh = Regression()
    ema = fastema.EMA(fresh)
    ema.load_state_dict(checkpoint["callbacks"][NAME]["ema"], schedule="mine")
    ema.copy_to(fresh)
    assert torch.equal(fresh.layer.weight, module.layer.weight)


@pytest.mark.parametrize("held", [None, "raw"])
@pytest.mark.parametrize("alone", [False, True])
def test_checkpoint_saved_in_validation_is_like_any_other(
    trainer: Callable[..., pl.Trainer], tmp_path: Path, held: Any, alone: bool
) -> None:
    path = tmp_path / "inside.ckpt"

    class Saves(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trainer.save_checkpoint(path, weights_only=alone)
            assert torch.equal(pl_module.layer.weight, pl_module.validated[-1])

    module, ema = Regression(), EMACallback(DECAY, checkpoints=held)
    trainer(ema, Saves(), num_sanity_val_steps=0, epochs=1).fit(module)
    saved = torch.load(path, weights_only=True)
    average, raw = module.validated[-1], module.trained[-1]
    assert torch.equal(saved["state_dict"]["layer.weight"], average if held is None else raw)
    if held is None and not alone:
        assert torch.equal(saved["current_model_state"]["layer.weight"], raw)
    torch.testing.assert_close(module.layer.weight.detach(), average_of(module.trained))


def test_float32_average_is_written_once(
    trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path / "saved")
    trainer(EMACallback(DECAY), saving).fit(Regression())
    saved = torch.load(saving.best_model_path, weights_only=True)
    average = saved["callbacks"][NAME]["ema"]
    for name, value in saved["state_dict"].items():
        assert average[f"shadow.0.{name}"].data_ptr() == value.data_ptr()


def test_checkpoint_and_end_of_a_module_with_compiled_parts_hold_the_average(
    trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class Compiled(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.compile(self.layer, backend="eager")

    saving, module = ModelCheckpoint(tmp_path / "saved"), Compiled()
    trainer(EMACallback(DECAY), saving).fit(module)
    saved = torch.load(saving.best_model_path, weights_only=True)
    average = average_of(module.trained)
    key = "layer._orig_mod.weight"
    torch.testing.assert_close(saved["state_dict"][key], average)
    assert torch.equal(saved["current_model_state"][key], module.trained[-1])
    torch.testing.assert_close(module.layer.weight.detach(), average)


def test_invalid_arguments_are_refused() -> None:
    for options, words in (
        ({"decay": (0.9, 0.99)}, r"which=None.*0 to 1"),
        ({"at_end": "best"}, "at_end='best'"),
        ({"checkpoints": "best"}, "checkpoints='best'.*average, raw"),
        ({"decay": 1.5}, "decay"),
    ):
        with pytest.raises(ArgumentError, match=words):
            EMACallback(**options)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="no average yet"):
        _ = EMACallback().ema


def test_undone_replacement_of_a_method_leaves_an_earlier_or_a_later_one() -> None:
    one = SimpleNamespace(earlier=lambda: "own")
    undo = replace_method(one, "earlier", lambda method: f"{method()} in ours")
    assert one.earlier() == "own in ours"
    undo()
    assert one.earlier() == "own"
    undo = replace_method(one, "earlier", lambda method: "ours")
    one.earlier = lambda: "later"
    undo()
    assert one.earlier() == "later"


def test_average_follows_the_optimizer_inside_of_lightnings() -> None:
    model = torch.nn.Linear(3, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu", devices=1)
    for optimizer in (LightningOptimizer(inner), fabric.setup_optimizers(inner)):
        assert optimizer is not inner
        ema = fastema.EMA(model, decay=0.5)
        ema.follow(optimizer)
        inner.step()  # the trainer's strategy steps it
        assert ema.num_updates == 1
        ema.unfollow()


def test_only_batches_with_a_step_count(trainer: Callable[..., pl.Trainer]) -> None:
    trainer(ema := EMACallback(DECAY), accumulate_grad_batches=3).fit(Regression())
    assert ema.ema.num_updates == 4  # two steps in each epoch of four batches


@pytest.mark.parametrize("line", read_lines("NeMo"))
def test_line_for_nemo_has_its_averages_at_every_step(
    trainer: Callable[..., pl.Trainer], line: str
) -> None:
    decay, every = eval(line, {"EMA": lambda decay, every_n_steps=1: (decay, every_n_steps)})
    callback = eval(read_lines("NeMo")[line], {"fastema": fastema, "EMACallback": EMACallback})
    found: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            found.append(callback.ema.shadow["layer.weight"].clone())

    module = Regression()
    trainer(callback, Watch(), epochs=6).fit(module)
    average = module.trained[0]
    for n, (x, ours) in enumerate(zip(module.trained[1:], found, strict=True)):
        if n % every == 0:  # NeMo's EMAOptimizer counts from 0, and updates after the step
            average = average.lerp(x, 1 - decay)
        torch.testing.assert_close(ours, average, rtol=1e-6, atol=1e-7)
    assert n > 20
