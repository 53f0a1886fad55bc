"""fastema.compat.keras.SwapEMAWeights on TensorFlow, PyTorch and JAX: keras_swap_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ..keras_backends import BACKENDS, Outcome, names, outcomes

CASES = Path(__file__).with_name("keras_swap_cases.py")


@pytest.fixture(scope="module")
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    return outcomes(CASES, request, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("case", names(CASES))
@pytest.mark.parametrize("backend", BACKENDS)
def test_case(backend: str, case: str, outcome: Callable[[str], Outcome]) -> None:
    outcome(backend).judge(case)
