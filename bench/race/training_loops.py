"""Training loops as people write them, each with a peer's average and with ours in its place.

A loop trains its weights once. Both averages are updated from them and take turns at going first.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastema
from bench.race.contest import Job
from fastema.cli.clock import SETTLE_S
from fastema.cli.clock import seconds as seconds_of

THEIRS, OURS = "peer", "install()"
STEP = "step"
DECAY = 0.99

Seconds = dict[str, list[float]]


class LoopAverage(NamedTuple):
    """The calls that a script makes to its average.

    Attributes
    ----------
    update
        Updates the average; called after every step.
    tensors
        Returns the averaged weights, in the order of the model's parameters.
    evaluate
        Puts the average into the model and restores the weights. None if the script evaluates a
        separate model that holds the average.
    """

    update: Job
    tensors: Callable[[], Sequence[Tensor]]
    evaluate: Job | None = None


class Loop(ABC):
    """A script: a model, a step of training, and the lines that make an average.

    Attributes
    ----------
    peer
        Argument for :func:`fastema.compat.install`; empty if there is no peer to replace.
    """

    peer: ClassVar[str] = ""

    def __init__(self, quick: bool) -> None:
        torch.manual_seed(0)
        self.model = self.make_model(quick)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.averages: dict[str, LoopAverage] = {}

    @abstractmethod
    def make_model(self, quick: bool) -> nn.Module:
        """Return the model to train."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Return the loss of one batch."""

    @abstractmethod
    def make_average(self) -> LoopAverage:
        """Run the script's own lines, whose imports yield the peer's class or ours."""

    def build(self, which: str) -> LoopAverage:
        """Build and register an average with the peer's classes or with ours."""
        if which == OURS and self.peer:
            with fastema.compat.install(self.peer):
                self.averages[which] = self.make_average()
        else:
            self.averages[which] = self.make_average()
        return self.averages[which]

    def run(self, steps: int) -> Seconds:
        """Train, and return the times of the steps and of each built average's updates."""
        seconds: Seconds = {name: [] for name in (STEP, *self.averages)}
        for number in range(steps):
            seconds[STEP].append(seconds_of(self._step))
            names = list(self.averages)
            for name in reversed(names) if number % 2 else names:
                time.sleep(SETTLE_S)  # see fastema.cli.clock.SETTLE_S
                seconds[name].append(seconds_of(self.averages[name].update))
        return seconds

    def _step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


# -- timm ------------------------------------------------------------------------------------------


class Timm(Loop):
    """A classifier, averaged as in timm's training script."""

    peer = "timm"
    name = "resnet50"

    def make_model(self, quick: bool) -> nn.Module:
        from bench.race.without_torchvision import stand_in

        stand_in()
        import timm

        self.x, self.y = torch.randn(4, 3, 64, 64), torch.randint(100, (4,))
        model: nn.Module = timm.create_model("resnet18" if quick else self.name, num_classes=100)
        return model

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.x), self.y)

    def make_average(self) -> LoopAverage:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(self.model, decay=DECAY)
        return LoopAverage(lambda: ema.update(self.model), lambda: list(ema.module.parameters()))


class TimmSmall(Timm):
    """MobileNetV3: a fifth of ResNet-50's weights in about as many tensors."""

    name = "mobilenetv3_large_100"


# -- diffusers -------------------------------------------------------------------------------------


