"""One process group for all tests of a worker."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .ranks import Ranks

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker("dist")


@pytest.fixture(scope="session")
def _made() -> Iterator[list[Ranks]]:
    made: list[Ranks] = []
    yield made
    for one in made:
        one.close()


@pytest.fixture
def run(_made: list[Ranks]) -> Callable[..., list[Any]]:
    """``run(function, *args)``: call a function on four ranks; what each returns."""
    if not _made or not _made[-1].alive:
        _made.append(Ranks())
    return _made[-1].run
