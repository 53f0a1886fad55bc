"""An average in training, and what it has to be, for every class of a peer."""

from typing import Any

import torch
from torch import nn

from ..support.peers import PEERS, Peer
from .network import Truth, numbers, trained


def first_schedule(peer: Peer) -> dict[str, Any]:
    return next(iter(peer.schedules.values()))


class Run:
    """An average of a model in training, and the reference beside it."""

    def __init__(
        self, name: str, model: nn.Module, options: dict[str, Any] | None = None, of: str = "ours"
    ) -> None:
        self.peer, self.model = PEERS[name], model
        self.options = first_schedule(self.peer) if options is None else options
        self.average = self.build(of)
        self.refer()
        self.generator, self.n = numbers(4), 0

    def build(self, of: str = "ours", model: nn.Module | None = None) -> Any:
        return self.peer.make(
            self.peer.module(of), self.model if model is None else model, **self.options
        )

    def refer(self) -> None:
        """Let the reference start from the averages of now."""
        averaged = self.peer.averaged
        self.truth = Truth(
            self.averages(), self.model, lambda name, one: averaged(name, one) and name != "cache"
        )

    def averages(self) -> dict[str, torch.Tensor]:
        return self.peer.averages(self.average, self.model)

    def train(self, steps: int, *others: Any, given: nn.Module | None = None) -> None:
        """Train, and update this average and others."""
        for _ in range(steps):
            trained(self.model, self.generator)
            self.truth.step(self.model, self.peer.weight(self.n, **self.options))
            for average in (self.average, *others):
                self.peer.update(average, self.model if given is None else given, self.n)
            self.n += 1

    def check(self, average: Any = None) -> None:
        checked = self.average if average is None else average
        self.truth.check(self.peer.averages(checked, self.model), self.model)
