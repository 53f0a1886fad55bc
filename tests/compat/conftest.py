from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The host's memory treated as a device's: the numbers that are fetched are noted here."""
    from fastema.compat import mirrored

    reads: list[float] = []
    fetched = mirrored.fetched

    def noted(buffer: Any) -> float:
        reads.append(fetched(buffer))
        return reads[-1]

    monkeypatch.setattr(mirrored, "is_read_at_once", lambda buffer: False)
    monkeypatch.setattr(mirrored, "fetched", noted)
    return reads
