"""Real runs of Lightning with its averaging callbacks and with ours, side by side."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks import weight_averaging as peer
from torch.optim import swa_utils
from torch.utils.data import DataLoader, TensorDataset

import fastema
import fastema.compat.swa_utils
from fastema.compat import lightning as ours
from fastema.compat.peer_horizon import lightning as same
from fastema.errors import ArgumentError, LayoutError, StateError

from ..support.lightning_runs import MARKS, quiet_trainer
from ..support.requirements import require_packages

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # Lightning's callback, where a checkpoint is loaded for a test.
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
]

LIBRARIES = pytest.mark.parametrize("library", [peer, ours], ids=["theirs", "ours"])
STEPS, EPOCHS = 5, 4  # steps per epoch

State = dict[str, torch.Tensor]


class Network(pl.LightningModule):
    """Notes its weights, as they are after each step of the optimizer and in each validation."""

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


def snapshot(module: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def loader(batches: int = STEPS) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * batches, 3, generator=generator)
    y = x.flip(1) + torch.randn(4 * batches, 3, generator=generator)
    return DataLoader(TensorDataset(x, y), 4)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    settings = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options}
    return quiet_trainer(folder, *callbacks, **settings)


def fitted(
    folder: Path,
    callback: Callback,
    *others: Callback,
    module: Network | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> Network:
    module = module or Network()
    run = trainer(folder, callback, *others, **options)
    run.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    return module


def floats(state: State) -> State:
    """Without integers, which Lightning's callback truncates."""
    return {name: value for name, value in state.items() if value.is_floating_point()}


def assert_near(found: State, want: State) -> None:
    found, want = floats(found), floats(want)
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=2e-6, atol=2e-7)


def assert_same(found: State, want: State) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def differ(one: State, other: State) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in floats(one))


def average_of(steps: list[State], decays: list[float | None], buffers: bool = True) -> State:
    """In float64: None for a step that is left out; the first one that is not is copied."""
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


CONFIGURATIONS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda library: library.WeightAveraging(),
    "mean, buffers copied": lambda library: library.WeightAveraging(use_buffers=False),
    "torch's avg_fn": lambda library: library.WeightAveraging(avg_fn=swa_utils.get_ema_avg_fn(0.7)),
    "our multi_avg_fn": lambda library: library.WeightAveraging(
        "cpu", True, multi_avg_fn=fastema.compat.swa_utils.get_ema_multi_avg_fn(0.7)
    ),
    "own avg_fn": lambda library: library.WeightAveraging(
        avg_fn=lambda averaged, current, number: averaged + (current - averaged) / (number + 2)
    ),
    "ema": lambda library: library.EMAWeightAveraging(decay=0.8),
    "ema, defaults": lambda library: library.EMAWeightAveraging(),
    "ema, by place": lambda library: library.EMAWeightAveraging(None, False, 0.6, 1, 2, None),
    "ema, from a step on": lambda library: library.EMAWeightAveraging(
        decay=0.8, update_starting_at_step=4
    ),
    "ema, epochs alone": lambda library: library.EMAWeightAveraging(
        decay=0.5, update_every_n_steps=0, update_starting_at_epoch=1
    ),
    "ema, both": lambda library: library.EMAWeightAveraging(decay=0.7, update_starting_at_epoch=2),
}


def test_what_install_puts_in_their_place_has_their_horizon() -> None:
    with fastema.compat.install("lightning"):
        assert pl.callbacks.EMAWeightAveraging is same.EMAWeightAveraging
        assert issubclass(pl.callbacks.EMAWeightAveraging, pl.callbacks.WeightAveraging)
        # A checkpoint has the state of a callback under this name.
        assert same.EMAWeightAveraging().state_key == "EMAWeightAveraging"
    with fastema.compat.install("lightning", horizon="corrected"):
        assert pl.callbacks.EMAWeightAveraging is ours.EMAWeightAveraging


