"""The training loop: plain PyTorch, and `fastema.EMA` as any script would use it.

The recipe is noisy: small batches and a learning rate that stays high. The weights jump around a
minimum in which they cannot settle, which is where averages help most.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastema
from fastema.cli.demo import data, models
from fastema.cli.demo.choices import Recipe

MOMENTUM = 0.9
EVALUATIONS_PER_EPOCH = 2
STEPS_PER_LIMIT = 4
THREADS = 1
"""Number of torch threads. Steps this small gain little from more threads and become ten times
slower if another process uses a core; and sums would depend on the number of threads."""


@dataclass(frozen=True)
class Score:
    """The scores of one set of weights on the test images."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # percent


@dataclass(frozen=True)
class Evaluation:
    """The scores of raw and averaged weights at one point of the training."""

    epoch: float  # passes over the data so far; a whole number is the end of an epoch
    raw: Score
    ema: Score


@dataclass(frozen=True)
class Times:
    """Wall-clock times of the training, without evaluations."""

    steps_s: list[float]  # batch, forward, backward, optimizer and EMA update
    updates_s: list[float]  # the EMA update alone, a part of the step
    limits_s: list[float]  # the yardstick, run between steps and not a part of them

    @property
    def step_s(self) -> float:
        """Median time of a step."""
        return statistics.median(self.steps_s)

    @property
    def update_s(self) -> float:
        """Median time of an EMA update."""
        return statistics.median(self.updates_s)

    @property
    def limit_s(self) -> float:
        """Median time of the yardstick."""
        return statistics.median(self.limits_s)


@dataclass
class History:
    """Everything recorded in a run, for the table, the summary and the picture."""

    evaluations: list[Evaluation] = field(default_factory=list)
    times: list[Times] = field(default_factory=list)  # one per epoch
    raw_answers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    ema_answers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def epoch_ends(self) -> list[Evaluation]:
        """The evaluations at the ends of epochs."""
        return [evaluation for evaluation in self.evaluations if evaluation.epoch.is_integer()]


@dataclass(frozen=True)
class Setup:
    """A recipe with its data and its newly initialized model."""

    recipe: Recipe
    digits: data.Digits
    model: nn.Module

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_tensors(self) -> int:
        """Number of parameter tensors."""
        return sum(1 for _ in self.model.parameters())


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Make torch reproducible on one machine; restore its settings on exit."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def prepare(recipe: Recipe) -> Setup:
    """Load the data and initialize the model from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = models.build(recipe.model)
    return Setup(recipe, data.load(recipe.seed), model)


def train(
    setup: Setup, yardstick: Callable[[], None], on_evaluation: Callable[[Evaluation], None]
) -> History:
    """Train the model in place, evaluating raw and averaged weights along the way.

    `yardstick` moves as many bytes as an EMA update. It is timed after every few updates, so that
    it finds caches and threads in the same state as the update does.
    """
    recipe, digits, model = setup.recipe, setup.digits, setup.model
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=MOMENTUM)
    ema = fastema.EMA(model, decay=fastema.rules.warmup(recipe.decay))
    history = History()

    steps = len(digits.labels) // recipe.batch_size  # per epoch
    parts = range(1, EVALUATIONS_PER_EPOCH + 1)
    pauses = {math.ceil(steps * part / EVALUATIONS_PER_EPOCH) for part in parts}
    for epoch in range(recipe.epochs):
        times = Times([], [], [])
        batches = data.batches(digits, recipe.batch_size, generator)
        for step in range(1, steps + 1):
            began = time.perf_counter()
            images, labels = next(batches)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trained = time.perf_counter()
            ema.update()
            averaged = time.perf_counter()

            times.steps_s.append(averaged - began)
            times.updates_s.append(averaged - trained)
            if step % STEPS_PER_LIMIT == 1:
                yardstick()
                times.limits_s.append(time.perf_counter() - averaged)
            if step in pauses:
                raw, _ = evaluate(model, digits)
                with ema.swapped():
                    averaged_score, _ = evaluate(model, digits)
                history.evaluations.append(Evaluation(epoch + step / steps, raw, averaged_score))
                on_evaluation(history.evaluations[-1])
        history.times.append(times)

    _, history.raw_answers = evaluate(model, digits)
    with ema.swapped():
        _, history.ema_answers = evaluate(model, digits)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, digits: data.Digits) -> tuple[Score, Tensor]:
    """Return the score of the model's current weights, and its answers, (test,) i64."""
    logits = model(digits.test_images)  # (test, classes)
    answers = logits.argmax(dim=1)
    loss = F.cross_entropy(logits, digits.test_labels)
    accuracy = 100.0 * (answers == digits.test_labels).double().mean()
    return Score(loss.item(), accuracy.item()), answers
