"""The drop-in for torch_ema: average_parameters, and the states and lists it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastema.compat.torch_ema import ExponentialMovingAverage as Ours
from fastema.errors import (
    ArgumentError,
    BridgeError,
    CheckpointError,
    DTypeError,
    FastemaError,
    LayoutError,
)

from .network import array, assert_refused, make_generator
from .parameter_lists import are_equal, copies_of, parameters, perturb

pytestmark = pytest.mark.torch


def test_state_with_missing_entries_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'num_updates', 'shadow_params'"):
        Ours(parameters(), 0.9).load_state_dict({"decay": 0.9})


@pytest.mark.parametrize("given", [True, False], ids=["given", "kept"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("average", [torch.float32, torch.bfloat16, torch.float64])
def test_average_parameters_swaps(given: bool, weight: torch.dtype, average: torch.dtype) -> None:
    weights = parameters(39, [weight])
    ema = Ours(weights, 0.7)
    ema.to(dtype=average)
    perturb(weights, make_generator(40))
    ema.update()
    raw, averages = copies_of(weights), copies_of(ema.shadow_params)
    tensors = list(ema.shadow_params)
    with ema.average_parameters(weights if given else None):
        for held, expected in zip(weights, averages, strict=True):
            assert held.dtype == weight
            # Ties may round either way: torch rounds float64 to 16 bits through float32.
            gap = np.abs(array(held) - array(expected))
            assert (gap <= np.abs(array(expected.to(weight)) - array(expected))).all()
        assert are_equal(ema.shadow_params, averages)
        assert ema.shadow_params is ema.shadow_params
        assert are_equal(ema.state_dict()["shadow_params"], averages)
        assert ema.collected_params is None
    assert are_equal(weights, raw)
    assert are_equal(ema.shadow_params, averages)
    assert all(one is other for one, other in zip(ema.shadow_params, tensors, strict=True))
    ema.update()


def wrong_lists() -> dict[str, tuple[Any, type[FastemaError], str]]:
    shorter, reshaped, whole, sparse = (parameters(69) for _ in range(4))
    del shorter[-1]
    reshaped[5] = nn.Parameter(torch.ones(1))
    whole[4] = torch.ones(1, 1, 33, dtype=torch.int64)
    sparse[5] = torch.ones(257).to_sparse()
    return {
        "shorter": (shorter, LayoutError, "7 parameters were given, but the average has 8"),
        "reshaped": (reshaped, LayoutError, r"5.*\[257\]"),
        "integers": (whole, DTypeError, "4"),
        "sparse": (sparse, BridgeError, "5"),
        "module": (nn.Linear(2, 2), ArgumentError, "Linear"),
    }


@pytest.mark.parametrize("case", wrong_lists())
@pytest.mark.parametrize("call", ["update", "copy_to", "average_parameters"])
def test_wrong_parameters_are_refused_before_any_write(case: str, call: str) -> None:
    weights = parameters(69)
    ema = Ours(weights, 0.9)
    ema.update()
    wrong, error, words = wrong_lists()[case]
    kept = [] if case in ("module", "sparse") else wrong
    with assert_refused(error, words, ema.shadow_params, kept):
        if call == "average_parameters":
            ema.average_parameters(wrong).__enter__()
        else:
            getattr(ema, call)(wrong)
    assert ema.num_updates == 1
    averages = copies_of(ema.shadow_params)
    perturb(weights, make_generator(70))
    ema.update()
    assert ema.num_updates == 2
    assert not are_equal(ema.shadow_params, averages)