class Diffusers(Loop):
    """A denoiser, averaged as in the training scripts of diffusers."""

    peer = "diffusers"
    dtype = torch.float32

    def make_model(self, quick: bool) -> nn.Module:
        from diffusers import UNet2DModel

        width = 32 if quick else 128
        down, up = "DownBlock2D", "UpBlock2D"
        self.x = torch.randn(1, 3, 32, 32, dtype=self.dtype)
        model: nn.Module = UNet2DModel(
            sample_size=32,
            block_out_channels=(width, 2 * width, 2 * width, 2 * width),
            down_block_types=(down, "AttnDownBlock2D", down, down),
            up_block_types=(up, up, "AttnUpBlock2D", up),
        ).to(self.dtype)
        return model

    def loss(self) -> Tensor:
        predicted: Tensor = self.model(self.x, 17).sample
        return (predicted - self.x).square().mean()

    def make_average(self) -> LoopAverage:
        from diffusers.training_utils import EMAModel

        model = self.model
        # Setting both bounds of the peer's schedule keeps the decay constant.
        ema = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY)
        ema.to(dtype=torch.float32)

        def evaluate() -> None:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            ema.restore(model.parameters())

        return LoopAverage(
            lambda: ema.step(model.parameters()), lambda: list(ema.shadow_params), evaluate
        )


class DiffusersHalf(Diffusers):
    """The denoiser with bfloat16 weights and a float32 average."""

    dtype = torch.bfloat16


# -- language models -------------------------------------------------------------------------------


class Language(Loop):
    """GPT-2 with 8 layers of width 384: 34 million weights, tied input and output embeddings."""

    def make_model(self, quick: bool) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        self.tokens = torch.randint(2_000, (2, 32))
        layers, width, words = (2, 64, 2_000) if quick else (8, 384, 50_257)
        model: nn.Module = GPT2LMHeadModel(
            GPT2Config(vocab_size=words, n_embd=width, n_layer=layers, n_head=4)
        )
        return model

    def loss(self) -> Tensor:
        loss: Tensor = self.model(self.tokens, labels=self.tokens).loss
        return loss


class TorchEma(Language):
    """GPT-2, averaged by torch_ema."""

    peer = "torch_ema"

    def make_average(self) -> LoopAverage:
        from torch_ema import ExponentialMovingAverage

        model = self.model
        ema = ExponentialMovingAverage(model.parameters(), decay=DECAY, use_num_updates=False)

        def evaluate() -> None:
            with ema.average_parameters():
                pass

        return LoopAverage(ema.update, lambda: list(ema.shadow_params), evaluate)


class EmaPytorch(Language):
    """GPT-2, averaged by ema_pytorch."""

    peer = "ema_pytorch"

    def make_average(self) -> LoopAverage:
        from ema_pytorch import EMA

        options = {"update_every": 1, "update_after_step": 0, "min_value": DECAY}
        ema = EMA(self.model, beta=DECAY, include_online_model=False, **options)
        return LoopAverage(ema.update, lambda: list(ema.ema_model.parameters()))


class TorchAveraged(Language):
    """GPT-2, averaged by torch's `AveragedModel`."""

    peer = "swa_utils"

    def make_average(self) -> LoopAverage:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        return LoopAverage(
            lambda: averaged.update_parameters(self.model),
            lambda: list(averaged.module.parameters()),
        )


# -- trainers --------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


class _TrainerLoop(Language):
    """A loop in which a trainer calls the averages; its callbacks time them."""

    @abstractmethod
    def fit(self, steps: int, note: Callable[[str, float], None]) -> None:
        """Train with the trainer, and call ``note(name, seconds)`` for each step and update."""

    def run(self, steps: int) -> Seconds:
        seconds: Seconds = {name: [] for name in (STEP, *self.averages)}
        with _quiet():
            self.fit(steps, lambda name, one: seconds[name].append(one))
        return seconds


