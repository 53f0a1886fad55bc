"""fastema.keras and fastema.compat.keras: some cases here, and all of them on each backend."""

import sys
from pathlib import Path

import pytest
from keras.src.utils import module_utils

from ..support.requirements import require_packages
from .backends import BACKENDS, run
from .evaluation_cases import (
    test_evaluate_and_predict_with_the_average_and_every_bit_comes_back,  # noqa: F401
    test_validation_runs_with_the_average,  # noqa: F401
)
from .losses_cases import (
    test_keras_values_stay_the_same_to_the_bit,  # noqa: F401
    test_logs_of_batches_and_epochs,  # noqa: F401
    test_raw_is_the_batchs_own_loss,  # noqa: F401
)
from .swap_cases import (
    models_are_given_back,  # noqa: F401
    test_validation_runs_with_the_average_and_every_bit_comes_back,  # noqa: F401
)
from .weights_cases import (
    pytestmark,  # noqa: F401
    test_average_is_the_recursion_over_all_steps,  # noqa: F401
    test_saved_weights_are_the_average,  # noqa: F401
    test_swap_on_epoch_shows_the_average_to_later_callbacks,  # noqa: F401
)

NEEDS = ("safetensors",)


@pytest.fixture(autouse=True)
def _no_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras' set_random_seed would import it, for nothing: half a gigabyte."""
    if "tensorflow" not in sys.modules:
        monkeypatch.setattr(module_utils.tensorflow, "_available", False)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_cases(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    require_packages(backend)
    run(backend, tmp_path, *["--full"] * request.config.option.full).judge()
