"""How long does it take to put the average into the model and the weights back?"""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import Case

QUESTION = "swap"


def test_swap(case: Case, peer: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, peer)