class Asked:
    """When should_update is asked, and about which step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def of(self, base: Any) -> Any:
        class Asking(base):  # type: ignore[misc]
            def should_update(
                inner, step_idx: int | None = None, epoch_idx: int | None = None
            ) -> bool:
                if step_idx is not None:
                    self.steps.append(step_idx)
                return step_idx is not None and step_idx % 3 == 1

        return Asking()


def test_installed_callbacks_ask_as_often_as_lightnings(tmp_path: Path) -> None:
    asked = []
    for library in (peer, same):
        asked.append(Asked())
        fitted(tmp_path, asked[-1].of(library.WeightAveraging), accumulate_grad_batches=2)
    assert asked[0].steps
    assert asked[0].steps == asked[1].steps


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_numbers_and_state_equal_lightnings(tmp_path: Path, configuration: str) -> None:
    found = []
    for library in (peer, ours):
        callback = CONFIGURATIONS[configuration](library)
        module = fitted(tmp_path, callback)
        assert callback._average_model is not None
        found.append((module, callback._average_model.state_dict(), callback.state_dict()))
    (theirs, their_average, their_counts), (mine, my_average, my_counts) = found
    assert len(mine.steps) == STEPS * EPOCHS
    for one, other in zip(mine.steps, theirs.steps, strict=True):
        assert_near(one, other)
    assert_near(mine.state_dict(), theirs.state_dict())
    assert differ(mine.state_dict(), mine.steps[-1])
    assert my_average.keys() == their_average.keys()
    assert my_average["n_averaged"] == their_average["n_averaged"]
    assert_near(my_average, their_average)
    assert my_counts["latest_update_step"] == their_counts["latest_update_step"]
    # Theirs validates the weights of the beginning until there is an average.
    begun = 0 if "epochs" not in configuration else 2
    for one, other in zip(mine.validated[begun:], theirs.validated[begun:], strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_the_average_is_that_of_the_definition(
    tmp_path: Path, use_buffers: bool, tied: bool
) -> None:
    callback = ours.EMAWeightAveraging(
        use_buffers=use_buffers, decay=0.9, update_every_n_steps=3, update_starting_at_step=2
    )
    module = fitted(tmp_path, callback, module=Network(tied))
    # Steps 3, 6, 9, ... of 0, 1, 2, ...
    decays = [0.9**3 if k >= 2 and k % 3 == 0 else None for k in range(STEPS * EPOCHS)]
    for epoch in range(EPOCHS):
        end = STEPS * (epoch + 1)
        want = average_of(module.steps[:end], decays[:end], use_buffers)
        seen = module.validated[epoch]
        assert_near(seen, want)
        # Copied at the latest update, exactly.
        assert seen["norm.num_batches_tracked"] == want["norm.num_batches_tracked"]
    assert_same(snapshot(module), module.validated[-1])


def test_update_every_n_steps_keeps_the_horizon_unless_asked_for_theirs(tmp_path: Path) -> None:
    def weights(library: Any, every: int, **options: Any) -> Network:
        callback = library.EMAWeightAveraging(decay=0.9, update_every_n_steps=every, **options)
        return fitted(tmp_path, callback)

    theirs, exact, default = weights(peer, 4), weights(ours, 4, peer_exact=True), weights(ours, 4)
    assert_same(snapshot(weights(same, 4)), snapshot(exact))
    assert_near(exact.state_dict(), theirs.state_dict())
    every = [k % 4 == 0 for k in range(STEPS * EPOCHS)]
    assert_near(exact.state_dict(), average_of(exact.steps, [0.9 if k else None for k in every]))
    want = average_of(default.steps, [0.9**4 if k else None for k in every])
    assert_near(default.state_dict(), want)
    assert differ(default.state_dict(), theirs.state_dict())

    def distance(one: State, other: State) -> float:
        return sum(float((one[name] - other[name]).abs().sum()) for name in floats(one))

    each = weights(ours, 1).state_dict()
    assert distance(default.state_dict(), each) < distance(theirs.state_dict(), each) / 3


def test_at_the_end_of_an_epoch_the_decay_is_that_per_epoch(tmp_path: Path) -> None:
    callback = ours.EMAWeightAveraging(
        decay=0.9, update_every_n_steps=3, update_starting_at_epoch=1
    )
    module = fitted(tmp_path, callback)
    seen, decays = [], []
    for k, step in enumerate(module.steps):
        seen += [step, step]
        ends = (k + 1) % STEPS == 0 and k >= STEPS
        decays += [0.9**3 if k % 3 == 0 else None, 0.9 if ends else None]
    assert_near(module.state_dict(), average_of(seen, decays))


class OddEpochs(ours.WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        assert (step_idx is None) is not (epoch_idx is None)
        return epoch_idx is not None and epoch_idx % 2 == 1


def test_a_subclass_says_when(tmp_path: Path) -> None:
    callback = OddEpochs()
    module = fitted(tmp_path, callback)
    ends = [floats(module.steps[STEPS * (epoch + 1) - 1]) for epoch in (1, 3)]
    want = {name: (ends[0][name].double() + ends[1][name].double()) / 2 for name in ends[0]}
    assert_near(module.state_dict(), want)
    for seen, epoch in zip(module.validated, (0, 1, 1, 1), strict=True):
        assert_same(seen, module.steps[STEPS * (epoch + 1) - 1])
    found = callback.state_dict()
    assert (found["latest_update_step"], found["latest_update_epoch"]) == (0, 3)


def telling(base: Any, calls: list[Any]) -> Any:
    """A subclass that notes when the methods that subclasses override are called."""

    class Telling(base):  # type: ignore[misc]
        def noted(self, name: str, pl_module: Any) -> None:
            run = pl_module.trainer
            calls.append((name, run.current_epoch, run.global_step, run.sanity_checking))

        def _swap_models(self, pl_module: Any) -> None:
            self.noted("swap", pl_module)
            super()._swap_models(pl_module)

        def _copy_average_to_current(self, pl_module: Any) -> None:
            self.noted("copy", pl_module)
            super()._copy_average_to_current(pl_module)

    return Telling


@pytest.mark.parametrize(
    ("options", "fit"),
    [
        ({}, {}),
        ({"update_starting_at_step": 12, "update_every_n_steps": 3}, {"num_sanity_val_steps": 1}),
        ({"update_starting_at_step": 3}, {"val_check_interval": 2, "accumulate_grad_batches": 2}),
        ({"update_every_n_steps": 0}, {"limit_val_batches": 0}),
    ],
    ids=["each step", "late", "within epochs", "never"],
)
def test_what_subclasses_override_is_called_when_lightning_calls_it(
    tmp_path: Path, options: dict[str, Any], fit: dict[str, Any]
) -> None:
    """Also before the first update, and where checkpoints are written of an exchanged model."""
    told = []
    for library in (peer, ours):
        calls: list[Any] = []
        callback = telling(library.EMAWeightAveraging, calls)(**options)
        folder = tmp_path / library.__name__
        saver = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=False)
        fitted(folder, callback, saver, **fit)
        told.append(calls)
    assert told[0]
    assert told[0] == told[1]


def test_a_subclass_that_does_not_copy_keeps_the_weights(tmp_path: Path) -> None:
    class Kept(ours.EMAWeightAveraging):
        def _copy_average_to_current(self, pl_module: Any) -> None:
            """The average is to be read from the callback."""

    callback = Kept(decay=0.5)
    module = fitted(tmp_path, callback)
    assert_same(snapshot(module), module.steps[-1])
    assert callback._average_model is not None
    assert differ(callback._average_model.module.state_dict(), module.steps[-1])


def test_gradient_accumulation_counts_steps_of_the_optimizer(tmp_path: Path) -> None:
    found = []
    for library in (peer, ours):
        callback = library.EMAWeightAveraging(decay=0.8)
        module = fitted(tmp_path, callback, accumulate_grad_batches=3)
        assert len(module.steps) == 2 * EPOCHS  # the rest of an epoch is a step too
        assert callback._average_model.n_averaged == 2 * EPOCHS
        found.append(module)
    assert_near(found[1].state_dict(), average_of(found[1].steps, [0.8] * (2 * EPOCHS)))
    assert_near(found[1].state_dict(), found[0].state_dict())


# -- checkpoints ----------------------------------------------------------------------------------


def saving(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, **options)


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
def test_an_interrupted_run_goes_on_in_either_library(
    tmp_path: Path, first: Any, second: Any, options: dict[str, Any]
) -> None:
    def callback(library: Any) -> Any:
        exact = {"peer_exact": True} if library is ours else {}
        return library.EMAWeightAveraging(**options, **exact)

    whole = fitted(tmp_path / "whole", callback(second))
    begun = fitted(tmp_path / "a", callback(first), saving(tmp_path / "a"), max_epochs=2)
    path = tmp_path / "a" / "epoch=1.ckpt"
    saved = torch.load(path, weights_only=True)
    assert differ(saved["state_dict"], saved["current_model_state"])
    assert_same(saved["current_model_state"], begun.steps[-1])
    assert list(saved["averaging_state"]) == ["n_averaged"]
    assert "EMAWeightAveraging" in saved["callbacks"]

    module = Network()
    module.steps = list(begun.steps)
    resumed = callback(second)
    fitted(tmp_path / "b", resumed, module=module, ckpt_path=str(path))
    assert len(module.steps) == STEPS * EPOCHS
    assert_near(module.state_dict(), whole.state_dict())
    for one, other in zip(module.validated, whole.validated[2:], strict=True):
        assert_near(one, other)
    assert_near(module.steps[-1], whole.steps[-1])
    if first is second is ours:
        assert_same(snapshot(module), snapshot(whole))


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
@pytest.mark.filterwarnings("ignore:The checkpoint was written without WeightAveraging")
def test_a_run_without_an_average_is_resumed_with_one(tmp_path: Path) -> None:
    fitted(tmp_path / "a", saving(tmp_path / "a"), max_epochs=2)
    found = []
    for library in (peer, ours):
        callback = library.EMAWeightAveraging(decay=0.8)
        module = Network()
        module.steps = [{}] * (2 * STEPS)
        path = str(tmp_path / "a" / "epoch=1.ckpt")
        fitted(tmp_path / "b", callback, module=module, ckpt_path=path)
        found.append(module)
    assert_near(found[1].state_dict(), found[0].state_dict())
    assert_near(found[1].state_dict(), average_of(found[1].steps[2 * STEPS :], [0.8] * 10))


def test_a_resumed_run_has_an_average_from_the_start(tmp_path: Path) -> None:
    callback = ours.EMAWeightAveraging(decay=0.8)
    fitted(tmp_path, callback, saving(tmp_path), max_epochs=2)
    path = tmp_path / "epoch=1.ckpt"
    module = Network()
    module.steps = [{}] * (2 * STEPS)
    again = ours.EMAWeightAveraging(decay=0.8)
    fitted(
        tmp_path, again, module=module, ckpt_path=str(path), max_epochs=3, num_sanity_val_steps=1
    )
    assert_same(module.validated[0], torch.load(path, weights_only=True)["state_dict"])


@LIBRARIES
def test_weights_alone_are_saved_of_the_average_that_was_monitored(
    tmp_path: Path, library: Any
) -> None:
    saver = saving(tmp_path, monitor="val_loss", save_weights_only=True)
    module = fitted(tmp_path, library.EMAWeightAveraging(decay=0.8), saver)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert "callbacks" not in saved
    assert "current_model_state" not in saved
    if library is ours:
        assert_same(saved["state_dict"], module.validated[1])
        best = Network.load_from_checkpoint(saver.best_model_path)
        assert_same(snapshot(best), module.validated[int(saver.best_model_path[-6])])
    else:  # those in training, whose loss is not known
        assert_same(saved["state_dict"], module.steps[2 * STEPS - 1])


def test_the_strategy_is_left_as_it_was(tmp_path: Path) -> None:
    run = trainer(tmp_path, ours.EMAWeightAveraging())
    run.fit(Network(), loader(), loader(1))
    assert "save_checkpoint" not in vars(run.strategy)
    own = run.strategy.save_checkpoint = run.strategy.save_checkpoint  # somebody else's
    run.fit_loop.max_epochs = EPOCHS + 1
    run.fit(Network(), loader(), loader(1))
    assert run.strategy.save_checkpoint is own


class InValidation(Callback):
    """Saves in the middle of a validation."""

    def __init__(self, path: Path, weights_only: bool) -> None:
        self.path, self.weights_only = path, weights_only

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)


@LIBRARIES
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_in_a_validation_does_not_mistake_them(
    tmp_path: Path, library: Any, weights_only: bool
) -> None:
    path = tmp_path / "middle.ckpt"
    other = InValidation(path, weights_only)
    module = fitted(tmp_path, library.EMAWeightAveraging(decay=0.8), other)
    saved = torch.load(path, weights_only=True)
    raw, average = module.steps[2 * STEPS - 1], module.validated[1]
    if weights_only:
        assert_same(saved["state_dict"], average)
    elif library is ours:
        assert_same(saved["current_model_state"], raw)
        assert_same(saved["state_dict"], average)
    else:
        assert_same(saved["current_model_state"], average)
        assert_same(saved["state_dict"], raw)
    plain = fitted(tmp_path, library.EMAWeightAveraging(decay=0.8))
    assert_same(snapshot(module), snapshot(plain))


class AtTheEnd(Callback):
    """Saves when training has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path / "all.ckpt")
        trainer.save_checkpoint(self.path / "weights.ckpt", weights_only=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path / "later.ckpt")