class Lightning(_TrainerLoop):
    """GPT-2 in Lightning's trainer, averaged by Lightning's callback."""

    peer = "lightning"

    def make_average(self) -> LoopAverage:
        from lightning.pytorch.callbacks import EMAWeightAveraging

        callback = EMAWeightAveraging(decay=DECAY)

        def tensors() -> list[Tensor]:
            return list(callback._average_model.module.parameters())

        return LoopAverage(lambda: callback, tensors)

    def fit(self, steps: int, note: Callable[[str, float], None]) -> None:
        import lightning.pytorch as pl
        from torch.utils.data import DataLoader

        loop = self

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.inner = loop.model

            def training_step(self, batch: Tensor, index: int) -> Tensor:
                self.began = time.perf_counter()
                return loop.loss()

            def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
                spent = time.perf_counter() - self.began
                note(STEP, spent - sum(self.averaging))
                self.averaging.clear()

            averaging: ClassVar[list[float]] = []

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), 1e-3)

        callbacks: dict[str, Any] = {n: average.update() for n, average in self.averages.items()}

        class Both(pl.Callback):
            """One callback that calls both: a trainer with two averaging callbacks raises."""

            def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
                for callback in callbacks.values():
                    callback.setup(trainer, pl_module, stage)

            def on_train_start(self, *args: Any) -> None:
                for callback in callbacks.values():
                    callback.on_train_start(*args)

            def on_train_batch_end(self, *args: Any) -> None:
                for name, callback in callbacks.items():
                    time.sleep(SETTLE_S)
                    spent = seconds_of(partial(callback.on_train_batch_end, *args))
                    note(name, spent)
                    Module.averaging.append(spent + SETTLE_S)

        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[Both()],
            enable_model_summary=False,
            **options,
        )
        trainer.fit(Module(), DataLoader(torch.arange(steps), batch_size=1))


class Transformers(_TrainerLoop):
    """GPT-2 in transformers' Trainer, which has no average: a handwritten callback, and ours."""

    def build(self, which: str) -> LoopAverage:
        if which != OURS:
            return super().build(which)
        from fastema.transformers import EMACallback

        callback = EMACallback(DECAY, at_end="raw")
        average = LoopAverage(lambda: callback, lambda: list(callback.ema.shadow.values()))
        self.averages[which] = average
        return average

    def make_average(self) -> LoopAverage:
        from transformers import TrainerCallback

        model = self.model
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        averaged.update_parameters(model)  # the first call only copies

        class Averaging(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                averaged.update_parameters(model)

        callback = Averaging()
        return LoopAverage(lambda: callback, lambda: list(averaged.module.parameters()))

    def fit(self, steps: int, note: Callable[[str, float], None]) -> None:
        import tempfile

        from transformers import Trainer, TrainingArguments

        callbacks = []
        averaging: list[float] = []
        for name, average in self.averages.items():
            callback: Any = average.update()
            inner = callback.on_step_end

            def hook(*args: Any, name: str = name, inner: Any = inner, **kwargs: Any) -> None:
                time.sleep(SETTLE_S)
                spent = seconds_of(lambda: inner(*args, **kwargs))
                note(name, spent)
                averaging.append(spent + SETTLE_S)

            callback.on_step_end = hook
            callbacks.append(callback)
        rows = [{"input_ids": row, "labels": row} for row in self.tokens.repeat(steps, 1)]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=2,
                report_to=[],
                learning_rate=1e-3,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
            )
            trainer = Trainer(self.model, arguments, train_dataset=rows, callbacks=callbacks)
            for callback in callbacks:
                if hasattr(callback, "attach"):
                    callback.attach(trainer)
            spent = seconds_of(trainer.train)
        note(STEP, (spent - sum(averaging)) / steps)


LOOPS: dict[str, type[Loop]] = {
    "timm ModelEmaV3, ResNet-50": Timm,
    "timm ModelEmaV3, MobileNetV3": TimmSmall,
    "diffusers EMAModel, UNet": Diffusers,
    "diffusers EMAModel, bf16 UNet": DiffusersHalf,
    "torch_ema, GPT-2": TorchEma,
    "ema_pytorch EMA, GPT-2": EmaPytorch,
    "torch AveragedModel, GPT-2": TorchAveraged,
    "Lightning EMAWeightAveraging, GPT-2": Lightning,
    "transformers Trainer, GPT-2": Transformers,
}
