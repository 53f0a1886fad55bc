"""A network that notes what it is evaluated with, and a callback that notes its weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from ..support.torch_states import State, snapshot

DECAY, STEPS = 0.8, 12  # two epochs of six
FILE = "ema.safetensors"
EVERY_FOUR: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}


class Network(torch.nn.Module):
    """Notes its weights in each evaluation, and the loss of each training step."""

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


class At(TrainerCallback):
    """Calls a function at an event, with the state and the control of the run."""

    def __init__(self, event: str, call: Callable[[Any, Any], object]) -> None:
        def called(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            call(state, control)

        setattr(self, event, called)


class Noting(TrainerCallback):
    """Keeps the weights as they are at events."""

    def __init__(self) -> None:
        self.begun: State = {}
        self.steps: list[State] = []
        self.seen: list[tuple[str, State]] = []
        for event in ("evaluate", "predict", "prediction_step"):
            setattr(self, f"on_{event}", partial(self._see, event))

    def on_train_begin(self, *_: Any, model: Any, **kwargs: Any) -> None:
        self.begun = snapshot(model)

    def on_step_end(self, *_: Any, model: Any, **kwargs: Any) -> None:
        self.steps.append(snapshot(model))

    def _see(self, event: str, *_: Any, model: Any, **kwargs: Any) -> None:
        self.seen.append((event, snapshot(model)))

    def average(self, upto: int | None = None) -> State:
        """Of the steps so far, as `average_of` computes it."""
        return average_of(self.begun, self.steps[:upto])


def average_of(begun: State, steps: list[State], decay: float = DECAY) -> State:
    """In float64; buffers are those of the last step."""
    found = {name: value.double() for name, value in begun.items()}
    for step in steps:
        for name, value in step.items():
            if "running" in name or "num_batches" in name:
                found[name] = value
            else:
                found[name] = decay * found[name] + (1 - decay) * value.double()
    return found


def average_in(folder: Path) -> State:
    """The averaged tensors beside a checkpoint, by the names that the model has."""
    found = load_file(folder / FILE)
    return {
        name.removeprefix("shadow.0."): value for name, value in found.items() if name != "state"
    }
