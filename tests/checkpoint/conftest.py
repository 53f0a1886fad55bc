from pathlib import Path

import pytest


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the test's working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
