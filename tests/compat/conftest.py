from typing import Any

import pytest


@pytest.fixture
def device_reads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Treat host memory as a device's; return the list that collects each number read from it."""
    from fastema.compat import mirrored

    reads: list[float] = []
    read = mirrored.read_number

    def record(buffer: Any) -> float:
        reads.append(read(buffer))
        return reads[-1]

    monkeypatch.setattr(mirrored, "is_always_read", lambda buffer: False)
    monkeypatch.setattr(mirrored, "read_number", record)
    return reads
