"""A network and a callback that record the weights in evaluation and in training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ..support.torch_states import State, snapshot

DECAY, STEPS = 0.8, 12  # two epochs of six
FILE, TRAINING = "ema.safetensors", "training_weights.safetensors"
EVERY_FOUR: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}


class Network(torch.nn.Module):
    """Record the weights of each forward pass in evaluation, and the loss of each training step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.second = torch.nn.Linear(4, 1)
        self.evaluated: list[State] = []
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.training:
            self.evaluated.append(snapshot(self))
        found = self.second(torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype)))))
        loss = (found - labels).square().mean()
        if self.training:
            self.losses.append(loss.item())
        return {"loss": loss, "logits": found}


class CallAt(TrainerCallback):
    """Call a function at an event, with the run's state and control."""

    def __init__(self, event: str, call: Callable[[Any, Any], object]) -> None:
        def called(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            call(state, control)

        setattr(self, event, called)


class Recorder(TrainerCallback):
    """Record the weights at events."""

    def __init__(self) -> None:
        self.start: State = {}
        self.steps: list[State] = []
        self.seen: list[tuple[str, State]] = []
        for event in ("evaluate", "predict", "prediction_step"):
            setattr(self, f"on_{event}", partial(self._record, event))

    def on_train_begin(self, *_: Any, model: Any, **kwargs: Any) -> None:
        self.start = snapshot(model)

    def on_step_end(self, *_: Any, model: Any, **kwargs: Any) -> None:
        self.steps.append(snapshot(model))

    def _record(self, event: str, *_: Any, model: Any, **kwargs: Any) -> None:
        self.seen.append((event, snapshot(model)))

    def average(self, upto: int | None = None) -> State:
        """Return the average of the recorded steps, up to ``upto``."""
        return average_of(self.start, self.steps[:upto])


def average_of(start: State, steps: list[State], decay: float = DECAY) -> State:
    """Average steps in float64; buffers come from the last step."""
    found = {name: value.double() for name, value in start.items()}
    for step in steps:
        for name, value in step.items():
            if "running" in name or "num_batches" in name:
                found[name] = value
            else:
                found[name] = decay * found[name] + (1 - decay) * value.double()
    return found


def average_in(folder: Path) -> State:
    """Return the averages saved in a checkpoint folder, by the model's names."""
    found = load_file(folder / FILE)
    return {
        name.removeprefix("shadow.0."): value for name, value in found.items() if name != "fastema"
    }
