"""Real Lightning runs with its averaging callbacks and with ours, side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import weight_averaging as peer
from torch.optim import swa_utils

import fastema
import fastema.compat.swa_utils
from fastema.compat import lightning as ours

from ..support.requirements import require_packages
from ..support.torch_states import assert_same, snapshot
from .lightning_case import (
    EPOCHS,
    MARKS,
    STEPS,
    Alternating,
    Network,
    assert_near,
    average_of,
    differ,
    fit_network,
)

pytestmark = MARKS

COUNT = STEPS * EPOCHS


CONFIGURATIONS: dict[str, Callable[[Any], Any]] = {
    "mean": lambda of: of.WeightAveraging(),
    "mean, buffers copied": lambda of: of.WeightAveraging(use_buffers=False),
    "torch's avg_fn": lambda of: of.WeightAveraging(avg_fn=swa_utils.get_ema_avg_fn(0.7)),
    "our multi_avg_fn": lambda of: of.WeightAveraging("cpu", True, multi_avg_fn=OUR_FUNCTION),
    "own avg_fn": lambda of: of.WeightAveraging(avg_fn=lambda avg, x, n: avg + (x - avg) / (n + 2)),
    "ema": lambda of: of.EMAWeightAveraging(decay=0.8),
    "ema, accumulated": lambda of: of.EMAWeightAveraging(decay=0.8),
    "ema, defaults": lambda of: of.EMAWeightAveraging(),
    "ema, by place": lambda of: of.EMAWeightAveraging(None, False, 0.6, 1, 2, None),
    "ema, from a step on": lambda of: of.EMAWeightAveraging(decay=0.8, update_starting_at_step=4),
    "ema, epochs alone": lambda of: of.EMAWeightAveraging(
        decay=0.5, update_every_n_steps=0, update_starting_at_epoch=1
    ),
    "ema, both": lambda of: of.EMAWeightAveraging(decay=0.7, update_starting_at_epoch=2),
}
OUR_FUNCTION = fastema.compat.swa_utils.get_ema_multi_avg_fn(0.7)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_averages_and_state_match_lightning(tmp_path: Path, configuration: str) -> None:
    """Accumulated batches count as one optimizer step, and so does the rest of an epoch."""
    accumulated = 3 if configuration == "ema, accumulated" else 1
    theirs, mine = (CONFIGURATIONS[configuration](library) for library in (peer, ours))
    other, module = (
        fit_network(tmp_path, callback, accumulate_grad_batches=accumulated)
        for callback in (theirs, mine)
    )
    assert len(module.steps) == (2 * EPOCHS if accumulated == 3 else COUNT)
    for one, step in zip(module.steps, other.steps, strict=True):
        assert_near(one, step)
    assert_near(module.state_dict(), other.state_dict())
    assert differ(module.state_dict(), module.steps[-1])
    my_average, their_average = (one._average_model.state_dict() for one in (mine, theirs))
    assert my_average["n_averaged"] == their_average["n_averaged"]
    assert_near(my_average, their_average)
    assert mine.state_dict()["latest_update_step"] == theirs.state_dict()["latest_update_step"]
    # Theirs validates the initial weights until there is an average.
    begun = 0 if "epochs" not in configuration else 2
    for one, seen in zip(module.validated[begun:], other.validated[begun:], strict=True):
        assert_near(one, seen)


def test_evaluation_of_another_trainer_in_training_ends_nothing(tmp_path: Path) -> None:
    class Ending(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            average.teardown(trainer, pl_module, "validate")

    average = ours.EMAWeightAveraging(decay=0.8)
    module = fit_network(tmp_path, average, Ending())
    other = fit_network(tmp_path, ours.EMAWeightAveraging(decay=0.8))
    assert_same(snapshot(module), snapshot(other))
    for found, want in zip(module.validated, other.validated, strict=True):
        assert_same(found, want)


def test_decay_is_per_update_as_in_lightning(tmp_path: Path) -> None:
    theirs, mine = (
        fit_network(tmp_path, library.EMAWeightAveraging(decay=0.9, update_every_n_steps=4))
        for library in (peer, ours)
    )
    assert_near(mine.state_dict(), theirs.state_dict())
    decays = [0.9 if k % 4 == 0 else None for k in range(COUNT)]
    assert_near(mine.state_dict(), average_of(mine.steps, decays))


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
def test_alternating_optimizers_update_as_in_lightning(tmp_path: Path, every: int) -> None:
    def run(library: Any) -> Network:
        callback = library.EMAWeightAveraging(decay=0.8, update_every_n_steps=every)
        return fit_network(tmp_path, callback, module=Alternating())

    theirs, mine = run(peer), run(ours)
    assert len(mine.steps) == COUNT
    last = [(2 * k + 1) % every == 0 for k in range(COUNT)]
    assert any(last) is (every % 2 == 1)
    if any(last):
        assert_near(mine.state_dict(), theirs.state_dict())
        decays = [0.8 if fires else None for fires in last]
        assert_near(mine.state_dict(), average_of(mine.steps, decays))
    else:  # theirs ends with the initial weights
        assert_same(snapshot(theirs), snapshot(Network()))
        assert_same(snapshot(mine), mine.steps[-1])


MODULE = """
import warnings
warnings.simplefilter("ignore")
{imports}
import torch
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
        return self.layer(batch).square().mean()
    def validation_step(self, batch, batch_idx):
        self.seen.append(self.layer.weight.detach().clone())
        self.log("val_loss", self.layer(batch).square().mean())
    def on_train_batch_end(self, *args):
        self.latest = self.layer.weight.detach().clone()

def fitted(callback, module, *validated, **options):
    trainer = pl.Trainer(
        callbacks=[callback], accelerator="cpu", logger=False, max_epochs=2,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(module, DATA, *validated)
    return module.layer.weight.detach()

DATA = torch.utils.data.DataLoader(torch.linspace(-1, 1, 48).reshape(16, 3).sin(), 2)
"""

DISTRIBUTED = """
class Equal(Module):
    def on_train_end(self):
        both = self.all_gather(torch.stack([*self.seen, self.layer.weight.detach()]))
        assert torch.equal(both[0], both[1]) and torch.equal(both[0][-1], both[0][-2])
        assert not torch.equal(both[0][0], both[0][-1])
        if self.global_rank == 0:
            print("as wanted")

if __name__ == "__main__":
    fitted(EMAWeightAveraging(decay=0.5), Equal(), DATA, devices=2, strategy="ddp_fork")
"""

BOTH_PACKAGES = """
import lightning.pytorch
found = []
for kind in (EMAWeightAveraging, pl.callbacks.EMAWeightAveraging):
    callback = kind(decay=0.5)
    assert isinstance(callback, pl.callbacks.EMAWeightAveraging)
    if kind is EMAWeightAveraging:
        assert isinstance(callback, lightning.pytorch.callbacks.EMAWeightAveraging)
    found.append(fitted(callback, Module(), DATA))
assert torch.allclose(*found, rtol=1e-6), found
print("as wanted")
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_keep_one_average(python: Any) -> None:
    script = MODULE.format(imports="import lightning.pytorch as pl") + DISTRIBUTED
    assert "as wanted" in python(script, quiet=False)


@pytest.mark.slow
def test_callback_works_with_both_lightning_packages(python: Any) -> None:
    require_packages("pytorch_lightning")
    script = MODULE.format(imports="import pytorch_lightning as pl") + BOTH_PACKAGES
    assert "as wanted" in python(script, quiet=False)
