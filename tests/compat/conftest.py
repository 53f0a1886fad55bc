from typing import Any

import pytest


@pytest.fixture
def on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The host's memory treated as a device's: the numbers that are read are noted here."""
    from fastema.compat import mirrored

    reads: list[float] = []
    read = mirrored.read_number

    def noted(buffer: Any) -> float:
        reads.append(read(buffer))
        return reads[-1]

    monkeypatch.setattr(mirrored, "is_always_read", lambda buffer: False)
    monkeypatch.setattr(mirrored, "read_number", noted)
    return reads
