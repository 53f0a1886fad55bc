"""Names that users of other libraries type are answered with the name here."""

from __future__ import annotations

import numpy as np
import pytest

import fastema
from fastema.shadow import hints


@pytest.fixture
def ema() -> fastema.EMA:
    return fastema.EMA([np.ones(3)], 0.9)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("average_parameters", r"swapped\(\)"),
        ("module", r"functional_call\(model, ema\.model_state_dict\(\), x\)"),
        ("cuda", r"use to\(\)"),
        ("step", r"use update\(\)"),
        ("shadow_params", r"ema\.shadow"),
    ],
)
def test_a_name_of_another_library_is_answered_with_ours(
    name: str, said: str, ema: fastema.EMA
) -> None:
    with pytest.raises(AttributeError, match=f"'EMA' object has no attribute '{name}': .*{said}"):
        getattr(ema, name)


@pytest.mark.parametrize("kind", [fastema.EMA, fastema.SWA, fastema.SMA, fastema.PowerEMA])
def test_what_an_average_has_needs_no_hint(kind: type) -> None:
    assert not [name for name in hints._HINTS if hasattr(kind, name)]
