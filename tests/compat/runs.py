"""A training run with an average and its reference, for every class of a peer."""

from typing import Any

import torch
from torch import nn

from ..support.peers import PEERS, Peer
from .network import Truth, make_generator, randomize


def first_schedule(peer: Peer) -> dict[str, Any]:
    return next(iter(peer.schedules.values()))


class Run:
    """A model in training with its average and a reference average."""

    def __init__(
        self, name: str, model: nn.Module, options: dict[str, Any] | None = None, side: str = "ours"
    ) -> None:
        self.peer, self.model = PEERS[name], model
        self.options = first_schedule(self.peer) if options is None else options
        self.average = self.build(side)
        self.restart_reference()
        self.generator, self.n = make_generator(4), 0

    def build(self, side: str = "ours", model: nn.Module | None = None) -> Any:
        return self.peer.make(
            self.peer.module(side), self.model if model is None else model, **self.options
        )

    def restart_reference(self) -> None:
        """Restart the reference from the current averages."""
        averaged = self.peer.averaged
        self.truth = Truth(
            self.averages(), self.model, lambda name, one: averaged(name, one) and name != "cache"
        )

    def averages(self) -> dict[str, torch.Tensor]:
        return self.peer.averages(self.average, self.model)

    def train(self, steps: int, *others: Any, wrapped: nn.Module | None = None) -> None:
        """Train, updating this run's average, the reference and other averages."""
        for _ in range(steps):
            randomize(self.model, self.generator)
            self.truth.step(self.model, self.peer.weight(self.n, **self.options))
            for average in (self.average, *others):
                self.peer.update(average, self.model if wrapped is None else wrapped, self.n)
            self.n += 1

    def check(self, average: Any = None) -> None:
        checked = self.average if average is None else average
        self.truth.check(self.peer.averages(checked, self.model), self.model)
