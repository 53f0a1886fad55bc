"""fastema.keras.EMAWeights on TensorFlow, PyTorch and JAX: the cases of keras_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .keras_backends import BACKENDS, Outcome, names, outcomes
from .needed import modules

CASES = Path(__file__).with_name("keras_cases.py")


@pytest.fixture(scope="module")
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    modules("safetensors")
    return outcomes(CASES, request, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", names(CASES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_case(backend: str, case: str, outcome: Callable[[str], Outcome]) -> None:
    outcome(backend).judge(case)
