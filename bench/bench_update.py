"""How long does one update of the average take, and what does it cost beside time?"""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import Case

QUESTION = "update"


def test_update(case: Case, peer: str, replay: Callable[[Case, str], None]) -> None:
    replay(case, peer)