@LIBRARIES
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_of_the_end_have_the_weights_in_training(
    tmp_path: Path, library: Any, precision: Any, first: bool
) -> None:
    average, other = library.EMAWeightAveraging(decay=0.8), AtTheEnd(tmp_path)
    callbacks = (other, average) if first else (average, other)
    module = fitted(tmp_path, *callbacks, precision=precision)  # type: ignore[arg-type]
    for name in ("all.ckpt", "later.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        raw = not differ(saved["current_model_state"], module.steps[-1])
        assert raw is (library is ours or (first and name == "all.ckpt"))
        if library is ours:
            assert_same(saved["state_dict"], average._average_model.module.state_dict())
    if library is ours and precision == "32-true":
        assert_same(snapshot(module), saved["state_dict"])
        weights = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
        assert_same(weights, saved["state_dict"])
    if library is ours:
        want = {n: v.to(module.steps[-1][n].dtype) for n, v in saved["state_dict"].items()}
        assert_same(snapshot(module), want)


@LIBRARIES
def test_a_run_goes_on_from_the_last_checkpoint(tmp_path: Path, library: Any) -> None:
    whole = fitted(tmp_path / "whole", library.EMAWeightAveraging(decay=0.8))
    saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1000)
    begun = fitted(tmp_path, library.EMAWeightAveraging(decay=0.8), saver, max_epochs=2)
    rest = Network()
    rest.steps = list(begun.steps)
    callback = library.EMAWeightAveraging(decay=0.8)
    fitted(tmp_path, callback, module=rest, ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(rest.steps) == STEPS * EPOCHS
    same = not differ(snapshot(rest), snapshot(whole))
    assert same is (library is ours)


@LIBRARIES
def test_to_resume_a_finished_run_gives_the_average(tmp_path: Path, library: Any) -> None:
    module = fitted(tmp_path, library.EMAWeightAveraging(decay=0.8), saving(tmp_path))
    path = str(tmp_path / f"epoch={EPOCHS - 1}.ckpt")
    again = fitted(tmp_path, library.EMAWeightAveraging(decay=0.8), ckpt_path=path)
    assert not again.steps
    want = snapshot(module) if library is ours else module.steps[-1]
    assert_near(again.state_dict(), want)


@LIBRARIES
def test_after_fit_the_model_is_saved_as_it_is(tmp_path: Path, library: Any) -> None:
    run = trainer(tmp_path, library.EMAWeightAveraging(decay=0.8))
    module, other = Network(), Network()
    run.fit(module, loader(), loader(1))
    average = snapshot(module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert_same(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"], average)
    run.validate(other, loader(1), verbose=False)
    for weights_only in (False, True):
        run.save_checkpoint(tmp_path / "b.ckpt", weights_only=weights_only)
        saved = torch.load(tmp_path / "b.ckpt", weights_only=True)
        if library is ours:
            assert_same(saved["state_dict"], snapshot(other))
            assert "current_model_state" not in saved
        elif not weights_only:
            assert_near(saved["state_dict"], average)


class Stopping(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 7:
            raise RuntimeError("enough")


@pytest.mark.parametrize("weights_only", [False, True])
def test_what_an_exception_leaves_is_saved_alike(tmp_path: Path, weights_only: bool) -> None:
    saver = ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1, save_on_exception=True,
        save_weights_only=weights_only,
    )  # fmt: skip
    module, callback = Network(), ours.EMAWeightAveraging(decay=0.8)
    run = trainer(tmp_path, callback, Stopping(), saver)
    with pytest.raises(RuntimeError, match="enough"):
        run.fit(module, loader(), loader(1))
    steps = [*module.steps[:6], snapshot(module)]
    run.save_checkpoint(tmp_path / "step=7-by-hand.ckpt", weights_only=weights_only)
    for step, name in ((6, "step=6"), (7, "step=7"), (7, "step=7-by-hand")):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert_near(saved["state_dict"], average_of(steps[:step], [0.8] * step))
        if not weights_only:
            assert_same(saved["current_model_state"], steps[step - 1])
    # Another use of the trainer is none of that run.
    other = Network()
    run.validate(other, loader(1), verbose=False)
    run.save_checkpoint(tmp_path / "other.ckpt", weights_only=weights_only)
    saved = torch.load(tmp_path / "other.ckpt", weights_only=True)
    assert_same(saved["state_dict"], snapshot(other))


# -- what is wrong in theirs ----------------------------------------------------------------------


class Alternating(Network):
    """Two optimizers, whose steps are counted in one row."""

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


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
def test_steps_of_several_optimizers(tmp_path: Path, every: int) -> None:
    def run(library: Any, **options: Any) -> Network:
        callback = library.EMAWeightAveraging(decay=0.8, update_every_n_steps=every, **options)
        return fitted(tmp_path, callback, module=Alternating())

    theirs, exact, default = run(peer), run(ours, peer_exact=True), run(ours)
    assert_same(snapshot(run(same)), snapshot(exact))
    count = STEPS * EPOCHS
    assert len(default.steps) == count
    last = [(2 * k + 1) % every == 0 for k in range(count)]
    assert any(last) is (every % 2 == 1)
    if any(last):
        assert_near(exact.state_dict(), theirs.state_dict())
    else:  # theirs ends where it began
        assert_same(snapshot(theirs), snapshot(Network()))
        assert_same(snapshot(exact), exact.steps[-1])
    decays: list[float | None] = []
    since = 0
    for k in range(count):
        since += 1
        fires = any(step % every == 0 for step in (2 * k, 2 * k + 1))
        decays.append(0.8**since if fires else None)
        since = 0 if fires else since
    assert_near(default.state_dict(), average_of(default.steps, decays))


def test_steps_of_several_optimizers_are_resumed(tmp_path: Path) -> None:
    def callback() -> Any:
        return ours.EMAWeightAveraging(decay=0.8, update_every_n_steps=4)

    whole = fitted(tmp_path / "whole", callback(), module=Alternating())
    begun = Alternating()
    fitted(tmp_path / "a", callback(), saving(tmp_path / "a"), module=begun, max_epochs=1)
    rest = Alternating()
    path = str(tmp_path / "a" / "epoch=0.ckpt")
    fitted(tmp_path / "b", callback(), module=rest, ckpt_path=path)
    assert len(rest.steps) == STEPS * (EPOCHS - 1)
    assert_same(snapshot(rest), snapshot(whole))


class Another(ours.EMAWeightAveraging):
    pass


@pytest.mark.parametrize(
    "kinds",
    [
        (ours.WeightAveraging, ours.EMAWeightAveraging),
        (ours.EMAWeightAveraging, Another),
        (ours.EMAWeightAveraging, peer.WeightAveraging),
        (peer.WeightAveraging, ours.EMAWeightAveraging),
    ],
)
def test_two_averages_are_refused(tmp_path: Path, kinds: tuple[Any, Any]) -> None:
    module = Network()
    run = trainer(tmp_path, *(kind() for kind in kinds))
    with pytest.raises(StateError, match=r"more than one averaging callback.*WeightAveraging"):
        run.fit(module, loader(), loader(1))
    assert not module.steps


@LIBRARIES
def test_before_the_first_update_the_weights_are_validated_and_saved(
    tmp_path: Path, library: Any
) -> None:
    callback = library.EMAWeightAveraging(decay=0.8, update_starting_at_step=2 * STEPS)
    module, begun = Network(), snapshot(Network())
    fitted(tmp_path, callback, saving(tmp_path), module=module)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert saved["averaging_state"]["n_averaged"] == 0
    assert_same(saved["current_model_state"], module.steps[STEPS - 1])
    if library is ours:
        assert_same(module.validated[0], module.steps[STEPS - 1])
        assert_same(module.validated[1], module.steps[2 * STEPS - 1])
        assert_same(saved["state_dict"], module.steps[STEPS - 1])
    else:  # Lightning#21724
        assert_same(module.validated[0], begun)
        assert_same(saved["state_dict"], begun)
    want = average_of(module.steps, [None] * 2 * STEPS + [0.8] * 2 * STEPS)
    assert_near(module.state_dict(), want)


@LIBRARIES
def test_a_run_without_an_update_keeps_what_it_learned(tmp_path: Path, library: Any) -> None:
    callback = library.EMAWeightAveraging(update_starting_at_step=10_000)
    module = fitted(tmp_path, callback)
    assert_same(snapshot(module), module.steps[-1] if library is ours else snapshot(Network()))


@LIBRARIES
def test_integer_buffers_are_exact(tmp_path: Path, library: Any) -> None:
    module = fitted(tmp_path, library.EMAWeightAveraging(decay=0.9))
    count = module.norm.num_batches_tracked
    assert (int(count) == STEPS * EPOCHS) is (library is ours)


class Failing(Network):
    error: type[BaseException] = RuntimeError

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.trainer.current_epoch == 1:
            raise self.error("in the middle")


class Interrupted(Failing):
    error = KeyboardInterrupt


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl-C once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@LIBRARIES
@pytest.mark.parametrize(("kind", "raised"), [(Failing, RuntimeError), (Interrupted, SystemExit)])
@pytest.mark.usefixtures("interruptible")
def test_a_validation_that_fails_leaves_the_weights(
    tmp_path: Path, library: Any, kind: type[Failing], raised: type[BaseException]
) -> None:
    module = kind()
    callback = library.EMAWeightAveraging(decay=0.8)
    run = trainer(tmp_path, callback)
    with pytest.raises(raised):
        run.fit(module, loader(), loader(1))
    average = callback._average_model.module.state_dict()
    if library is ours:
        assert_same(snapshot(module), module.steps[-1])
        assert_same(average, module.validated[-1])
        run.test(module, loader(1), verbose=False)
        assert "save_checkpoint" not in vars(run.strategy)
    else:
        assert_same(snapshot(module), module.validated[-1])
        assert_same(average, module.steps[-1])


@LIBRARIES
def test_a_checkpoint_that_is_tested_is_the_average(tmp_path: Path, library: Any) -> None:
    module = Network()
    run = trainer(tmp_path, library.EMAWeightAveraging(decay=0.8), saving(tmp_path))
    run.fit(module, loader(), loader(1))
    path = tmp_path / "epoch=1.ckpt"
    run.test(module, loader(1), ckpt_path=str(path), verbose=False)
    raw, average = module.steps[2 * STEPS - 1], module.validated[1]
    assert_same(module.tested[0], average if library is ours else raw)

    before = len(module.validated)
    run.validate(module, loader(1), ckpt_path=str(path), verbose=False)
    assert_same(module.validated[before], average)
    other = trainer(tmp_path, library.EMAWeightAveraging(decay=0.8))
    other.test(Network(), loader(1), ckpt_path=str(path), verbose=False)
    fresh = Network()
    other.test(fresh, loader(1), ckpt_path=str(path), verbose=False)
    assert_same(fresh.tested[0], average)


@LIBRARIES
def test_outside_fit_the_model_is_validated_as_it_is(tmp_path: Path, library: Any) -> None:
    module = Network()
    run = trainer(tmp_path, library.EMAWeightAveraging(decay=0.8))
    run.fit(module, loader(), loader(1))
    average, own = snapshot(module), module.steps[STEPS]
    run.validate(module, loader(1), verbose=False)
    assert_same(module.validated[-1], average)
    module.load_state_dict(own)
    run.validate(module, loader(1), verbose=False)
    assert_same(module.validated[-1], own if library is ours else average)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_validations_do_not_change_the_run(tmp_path: Path, precision: Any) -> None:
    found = []
    for often in (1, EPOCHS):
        callback = ours.EMAWeightAveraging(decay=0.9)
        module = fitted(tmp_path, callback, precision=precision, check_val_every_n_epoch=often)
        assert callback._average_model is not None
        found.append((module, callback._average_model.module.state_dict()))
    (module, average), (rarely, same) = found
    for one, other in zip(module.steps, rarely.steps, strict=True):
        assert_same(one, other)
    assert_same(average, same)
    want = average_of(module.steps, [0.9] * STEPS * EPOCHS)
    assert module.first.weight.dtype == getattr(
        torch, {"32-true": "float32", "bf16-true": "bfloat16", "64-true": "float64"}[precision]
    )
    if precision == "bf16-true":  # the model became bfloat16 after the average was made of it
        assert average["first.weight"].dtype == torch.float32
        torch.testing.assert_close(
            module.first.weight.detach(), average["first.weight"].bfloat16(), rtol=0, atol=0
        )
    assert_near(average, want)


def test_in_bfloat16_theirs_is_rounded_by_each_validation(tmp_path: Path) -> None:
    callback = peer.EMAWeightAveraging(decay=0.9)
    fitted(tmp_path, callback, precision="bf16-true")
    assert callback._average_model is not None
    average = callback._average_model.module.first.weight.detach()
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, average.bfloat16().float(), rtol=0, atol=0)


def test_a_checkpoint_of_a_float32_average_in_a_bfloat16_validation(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    options: dict[str, Any] = {"precision": "bf16-true", "max_epochs": 2}
    callback = ours.EMAWeightAveraging(decay=0.9)
    module = fitted(tmp_path, callback, InValidation(path, False), **options)
    saved = torch.load(path, weights_only=True)
    assert_same(saved["current_model_state"], module.steps[-1])
    assert callback._average_model is not None
    assert_same(saved["state_dict"], callback._average_model.module.state_dict())


class Sixteen(Network):
    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)


def test_averages_in_sixteen_bits_move_and_are_resumed_to_the_bit(tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> Network:
        callback = ours.EMAWeightAveraging(decay=0.999)
        module = Sixteen()
        module.steps = [{}] * options.pop("done", 0)
        fitted(folder, callback, saving(folder), module=module, **options)
        assert callback._average_model is not None
        assert callback._average_model.module.first.weight.dtype == torch.bfloat16
        return module

    whole = run(tmp_path / "whole")
    assert differ(snapshot(whole), whole.steps[0])
    path = str(tmp_path / "whole" / "epoch=1.ckpt")
    rest = run(tmp_path / "rest", ckpt_path=path, done=2 * STEPS)
    assert_same(snapshot(rest), snapshot(whole))


@LIBRARIES
@pytest.mark.parametrize("by", ["steps", "epochs"])
def test_a_second_fit_is_averaged_too(tmp_path: Path, library: Any, by: str) -> None:
    options = {"update_every_n_steps": 0, "update_starting_at_epoch": 0} if by == "epochs" else {}
    callback = library.EMAWeightAveraging(decay=0.8, **options)
    fitted(tmp_path, callback)
    module = fitted(tmp_path, callback, max_epochs=2)
    if library is ours:
        steps = module.steps[STEPS - 1 :: STEPS] if by == "epochs" else module.steps
        assert_near(module.state_dict(), average_of(steps, [0.8] * len(steps)))
    else:
        assert_same(snapshot(module), snapshot(Network()))


def test_a_trainer_that_goes_on_counts_on(tmp_path: Path) -> None:
    callback = ours.EMAWeightAveraging(decay=0.8)
    module = Network()
    run = trainer(tmp_path, callback, max_epochs=2)
    run.fit(module, loader(), loader(1))
    run.fit_loop.max_epochs = 4
    run.fit(module, loader(), loader(1))
    assert callback._average_model is not None
    assert callback._average_model.n_averaged == 2 * STEPS
    assert_near(module.state_dict(), average_of(module.steps[2 * STEPS :], [0.8] * 2 * STEPS))


class Growing(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, idx: int) -> None:
        if trainer.global_step == 3:
            pl_module.register_parameter("late", torch.nn.Parameter(torch.zeros(2)))


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="'late'"):
        fitted(tmp_path, ours.EMAWeightAveraging(decay=0.8), Growing())


# -- being one of theirs --------------------------------------------------------------------------


def test_they_are_lightnings() -> None:
    for name in ("WeightAveraging", "EMAWeightAveraging"):
        callback = getattr(ours, name)()
        assert isinstance(callback, getattr(peer, name))
        assert isinstance(callback, peer.WeightAveraging)
        assert callback.state_key == getattr(peer, name)().state_key
        assert "latest_update_step" in callback.state_dict()
    assert issubclass(ours.EMAWeightAveraging, ours.WeightAveraging)
    callback = ours.EMAWeightAveraging(
        decay=0.5, update_every_n_steps=2, update_starting_at_step=3, update_starting_at_epoch=4
    )
    theirs = peer.EMAWeightAveraging(
        decay=0.5, update_every_n_steps=2, update_starting_at_step=3, update_starting_at_epoch=4
    )
    for index in range(9):
        for given in ({"step_idx": index}, {"epoch_idx": index}):
            assert callback.should_update(**given) is theirs.should_update(**given)
    callback.load_state_dict({"latest_update_step": 7})  # theirs
    found = callback.state_dict()
    assert (found["latest_update_step"], found["latest_update_epoch"]) == (7, -1)


def test_copies(tmp_path: Path) -> None:
    callback = ours.EMAWeightAveraging(decay=0.8)
    sent = pickle.loads(pickle.dumps(callback))
    module = fitted(tmp_path, callback)
    assert_same(snapshot(fitted(tmp_path, sent)), snapshot(module))
    duplicate = copy.deepcopy(callback)
    assert duplicate._average_model is not callback._average_model
    assert_same(snapshot(fitted(tmp_path, duplicate)), snapshot(module))


class Late(Network):
    """Makes a layer when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        del self.second

    def configure_model(self) -> None:
        if not hasattr(self, "second"):
            torch.manual_seed(6)
            self.second = torch.nn.Linear(3, 3)


def test_layers_that_are_made_late_are_averaged(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="calls configure_model"):
        module = fitted(tmp_path, ours.EMAWeightAveraging(decay=0.8), module=Late())
    assert "second.weight" in module.steps[0]
    assert_near(module.state_dict(), average_of(module.steps, [0.8] * STEPS * EPOCHS))


def test_outside_fit_a_checkpoint_has_the_model(tmp_path: Path) -> None:
    module = Network()
    run = trainer(tmp_path, ours.EMAWeightAveraging())
    run.validate(module, loader(1), verbose=False)
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert_same(saved["state_dict"], snapshot(module))
    assert "averaging_state" not in saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"decay": decay}, "decay") for decay in (-0.1, 1.5, float("nan"))],
        (
            {"decay": fastema.rules.warmup(0.99)},
            r"decay=Warmup.*expected a number.*fastema\.EMA takes",
        ),
        *[
            ({name: swa_utils.get_ema_avg_fn()}, rf"use WeightAveraging\({name}=\.\.\.\)")
            for name in ("avg_fn", "multi_avg_fn")
        ],
    ],
)
def test_wrong_decays_and_functions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ours.EMAWeightAveraging(**options)


DISTRIBUTED = """
    import warnings
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from fastema.compat.lightning import EMAWeightAveraging

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)
            self.seen = []
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)
        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()
        def validation_step(self, batch, batch_idx):
            self.seen.append(self.layer.weight.detach().clone())
        def on_train_end(self):
            both = self.all_gather(torch.stack([*self.seen, self.layer.weight.detach()]))
            assert torch.equal(both[0], both[1]) and torch.equal(both[0][-1], both[0][-2])
            assert not torch.equal(both[0][0], both[0][-1])
            if self.global_rank == 0:
                print("equal")

    if __name__ == "__main__":
        data = DataLoader(TensorDataset(torch.linspace(-1, 1, 48).reshape(16, 3).sin()), 2)
        trainer = pl.Trainer(
            callbacks=[EMAWeightAveraging(decay=0.5)], accelerator="cpu", devices=2,
            strategy="ddp_fork", logger=False, max_epochs=2, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(Module(), data, data)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_keep_one_average(python: Any) -> None:
    assert "equal" in python(DISTRIBUTED, quiet=False)


@pytest.mark.slow
def test_it_works_with_both_packages(python: Any) -> None:
    require_packages("pytorch_lightning")
    script = """
        import warnings
        warnings.simplefilter("ignore")
        import pytorch_lightning as pl
        import torch
        from fastema.compat.lightning import EMAWeightAveraging
        import lightning.pytorch
        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.layer = torch.nn.Linear(2, 1)
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)
            def training_step(self, batch, batch_idx):
                return self.layer(batch).square().mean()
            def validation_step(self, batch, batch_idx):
                self.log("val_loss", self.layer(batch).square().mean())
        found = []
        for kind in (EMAWeightAveraging, pl.callbacks.EMAWeightAveraging):
            callback = kind(decay=0.5)
            assert isinstance(callback, pl.callbacks.EMAWeightAveraging)
            if kind is EMAWeightAveraging:
                assert isinstance(callback, lightning.pytorch.callbacks.EMAWeightAveraging)
            module = Module()
            trainer = pl.Trainer(
                max_epochs=2, callbacks=[callback], accelerator="cpu", logger=False,
                enable_progress_bar=False, enable_checkpointing=False,
            )
            data = torch.utils.data.DataLoader(torch.linspace(0, 1, 16).reshape(8, 2))
            trainer.fit(module, data, data)
            found.append(module.layer.weight.tolist())
        assert torch.allclose(*map(torch.tensor, found), rtol=1e-6), found
        print("equal")
    """
    assert "equal" in python(script, quiet=False)


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy"])
def test_strategies_that_divide_weights_are_refused(name: str) -> None:
    class Given:
        strategy = object.__new__(getattr(pl.strategies, name))
        callbacks: ClassVar[list[Any]] = []

    with pytest.raises(ArgumentError, match=rf"{name} divides the weights.*fastema\.EMA"):
        ours.EMAWeightAveraging().setup(Given(), Network(), "fit")


@pytest.mark.slow
def test_it_works_with_an_older_lightning_and_with_one_alone(python: Any) -> None:
    script = """
        import sys, warnings
        warnings.simplefilter("ignore")
        sys.modules["pytorch_lightning"] = None
        import lightning.pytorch as pl
        import torch
        del pl.callbacks.WeightAveraging, pl.callbacks.EMAWeightAveraging
        from fastema.compat.lightning import EMAWeightAveraging
        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.layer = torch.nn.Linear(2, 1)
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)
            def training_step(self, batch, batch_idx):
                return self.layer(batch).square().mean()
            def on_train_batch_end(self, *args):
                self.latest = self.layer.weight.tolist()
        module = Module()
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[EMAWeightAveraging(decay=0.5)], accelerator="cpu",
            logger=False, enable_progress_bar=False, enable_checkpointing=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.linspace(0, 1, 8).reshape(4, 2)))
        assert module.layer.weight.tolist() != module.latest
        print("averaged")
    """
    assert "averaged" in python(script, quiet=False)
