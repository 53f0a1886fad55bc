import pytest

from . import interrupts


@pytest.fixture(autouse=True)
def _more_places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.option.full:
        monkeypatch.setattr(interrupts, "NEAR_THE_ENDS", interrupts.NEAR_IN_FULL)
