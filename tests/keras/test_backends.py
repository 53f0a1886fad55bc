"""fastema.keras and fastema.compat.keras: some cases in this process, all on each backend."""

from pathlib import Path

import pytest

from ..support.requirements import require_packages
from .backends import run_cases
from .evaluation_cases import (
    test_evaluate_and_predict_use_the_average_and_restore_every_bit,  # noqa: F401
    test_validation_uses_the_average,  # noqa: F401
)
from .losses_cases import (
    test_batch_and_epoch_logs_hold_the_averages,  # noqa: F401
    test_keras_values_are_bit_identical_with_loss_averages,  # noqa: F401
    test_raw_curve_is_the_loss_of_each_batch,  # noqa: F401
)
from .swap_cases import test_validation_uses_the_average_and_restores_every_bit  # noqa: F401
from .weights_cases import (
    pytestmark,  # noqa: F401
    test_average_equals_the_recursion_over_all_steps,  # noqa: F401
    test_later_callbacks_and_the_end_of_fit_see_the_average_unless_raw,  # noqa: F401
    test_saved_weights_are_the_average,  # noqa: F401
)

NEEDS = ("safetensors",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [pytest.param("tensorflow", marks=pytest.mark.tensorflow), "torch", "jax"]
)
def test_all_cases_pass(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    require_packages(backend)
    run_cases(backend, tmp_path, *["--full"] * request.config.option.full)
