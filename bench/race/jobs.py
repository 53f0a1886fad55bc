"""Set up a case's jobs: named calls without arguments whose first results were verified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bench.race.cases import Case
from bench.race.checks import assert_averaged, assert_equal, sample
from bench.race.contest import Job
from bench.race.flat_module import DTYPES, FlatModule, build, randomise_
from bench.race.peers import PEERS, SWAPS, Peer, PeerCalls

DECAY = 0.9
"""Low enough that one update changes even a bf16 average, so the check before the race is
meaningful. The time of an update does not depend on the decay."""


def eligible_peers(case: Case) -> tuple[Peer, ...]:
    """Return the peers that can take part in the case: all, or for swaps those that swap."""
    return SWAPS if case.question == "swap" else PEERS


def refusals(case: Case) -> dict[str, str]:
    """Return the peers that do not take part in a case: name -> reason."""
    reasons = {}
    for peer in eligible_peers(case):
        if case.mix in peer.refusals:
            reasons[peer.name] = peer.refusals[case.mix].reason
        elif (missing := peer.missing()) is not None:
            reasons[peer.name] = missing
    return reasons


@contextmanager
def name_failures(case: Case, peer: str) -> Iterator[None]:
    """Prefix the message of an AssertionError in the block with the names of case and peer."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{case.name}, {peer}: {error}") from error


def check_update(peer: Peer, running: PeerCalls, model: nn.Module, before: list[Tensor]) -> None:
    """Update once from averages equal to ``before``; raise AssertionError on a wrong result."""
    running.update()
    assert_averaged(
        running.average(),
        before,
        list(model.parameters()),
        DECAY,
        rounds_weights=peer.rounds_weights,
        stochastic=peer.stochastic,
    )


def check_swap(running: PeerCalls, model: FlatModule, averages: list[Tensor]) -> None:
    """Swap and restore once; raise AssertionError if averages or weights end up wrong."""
    weights = [sample(p) for p in model.parameters()]
    running.apply()
    assert_equal(list(model.parameters()), averages)
    running.restore()
    assert_equal(list(model.parameters()), weights)
    assert_equal(running.average(), averages)


def make_swap_job(running: PeerCalls) -> Job:
    def job() -> None:
        running.apply()
        running.restore()

    return job


def prepare(case: Case, *, only: str | None = None, check: bool = True) -> dict[str, Job]:
    """Set up on one model the peers that take part in `case`, and return name -> call.

    Parameters
    ----------
    case
        The tensors, their dtypes and the operation.
    only
        Name of the only peer to set up; None sets up all.
    check
        Compare each peer's first result with the float64 reference.

    Raises
    ------
    AssertionError
        If a result is wrong; the message names case and peer.
    """
    model = build(case.inventory(), case.weight_dtype)
    out = refusals(case)
    peers = [p for p in eligible_peers(case) if p.name not in out and only in (None, p.name)]
    states = {peer: peer.setup(model, DECAY, DTYPES[case.average_dtype]) for peer in peers}
    # Set-up may have run updates, but the averages still equal these weights.
    before = [sample(p) for p in model.parameters()] if check else []
    randomise_(model, seed=1)
    jobs: dict[str, Job] = {}
    for peer, running in states.items():
        swaps = case.question == "swap"
        jobs[peer.name] = make_swap_job(running) if swaps else running.update
        if check:
            with name_failures(case, peer.name):
                if swaps:
                    check_swap(running, model, before)
                else:
                    check_update(peer, running, model, before)
    return jobs
