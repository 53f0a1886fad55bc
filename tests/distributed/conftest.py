"""One process group for all tests of a pytest worker."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .ranks import Ranks

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder as ``dist``."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker("dist")


@pytest.fixture(scope="session")
def _rank_groups() -> Iterator[list[Ranks]]:
    made: list[Ranks] = []
    yield made
    for one in made:
        one.close()


@pytest.fixture
def run(_rank_groups: list[Ranks]) -> Callable[..., list[Any]]:
    """Return ``run(function, *args)``, which calls a function on four ranks."""
    if not _rank_groups or not _rank_groups[-1].alive:
        _rank_groups.append(Ranks())
    return _rank_groups[-1].run
