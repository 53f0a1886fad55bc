"""Race the updates of all contestants in one training loop, each right after an optimizer's step.

A training step reads and writes the weights, their gradients and the optimizer's state, and leaves
the average in no cache. It also leaves PyTorch's threads spinning. An update that is timed by
itself, over and over, sees neither.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn

from bench.loop.cases import FEATURES, Case
from bench.race.checks import sample
from bench.race.flat_module import DTYPES
from bench.race.jobs import DECAY, check_update
from bench.race.peers import OURS, PEERS, Peer
from fastema.cli.clock import interleave, seconds

FOREACH = "foreach"

CONTESTANTS = {
    OURS: (OURS,),
    FOREACH: ("torch._foreach_lerp_", "torch._foreach_lerp_, casts"),
    "AveragedModel": ("AveragedModel multi_avg_fn",),
    "torch_ema": ("torch_ema",),
}
"""Head of a column -> names in `bench.race.peers.PEERS`; the one that runs a mix takes part."""

BATCH = 16
HOT_CALLS = 5
HOT_ROUNDS = 20
HOT_BUDGET_S = 0.5


@dataclass(frozen=True)
class Timings:
    """Durations of one contestant's updates, in seconds, one per round.

    `loop` is taken after training steps, `hot` in repeated calls with nothing in between.
    """

    loop: list[float]
    hot: list[float]


def contestants(mix: str) -> dict[str, Peer]:
    """Return the installed peers that run a mix of dtypes, by column."""
    return {
        column: peer
        for column, names in CONTESTANTS.items()
        for peer in PEERS
        if peer.name in names and _refusal(peer, mix) is None
    }


def absences(mix: str) -> dict[str, str]:
    """Return why no peer of a column runs a mix of dtypes: column -> reason."""
    present = contestants(mix)
    return {
        column: _refusal(peer, mix) or ""
        for column, names in CONTESTANTS.items()
        for peer in PEERS
        if peer.name in names and column not in present
    }


def _refusal(peer: Peer, mix: str) -> str | None:
    if mix in peer.refusals:
        return peer.refusals[mix].reason
    return peer.missing()


class TrainingLoop:
    """A multilayer perceptron in training: Adam in float32, SGD in bfloat16."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        dtype = DTYPES[case.mix.split("/")[0]]
        layers: list[nn.Module] = [nn.Linear(FEATURES, case.width), nn.ReLU()]
        for _ in range(case.depth):
            layers += [nn.Linear(case.width, case.width), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Linear(case.width, 1)).to(dtype)
        self.batch = torch.randn(BATCH, FEATURES).to(dtype)
        parameters = self.model.parameters()
        self.optimizer = (
            torch.optim.Adam(parameters, 1e-4, foreach=True)
            if dtype == torch.float32
            else torch.optim.SGD(parameters, 1e-4)
        )

    def step(self) -> None:
        """Run forward, backward and the optimizer's step, and drop the gradients."""
        self.model(self.batch).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def _negate(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.neg_()


def prepare(case: Case, model: nn.Module) -> dict[str, Callable[[], object]]:
    """Set up the contestants on a model and verify each one's first update of opposite weights.

    Returns
    -------
    dict
        Column -> one update.

    Raises
    ------
    AssertionError
        If a result differs from the float64 reference.
    """
    peers = contestants(case.mix)
    average_dtype = DTYPES[case.mix.split("/")[1]]
    running = {name: peer.setup(model, DECAY, average_dtype) for name, peer in peers.items()}
    before = [sample(parameter) for parameter in model.parameters()]
    _negate(model)
    for name, peer in peers.items():
        try:
            check_update(peer, running[name], model, before)
        except AssertionError as error:
            raise AssertionError(f"{case.name}, {name}: {error}") from error
    _negate(model)
    return {name: calls.update for name, calls in running.items()}


def race(case: Case) -> dict[str, Timings]:
    """Train, and time one contestant's update after each step, A B C A B C ...

    Then time repeated calls. PyTorch's number of threads is restored.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        return _race(case)
    finally:
        torch.set_num_threads(before)
        gc.collect()


def _race(case: Case) -> dict[str, Timings]:
    training = TrainingLoop(case)
    updates = prepare(case, training.model)

    def after_step(name: str, update: Callable[[], object]) -> float:
        training.step()
        return seconds(update)

    def repeated(name: str, update: Callable[[], object]) -> float:
        began = perf_counter()
        for _ in range(HOT_CALLS):
            update()
        return (perf_counter() - began) / HOT_CALLS

    training.step()  # allocates the optimizer's state
    # No pause: in a training loop nothing waits for other threads either.
    loop = interleave(
        updates, case.rounds, budget_s=case.budget_s, settle_s=0.0, time_of=after_step
    )
    hot = interleave(
        updates, HOT_ROUNDS, hot=True, budget_s=HOT_BUDGET_S, settle_s=0.0, time_of=repeated
    )
    return {name: Timings(loop[name], hot[name]) for name in updates}
