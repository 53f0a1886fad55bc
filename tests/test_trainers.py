"""Which weights each trainer evaluates, saves, loads, resumes and exports: one run, by hand.

All trainers make the same twelve steps of SGD on a linear model, two epochs of six. NumPy makes
them in float64, with their average, so each expected number is a loss of known weights.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from lightning import pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from safetensors.torch import load_file

import fastema
import fastema.compat.lightning
from fastema.errors import ArgumentError
from fastema.keras import EMAWeights
from fastema.lightning import EMACallback
from fastema.transformers import EMACallback as TrainerCallback

from .support.lightning_runs import MARKS, quiet_trainer

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

DECAY, RATE, BATCH, EPOCH, STEPS = 0.8, 0.05, 4, 6, 12
_draw = np.random.default_rng(7)
X, XV = (_draw.normal(size=(n, 3)).astype(np.float32) for n in (BATCH * EPOCH, 8))
Y, YV = (
    (2 * x.sum(1, keepdims=True) + _draw.normal(size=(len(x), 1))).astype(np.float32)
    for x in (X, XV)
)
START = _draw.normal(size=4).astype(np.float32)  # three weights and a bias

# -- the reference ---------------------------------------------------------------------------------


def predict(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ w[:3, None] + w[3]


def loss_of(w: np.ndarray) -> float:
    return float(np.square(predict(w, XV) - YV).mean())


def train(w: np.ndarray, first: int, last: int) -> Iterator[np.ndarray]:
    """Yield the weights after each step."""
    for step in range(first, last):
        rows = slice(step % EPOCH * BATCH, (step % EPOCH + 1) * BATCH)
        error = 2 * (predict(w, X[rows]) - Y[rows]) / BATCH
        x = np.hstack([X[rows], np.ones((BATCH, 1))])
        w = w - RATE * (x * error).sum(0)
        yield w


@cache
def expected() -> dict[str, float]:
    """Return the losses of the weights and of the average after each epoch, and of runs from it."""
    raw, average = [START.astype(np.float64)], [START.astype(np.float64)]
    for w in train(raw[0], 0, STEPS):
        raw.append(w)
        average.append(DECAY * average[-1] + (1 - DECAY) * w)
    *_, restarted = train(average[EPOCH], EPOCH, STEPS)
    found = {
        "raw 6": loss_of(raw[EPOCH]),
        "raw 12": loss_of(raw[STEPS]),
        "average 6": loss_of(average[EPOCH]),
        "average 12": loss_of(average[STEPS]),
        "from average 6": loss_of(restarted),
    }
    numbers = sorted(found.values())
    assert min(b / a for a, b in pairwise(numbers)) > 1.02
    assert found["average 6"] > found["average 12"]  # the first epoch is "best" with mode="max"
    return found


def check(found: Any, cell: str) -> None:
    np.testing.assert_allclose(float(found), expected()[cell], rtol=1e-4, err_msg=cell)


def linear() -> torch.nn.Linear:
    layer = torch.nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(START[None, :3]))
        layer.bias.copy_(torch.from_numpy(START[3:]))
    return layer


def evaluate(layer: torch.nn.Module) -> float:
    with torch.no_grad():
        return torch.nn.functional.mse_loss(layer(torch.tensor(XV)), torch.tensor(YV)).item()


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- Lightning -------------------------------------------------------------------------------------


def loader(x: np.ndarray, y: np.ndarray, batch: int) -> Any:
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    return torch.utils.data.DataLoader(data, batch)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.validated: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.validated.append(float(self.trainer.callback_metrics["val_loss"]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE)


class LightningRun:
    def __init__(self, folder: Path, *callbacks: Any, ckpt: Any = None, **options: Any) -> None:
        self.module = Module()
        self.best = ModelCheckpoint(
            folder, "{step}", monitor="val_loss", mode="max", save_top_k=-1, **options
        )
        self.trainer = quiet_trainer(
            folder, *callbacks, self.best, max_epochs=2, num_sanity_val_steps=0
        )
        self.trainer.fit(self.module, loader(X, Y, BATCH), loader(XV, YV, 8), ckpt_path=ckpt)

    def test(self, path: Any = None) -> float:
        data = loader(XV, YV, 8)
        found = self.trainer.test(self.module, data, ckpt_path=path, verbose=False)
        return found[0]["test_loss"]


def load(path: Any) -> float:
    return evaluate(Module.load_from_checkpoint(path).layer)


@pytest.mark.parametrize("held", ["average", "raw"])
def test_lightning_reports_and_saves_the_weights_that_checkpoints_asks_for(
    held: Any, tmp_path: Path
) -> None:
    ema = EMACallback(DECAY, checkpoints=held)
    run = LightningRun(tmp_path, ema)
    check(run.module.validated[0], "average 6")
    check(run.module.validated[-1], "average 12")
    check(run.best.best_model_score, "average 6")
    check(run.test(), "average 12")
    run.trainer.save_checkpoint(tmp_path / "after.ckpt")
    check(load(tmp_path / "after.ckpt"), "average 12")
    check(load(run.best.best_model_path), f"{held} 6")
    check(load(tmp_path / "step=12.ckpt"), f"{held} 12")
    told = pytest.warns(UserWarning, match=r"test uses the training weights.*checkpoints='raw'")
    with told if held == "raw" else nullcontext():
        check(run.test("best"), f"{held} 6")


def test_lightning_saves_weights_alone_as_whole_checkpoints(tmp_path: Path) -> None:
    run = LightningRun(tmp_path, EMACallback(DECAY), save_weights_only=True)
    check(run.test("best"), "average 6")
    check(load(run.best.best_model_path), "average 6")
    raw = LightningRun(tmp_path, EMACallback(DECAY, evaluate_with_average=False))
    check(raw.module.validated[0], "raw 6")
    check(raw.test("best"), "raw 6")


@pytest.mark.parametrize("held", ["average", "raw"])
@pytest.mark.parametrize("then", ["average", "raw"])
def test_lightning_resumes_bit_identically_from_either_kind(
    held: Any, then: Any, tmp_path: Path
) -> None:
    whole = LightningRun(tmp_path / "a", EMACallback(DECAY, checkpoints=held, at_end="raw"))
    ema = EMACallback(DECAY, checkpoints=then, at_end="raw")
    rest = LightningRun(tmp_path / "b", ema, ckpt=whole.best.best_model_path)
    check(rest.module.validated[-1], "average 12")
    check(evaluate(rest.module.layer), "raw 12")
    assert same(rest.module.state_dict(), whole.module.state_dict())
    assert rest.module.validated[-1] == whole.module.validated[-1]


def test_lightning_names_what_a_resumed_run_begins_with(tmp_path: Path) -> None:
    averaged = LightningRun(tmp_path / "a", EMACallback(DECAY))
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need"):
        alone = LightningRun(tmp_path / "b", ckpt=averaged.best.best_model_path)
    check(alone.module.validated[-1], "from average 6")

    plain = LightningRun(tmp_path / "c")
    check(plain.module.validated[-1], "raw 12")
    ema = EMACallback(DECAY, at_end="raw")
    with pytest.warns(UserWarning, match="has no state of EMACallback: the average begins with"):
        rest = LightningRun(tmp_path / "d", ema, ckpt=plain.best.best_model_path)
    check(evaluate(rest.module.layer), "raw 12")

    averaged.trainer.save_checkpoint(tmp_path / "after.ckpt")
    with pytest.warns(UserWarning, match="saved after fit.*continues from the average"):
        LightningRun(tmp_path / "e", EMACallback(DECAY), ckpt=tmp_path / "after.ckpt")


def test_lightning_continues_the_training_weights_of_another_average(tmp_path: Path) -> None:
    theirs = LightningRun(tmp_path / "a", WeightAveraging())
    ema = EMACallback(DECAY, at_end="raw")
    with (
        pytest.warns(UserWarning, match="has no state of EMACallback"),
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint need"),
    ):
        rest = LightningRun(tmp_path / "b", ema, ckpt=theirs.best.best_model_path)
    check(evaluate(rest.module.layer), "raw 12")

    ours = LightningRun(tmp_path / "c", EMACallback(DECAY))
    current = fastema.compat.lightning.WeightAveraging(avg_fn=lambda avg, x, n: x)
    with (
        pytest.warns(UserWarning, match="written without WeightAveraging"),
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint need"),
    ):
        rest = LightningRun(tmp_path / "d", current, ckpt=ours.best.best_model_path)
    check(evaluate(rest.module.layer), "raw 12")


# -- Hugging Face ----------------------------------------------------------------------------------


class Network(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or transformers.PretrainedConfig())
        self.layer = linear()
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        pass

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.layer(x), labels)}


class SequentialTrainer(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def rows(x: np.ndarray, y: np.ndarray) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.tensor(a), "labels": torch.tensor(b)} for a, b in zip(x, y, strict=True)]


def hugging_face(
    folder: Path,
    *callbacks: Any,
    model: Any = None,
    resume: Any = None,
    fit: bool = True,
    **more: Any,
) -> Any:
    args = transformers.TrainingArguments(
        os.fspath(folder), use_cpu=True, report_to="none", disable_tqdm=True, num_train_epochs=2,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=8, max_grad_norm=0.0,
        eval_strategy="epoch", save_strategy="epoch", logging_steps=100,
        dataloader_pin_memory=False, **more,
    )  # fmt: skip
    model = model or Network()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = SequentialTrainer(
        model, args, train_dataset=rows(X, Y), eval_dataset=rows(XV, YV),
        optimizers=(optimizer, constant), callbacks=list(callbacks),
    )  # fmt: skip
    for callback in callbacks:
        if isinstance(callback, TrainerCallback):
            callback.attach(trainer)
    if fit:
        trainer.train(resume_from_checkpoint=resume and os.fspath(resume))
    return trainer


def from_pretrained(folder: Path) -> float:
    return evaluate(Network.from_pretrained(folder).layer)


RAW_IS_TOLD = r"checkpoints='raw'.*evaluate\(\) uses the average.*use the training weights"


def told_if_raw(held: str) -> Any:
    return pytest.warns(UserWarning, match=RAW_IS_TOLD) if held == "raw" else nullcontext()


@pytest.mark.parametrize("held", ["average", "raw"])
def test_hugging_face_reports_and_saves_the_weights_that_checkpoints_asks_for(
    held: Any, tmp_path: Path
) -> None:
    class Saves(transformers.TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.save_model(os.fspath(tmp_path / f"within-{state.global_step}"))

    ema = TrainerCallback(DECAY, checkpoints=held, at_end="raw" if held == "raw" else "average")
    trainer = hugging_face(tmp_path, ema, Saves(), fit=False)
    with told_if_raw(held):
        trainer.train()
    losses = [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]
    check(losses[0], "average 6")
    check(losses[1], "average 12")
    check(trainer.evaluate()["eval_loss"], "average 12")
    check(from_pretrained(tmp_path / "checkpoint-6"), f"{held} 6")
    fresh = Network.from_pretrained(tmp_path / "checkpoint-6")
    fresh = hugging_face(tmp_path / "fresh", model=fresh, fit=False)
    check(fresh.evaluate()["eval_loss"], f"{held} 6")
    check(from_pretrained(tmp_path / "within-6"), f"{held} 6")
    trainer.save_model(os.fspath(tmp_path / "after"))
    check(from_pretrained(tmp_path / "after"), f"{held} 12")
    ema.save_model(os.fspath(tmp_path / "averaged"))
    check(from_pretrained(tmp_path / "averaged"), "average 12")


@pytest.mark.parametrize("held", ["average", "raw"])
@pytest.mark.parametrize("at_end", ["average", "raw"])
def test_hugging_face_loads_the_best_model_that_the_average_has_chosen(
    held: Any, at_end: Any, tmp_path: Path
) -> None:
    ema = TrainerCallback(DECAY, checkpoints=held, at_end=at_end)
    with told_if_raw(held):
        trainer = hugging_face(
            tmp_path, ema, load_best_model_at_end=True, metric_for_best_model="loss",
            greater_is_better=True,
        )  # fmt: skip
    check(trainer.state.best_metric, "average 6")
    check(trainer.evaluate()["eval_loss"], "average 6")
    check(evaluate(trainer.model.layer), f"{at_end} 6")


@pytest.mark.parametrize("held", ["average", "raw"])
@pytest.mark.parametrize("then", ["average", "raw"])
def test_hugging_face_resumes_bit_identically_from_either_kind(
    held: Any, then: Any, tmp_path: Path
) -> None:
    with told_if_raw(held):
        whole = hugging_face(tmp_path / "a", TrainerCallback(DECAY, checkpoints=held, at_end="raw"))
    ema = TrainerCallback(DECAY, checkpoints=then, at_end="raw")
    with told_if_raw(then):
        rest = hugging_face(tmp_path / "b", ema, resume=tmp_path / "a" / "checkpoint-6")
    check(evaluate(rest.model.layer), "raw 12")
    assert same(rest.model.state_dict(), whole.model.state_dict())
    check(rest.evaluate()["eval_loss"], "average 12")
    assert rest.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


def test_hugging_face_without_the_callback_begins_with_the_model_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    hugging_face(tmp_path / "a", TrainerCallback(DECAY))
    alone = hugging_face(tmp_path / "b", resume=tmp_path / "a" / "checkpoint-6")
    check(alone.evaluate()["eval_loss"], "from average 6")
    training = load_file(tmp_path / "a" / "checkpoint-6" / "training_weights.safetensors")
    alone.model.load_state_dict(training, strict=False)
    check(evaluate(alone.model.layer), "raw 6")


# -- Keras -----------------------------------------------------------------------------------------


def network() -> Any:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.set_weights([START[:3, None], START[3:]])
    model.compile(keras.optimizers.SGD(RATE), "mse")
    return model


def fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    return model.fit(
        X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=[*callbacks],
        validation_data=(XV, YV), **options,
    ).history  # fmt: skip


def evaluated(model: Any) -> float:
    return float(model.evaluate(XV, YV, verbose=0))


@pytest.mark.parametrize("held", ["average", "raw"])
def test_keras_reports_and_saves_the_weights_that_checkpoints_asks_for(
    held: Any, tmp_path: Path
) -> None:
    model, ema = network(), EMAWeights(DECAY, checkpoints=held)
    path = tmp_path / "best.keras"
    best = keras.callbacks.ModelCheckpoint(
        os.fspath(path), monitor="val_loss", mode="max", save_best_only=True
    )
    told = pytest.warns(UserWarning, match="checkpoints='raw'.*ModelCheckpoint keep the training")
    with told if held == "raw" else nullcontext():
        history = fit(model, ema, best)
    check(history["val_loss"][0], "average 6")
    check(history["val_loss"][1], "average 12")
    check(evaluated(keras.models.load_model(path)), f"{held} 6")
    check(evaluated(model), f"{held} 12")
    check(model.evaluate(XV, YV, verbose=0, callbacks=[ema]), "average 12")
    model.save(tmp_path / "after.keras")
    check(evaluated(keras.models.load_model(tmp_path / "after.keras")), f"{held} 12")
    ema.save_weights(tmp_path / "average.weights.h5")
    other = network()
    other.load_weights(tmp_path / "average.weights.h5")
    check(evaluated(other), "average 12")
    ema.restore()
    check(evaluated(model), "raw 12")


class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch:
            raise KeyboardInterrupt


def test_keras_resumes_the_training_weights_with_the_callback_and_without(tmp_path: Path) -> None:
    def backup(folder: str) -> Any:
        return keras.callbacks.BackupAndRestore(os.fspath(tmp_path / folder))

    path = tmp_path / "average.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(network(), backup("a"), EMAWeights(DECAY, backup=path), Stop())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    model, ema = network(), EMAWeights(DECAY, backup=path)
    check(fit(model, backup("a"), ema)["val_loss"][-1], "average 12")
    check(evaluated(model), "average 12")
    ema.restore()
    check(evaluated(model), "raw 12")
    model = network()
    fit(model, backup("b"))
    check(evaluated(model), "raw 12")
    with pytest.raises(ArgumentError, match="put BackupAndRestore before EMAWeights"):
        fit(network(), EMAWeights(DECAY), backup("c"))


def test_keras_run_from_a_saved_best_model_begins_with_the_average(tmp_path: Path) -> None:
    path = tmp_path / "best.weights.h5"
    best = keras.callbacks.ModelCheckpoint(os.fspath(path), save_weights_only=True)
    fit(network(), EMAWeights(DECAY), best, epochs=1)
    model = network()
    model.load_weights(path)
    fit(model, epochs=1)
    check(evaluated(model), "from average 6")


# -- accelerate ------------------------------------------------------------------------------------


def accelerated(folder: Path, *, resume: bool = False, register: bool = True) -> Any:
    accelerator = Accelerator(cpu=True)
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = fastema.EMA(model, DECAY)
    if register:
        accelerator.register_for_checkpointing(ema)
    if resume:
        accelerator.load_state(os.fspath(folder))
    for step in range(EPOCH if resume else 0, STEPS):
        part = slice(step % EPOCH * BATCH, (step % EPOCH + 1) * BATCH)
        loss = torch.nn.functional.mse_loss(model(torch.tensor(X[part])), torch.tensor(Y[part]))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if step + 1 == EPOCH and not resume:
            accelerator.save_state(os.fspath(folder))
            with ema.swapped():
                accelerator.save_state(os.fspath(folder) + "-swapped")
                accelerator.save_model(model, os.fspath(folder) + "-exported")
                check(evaluate(model), "average 6")
    return accelerator, model, ema


def test_accelerate_saves_the_model_as_it_is_and_the_average_beside_it(tmp_path: Path) -> None:
    _, model, ema = accelerated(tmp_path / "state")
    check(evaluate(model), "raw 12")
    with ema.swapped():
        check(evaluate(model), "average 12")
    layer = linear()
    for folder, cell in (
        ("state", "raw 6"),
        ("state-swapped", "average 6"),
        ("state-exported", "average 6"),
    ):
        layer.load_state_dict(load_file(tmp_path / folder / "model.safetensors"))
        check(evaluate(layer), cell)

    _, rest, again = accelerated(tmp_path / "state", resume=True)
    assert same(rest.state_dict(), model.state_dict())
    with ema.swapped(), again.swapped():
        assert same(rest.state_dict(), model.state_dict())


def test_accelerate_tells_a_run_that_has_not_registered_the_average(tmp_path: Path) -> None:
    accelerated(tmp_path / "state")
    with pytest.raises(RuntimeError, match="custom checkpoint"):
        accelerated(tmp_path / "state", resume=True, register=False)
