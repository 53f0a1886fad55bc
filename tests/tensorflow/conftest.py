from typing import Any

import numpy as np
import pytest


@pytest.fixture(params=["eagerly", "traced"])
def way(request: pytest.FixtureRequest) -> Any:
    """How an update is called: as it is, or within a function of TensorFlow."""
    from . import ways

    return getattr(ways, request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)
