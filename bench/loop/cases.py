"""The cases of the training loop: network, dtypes, threads and rounds. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from bench.race.cases import MIXES

FEATURES = 64
"""Width of a network's input."""


@dataclass(frozen=True)
class Case:
    """A loop that trains one network, in one mix of dtypes and with one number of threads.

    Parameters
    ----------
    width, depth
        Width of the hidden layers, and how many of them have ``width * width`` weights.
    mix
        One of `bench.race.cases.MIXES`: dtypes of the model and of the average.
    threads
        Threads of PyTorch; fastema uses as many.
    rounds
        Timed rounds, as far as `budget_s` permits.
    budget_s
        Time in seconds after which no new round begins.
    """

    width: int
    depth: int
    mix: str
    threads: int
    rounds: int
    budget_s: float

    @property
    def name(self) -> str:
        return f"{self.mix}:{self.threads}-thread{'s' * (self.threads > 1)}:{self.size}"

    @property
    def title(self) -> str:
        """Title of the table of this mix and number of threads."""
        weights, average = self.mix.split("/")
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{weights} model, {average} average, {threads}"

    @property
    def size(self) -> str:
        """Number of weights in millions, to three digits or two places."""
        millions = self.n_elements / 1e6
        return f"{millions:.2f} M" if millions < 10 else f"{millions:.3g} M"

    @property
    def n_elements(self) -> int:
        layer = self.width * (self.width + 1)
        return (FEATURES + 1) * self.width + self.depth * layer + self.width + 1

    @property
    def n_tensors(self) -> int:
        return 2 * (self.depth + 2)


_NETWORKS = {
    (256, 1): 400,
    (256, 8): 200,
    (1000, 1): 160,
    (1700, 1): 80,
    (1700, 4): 30,
    (2500, 4): 16,
    (5000, 4): 5,
}
"""Width and depth -> rounds: 0.08 to 100 million weights."""

_THREADS = (1, 2)

FULL = [
    Case(width, depth, mix, threads, rounds, budget_s=8.0)
    for mix in MIXES
    for threads in _THREADS
    for (width, depth), rounds in _NETWORKS.items()
]

QUICK = [
    Case(width, depth, mix, threads, rounds, budget_s=1.5)
    for mix in ("f32/f32", "bf16/bf16")
    for threads in _THREADS
    for (width, depth), rounds in {(256, 1): 200, (1000, 1): 80, (1700, 4): 10}.items()
]


def select(quick: bool, names: list[str]) -> list[Case]:
    """Return the cases of a run: all, or those that have one of these names.

    A name is a case's whole name or one of its parts between colons.
    """
    cases = QUICK if quick else FULL
    return [
        case
        for case in cases
        if not names or not {case.name, *case.name.split(":")}.isdisjoint(names)
    ]
