from typing import Any

import numpy as np
import pytest


@pytest.fixture(params=["eagerly", "traced"])
def way(request: pytest.FixtureRequest) -> Any:
    """Call updates eagerly or within a ``tf.function``."""
    from . import ways

    return getattr(ways, request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)
