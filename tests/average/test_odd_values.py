"""Odd values of public arguments: each raises an error of fastema that names what is wrong."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastema
from fastema import checkpoint, tracking
from fastema.errors import (
    ArgumentError,
    BridgeError,
    CheckpointError,
    DeviceError,
    FastemaError,
    LayoutError,
)

from ..support.states import flat, nested

pytestmark = pytest.mark.torch

ARRAY, TENSOR = np.array([1, 2]), torch.ones(2)


def linear() -> Any:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


OPTIONS: list[tuple[type, dict[str, Any], str]] = [
    (fastema.EMA, {"frozen": ARRAY}, "frozen=.*expected one of average, copy, skip"),
    (fastema.EMA, {"buffers": TENSOR}, "buffers=.*expected one of average, copy, skip"),
    (fastema.EMA, {"policy": {"*": ARRAY}}, r"policy\['\*'\]=.*expected one of average, copy"),
    (fastema.EMA, {"policy": {1: "skip"}}, "policy=.*expected a mapping of name patterns"),
    (fastema.EMA, {"policy": lambda name, role: "skip"}, "policy=.*expected a mapping of name"),
    (fastema.EMA, {"rounding": ARRAY}, "rounding=.*expected one of nearest, stochastic"),
    (fastema.EMA, {"on_nonfinite": ARRAY}, "on_nonfinite=.*expected one of propagate, skip, raise"),
    (fastema.EMA, {"capturable": TENSOR}, "capturable=.*expected True or False"),
    (fastema.EMA, {"zero_debias": ARRAY}, "zero_debias=.*expected True or False"),
    (fastema.EMA, {"offload": ARRAY}, "offload=.*expected True, False or 'skip'"),
    (fastema.EMA, {"shadow_dtype": {"*": 1}}, "shadow_dtype=.*expected a float dtype"),
    (fastema.EMA, {"shadow_dtype": TENSOR}, "shadow_dtype=.*expected a float dtype"),
    (fastema.EMA, {"shadow_dtype": {"a": {"b": None}}}, "shadow_dtype=.*expected a float dtype"),
    (fastema.SMA, {"ring_dtype": TENSOR}, "ring_dtype=.*expected a float dtype"),
    (fastema.SMA, {"ring_device": ARRAY}, "ring_device=.*expected 'cpu'"),
    (fastema.EMA, {"seed": 0.5}, "seed=0.5: expected a whole number"),
]


@pytest.mark.parametrize(("kind", "options", "message"), OPTIONS)
def test_odd_option_raises_an_error_that_names_it(
    kind: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        kind(linear(), **options)


@pytest.mark.parametrize("offload", [False, True])
def test_odd_destination_of_to_raises_and_changes_nothing(offload: bool) -> None:
    ema = fastema.EMA(linear(), 0.5, offload=offload)
    before = ema.shadow["weight"].data_ptr()
    for move, error, message in (
        (lambda: ema.to(10**30), FastemaError, str(10**30)),
        (lambda: ema.to({"a": {"b": None}}), FastemaError, "a"),
        (lambda: ema.to(dtype=TENSOR), ArgumentError, "dtype=.*expected a float dtype"),
        (lambda: ema.to(dtype={"*": 1}), ArgumentError, "^dtype=.*expected a float dtype"),
    ):
        with pytest.raises(error, match=message):
            move()
    assert ema.shadow["weight"].data_ptr() == before
    if not offload:
        with pytest.raises(DeviceError, match="expected a device such as 'cpu' or 'cuda:0'"):
            ema.to(10**30)


HOST: dict[str, tuple[Any, type[FastemaError], str]] = {
    "sparse": (torch.ones(2, 3).to_sparse(), BridgeError, "weight: .*sparse.*materialize it"),
    "meta": (torch.ones(2, 3, device="meta"), BridgeError, "weight: .*meta.*materialize it"),
    "text": ("x", BridgeError, "'weight' is a str, expected a PyTorch tensor"),
    "none": (None, BridgeError, "'weight' is a NoneType, expected a PyTorch tensor"),
    "array": (np.ones((2, 3), np.float32), BridgeError, "'weight' is a ndarray, expected"),
    "shape": (torch.ones(3, 2), LayoutError, r"not match the model:\s*- 'weight' is .*, expected"),
    "dtype": (torch.ones(2, 3).double(), LayoutError, "'weight' is torch.float64.* expected torch"),
}


@pytest.mark.parametrize("what", HOST)
def test_update_from_host_refuses_an_odd_tensor_by_name(what: str) -> None:
    odd, error, message = HOST[what]
    ema = fastema.EMA(linear(), 0.5, offload=True)
    before = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    with pytest.raises(error, match=rf"(?s)update_from_host\(\): .*{message}"):
        ema.update_from_host({"bias": torch.ones(2), "weight": odd})
    assert ema.num_updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.shadow.items())


def test_update_from_host_refuses_what_is_not_a_mapping_or_lacks_a_tensor() -> None:
    ema = fastema.EMA(linear(), 0.5, offload=True)
    for odd in (None, 3, "x", TENSOR, [TENSOR]):
        with pytest.raises(ArgumentError, match=r"update_from_host\(\): expected a mapping of"):
            ema.update_from_host(odd)  # type: ignore[attr-defined]
    with pytest.raises(LayoutError, match=r"needs all .*\s*- 'weight' is missing"):
        ema.update_from_host({"bias": torch.ones(2)})  # type: ignore[attr-defined]


def damaged_state() -> None:
    average = tracking.ExponentialMovingAverage()
    state = average.state_dict()
    average.load_state_dict({**state, "state": torch.ones(4, device="meta")})


CALLS: dict[str, tuple[Callable[[], object], type[FastemaError], str]] = {
    "metrics": (lambda: tracking.MetricSmoother().update(0.5), ArgumentError, "metrics=0.5: exp"),  # type: ignore[arg-type]
    "on_nonfinite": (
        lambda: tracking.SimpleMovingAverage(on_nonfinite=ARRAY),  # type: ignore[arg-type]
        ArgumentError,
        "on_nonfinite=.*expected one of",
    ),
    "state": (damaged_state, CheckpointError, "."),
    "threads": (
        lambda: fastema.set_num_threads(10**30),
        ArgumentError,
        "threads=.* from 1 to 1024",
    ),
    "calls": (
        lambda: setattr(fastema.Plan([np.ones(2)], [np.ones(2)]), "calls", 10**30),
        ArgumentError,
        "calls=.*expected a whole number from 0",
    ),
}


@pytest.mark.parametrize("framework", ["keras", "lightning", "transformers"])
def test_odd_option_of_a_callback_raises_an_error_that_names_it(framework: str) -> None:
    pytest.importorskip(framework)
    package = getattr(fastema, framework)
    average = package.EMAWeights if framework == "keras" else package.EMACallback
    for odd in (ARRAY, TENSOR, "x"):
        with pytest.raises(ArgumentError, match=r"which=.*expected a number from 0"):
            average(decay=(0.5, 0.9), which=odd)
    for odd in (3, "loss", ARRAY, [1], {"loss": 1}):
        with pytest.raises(ArgumentError, match=r"metrics=.*expected"):
            package.LossAverages(metrics=odd)


def test_odd_log_decays_of_a_saved_state_are_named() -> None:
    ema = fastema.EMA([np.ones(2)], 0.9, zero_debias=True)
    ema.update()
    state, words = ema.state_dict(), r"log_decays is .*, expected one number from .* to 0 per rule"
    for odd in ([0.5], [], ["x"], [-0.1, -0.1], 0.0, None):
        with pytest.raises(CheckpointError, match=words):
            ema.load_state_dict(flat(nested(state) | {"log_decays": odd}))
    ema.load_state_dict(state)


def test_arguments_in_the_wrong_order_are_named() -> None:
    ema = fastema.EMA(linear())
    power = fastema.PowerEMA(linear())
    for call, message in (
        (lambda: checkpoint.save("ema.safetensors", ema), r"save\(\): .*first argument, got a str"),
        (lambda: checkpoint.load_into("ema.safetensors", ema), r"load_into\(\): .*got a str"),
        (lambda: fastema.posthoc.save_snapshot("folder", power), r"save_snapshot\(\): .* a str"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()


@pytest.mark.parametrize("call", CALLS)
def test_odd_argument_raises_an_error_that_names_it(call: str) -> None:
    action, error, message = CALLS[call]
    with pytest.raises(error, match=message):
        action()
