"""The test suites of other libraries that the gate runs, and which of their tests cannot pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Suite(NamedTuple):
    """Test files of a library, run after ``fastema.compat.install(peer)``.

    ``left_out`` and ``differs`` have regular expressions for names of tests. A test that differs
    must fail, with the given text in its traceback.
    """

    peer: str
    distribution: str
    repository: str  # the last part is the name of its folder in --sources
    tag: str  # of the release with the installed {version}
    files: tuple[str, ...]  # in the repository, or in site-packages if the wheel has them
    needs: tuple[str, ...] = ()  # what else the tests import
    env: Mapping[str, str] = {}
    left_out: Mapping[str, str] = {}  # why
    differs: Mapping[str, tuple[str, str]] = {}  # why, text


SUITES: dict[str, Suite] = {
    "torch_ema": Suite(
        peer="torch_ema",
        distribution="torch-ema",
        repository="https://github.com/fadel/pytorch_ema",
        tag="v{version}.0",
        files=("tests/test_ema.py",),
    ),
    "swa_utils": Suite(
        peer="swa_utils",
        distribution="torch",
        repository="https://github.com/pytorch/pytorch",
        tag="v{version}",
        files=("test/optim/test_swa_utils.py",),
        needs=("expecttest",),
    ),
    "diffusers": Suite(
        peer="diffusers",
        distribution="diffusers",
        repository="https://github.com/huggingface/diffusers",
        tag="v{version}",
        files=("tests/others/test_ema.py",),
    ),
    # timm has no tests of its averages; these use them.
    "timm": Suite(
        peer="timm",
        distribution="timm",
        repository="https://github.com/huggingface/pytorch-image-models",
        tag="v{version}",
        files=("tests/test_task.py",),
    ),
    # StochasticWeightAveraging, which has tests of its own, is not replaced.
    "lightning": Suite(
        peer="lightning",
        distribution="lightning",
        repository="https://github.com/Lightning-AI/pytorch-lightning",
        tag="{version}",
        files=("tests/tests_pytorch/callbacks/test_weight_averaging.py",),
    ),
    **{
        f"keras-{backend}": Suite(
            peer="keras",
            distribution="keras",
            repository="https://github.com/keras-team/keras",
            tag="v{version}",
            files=("keras/src/callbacks/swap_ema_weights_test.py",),
            needs=("tensorflow",),
            env={"KERAS_BACKEND": backend},
            differs={
                "::test_swap_ema_weights_with_invalid_optimizer": (
                    "a model without use_ema=True is refused in other words",
                    "has no optimizer with use_ema=True, so there is no average to evaluate",
                )
            },
        )
        for backend in ("jax", "tensorflow", "torch")
    },
    "tensorflow": Suite(
        peer="tensorflow",
        distribution="tensorflow",
        repository="https://github.com/tensorflow/tensorflow",
        tag="v{version}",
        files=("tensorflow/python/training/moving_averages_test.py",),
        left_out={"MovingAveragesTest::": "of functions that are not replaced"},
        differs={
            "_DynamicDecay$": ("a private attribute is set", "has no attribute '_decay'"),
            "NamesRespectScope": ("scopes of TensorFlow 1 are not known", "scope2/scope1/v0/foo"),
            "::(testAverageVariables|testSubset.*Names$|testImportedGraph|testCopyXla)": (
                "graphs of TensorFlow 1 are refused",
                "fastema.errors",
            ),
        },
    ),
}

WITHOUT_TESTS = {"ema_pytorch": "its repository has no tests"}
