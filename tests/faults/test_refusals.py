"""What cannot be done is refused by name, before anything is written."""

from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import BridgeError, DTypeError, FastemaError, LayoutError

pytestmark = pytest.mark.torch


def _frozen() -> np.ndarray:
    array = np.full(3, 2.0)
    array.flags.writeable = False
    return array


SHARED = torch.arange(1.0, 31.0)
GOOD = np.full(3, 4.0)

# operation, average, weights, error, message: all of the tensor "bad", beside a good one.
REFUSALS: dict[str, tuple[str, Any, Any, type[FastemaError], str]] = {
    "shape": ("lerp", GOOD, np.full(4, 4.0), LayoutError, r"bad.*\[3\].*\[4\]"),
    "rank": ("lerp", GOOD, np.full((3, 1), 4.0), LayoutError, r"bad.*\[3\].*\[3, 1\]"),
    "whole": ("lerp", np.arange(3), np.arange(1, 4), DTypeError, "bad.*i64"),
    "whole from float": ("copy", np.arange(3), GOOD, DTypeError, "bad.*f64.*i64"),
    "bool": ("lerp", np.ones(3, bool), np.ones(3, bool), DTypeError, "bad.*bool"),
    "complex": ("lerp", GOOD, np.full(3, 1j), DTypeError, "bad.*f64.*c128"),
    "read-only average": ("lerp", _frozen(), GOOD, LayoutError, "bad.*read-only"),
    "read-only weights": ("swap", GOOD, _frozen(), LayoutError, "bad.*read-only"),
    "expanded average": (
        *("lerp", torch.ones(1).expand(3), torch.ones(3)),
        *(LayoutError, "bad.*expanded"),
    ),
    "expanded weights": (
        *("swap", torch.ones(3), torch.ones(1).expand(3)),
        *(LayoutError, "bad.*expanded"),
    ),
    "overlap": ("lerp", SHARED[:6], SHARED[4:10], LayoutError, "avg bad.*x bad.*overlap"),
    "same": ("lerp", SHARED[:6], SHARED[:6], LayoutError, "bad.*bad.*overlap"),
    "average within itself": (
        *("lerp", SHARED.unfold(0, 3, 1), torch.ones(28, 3)),
        *(LayoutError, "bad"),
    ),
    "weights within themselves": (
        *("swap", torch.ones(28, 3), SHARED.unfold(0, 3, 1)),
        *(LayoutError, "bad"),
    ),
    "sparse": ("lerp", torch.ones(3), torch.ones(3).to_sparse(), BridgeError, "bad"),
    "meta": ("lerp", torch.ones(3), torch.ones(3, device="meta"), BridgeError, "bad"),
    "number": ("lerp", GOOD, 4.0, BridgeError, "bad"),
    "byte order": ("lerp", GOOD, GOOD.astype(">f8"), DTypeError, "bad"),
}


def _frozen_copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.to_dense().clone()
    return np.array(value)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_tensor_and_change_nothing(case: str) -> None:
    operation, bad_avg, bad_x, error, message = REFUSALS[case]
    avg = {"good": np.full(3, 2.0), "bad": bad_avg, "last": torch.full((2,), 2.0)}
    x = {"good": np.full(3, 4.0), "bad": bad_x, "last": torch.full((2,), 4.0)}
    before = [[_frozen_copy(value) for value in side.values()] for side in (avg, x)]
    shared = SHARED.clone()
    with pytest.raises(error, match=message):
        getattr(fastema, f"{operation}_")(avg, x, *([0.5] if operation == "lerp" else []))
    after = [[_frozen_copy(value) for value in side.values()] for side in (avg, x)]
    for old, new in zip(before[0] + before[1], after[0] + after[1], strict=True):
        if not getattr(old, "is_meta", False):
            np.testing.assert_array_equal(new, old)
    assert torch.equal(SHARED, shared)


def test_every_name_without_a_partner_is_listed() -> None:
    avg = {"a": GOOD.copy(), "b": GOOD.copy(), "c": GOOD.copy()}
    x = {"b": GOOD.copy(), "d": GOOD.copy()}
    with pytest.raises(LayoutError) as caught:
        fastema.Plan(avg, x)
    text = str(caught.value)
    assert all(f"'{name}' is only in the first" in text for name in "ac")
    assert "'d' is only in the second" in text


def test_freed_storage_is_refused_and_not_read() -> None:
    avg, weight = torch.full((300,), 2.0), torch.full((300,), 4.0)
    plan = fastema.Plan({"kept": avg}, {"kept": weight})
    plan.lerp_(0.5)
    weight.untyped_storage().resize_(0)
    with pytest.raises(BridgeError, match=r"kept.*freed"):
        plan.lerp_(0.5)
    assert torch.equal(avg, torch.full((300,), 3.0))


def test_a_tied_weight_that_an_average_lacks_is_named_with_its_other_name() -> None:
    model = {"embed.weight": GOOD.copy(), "bias": GOOD.copy()}
    model["head.weight"] = model["embed.weight"]
    avg = {name: model[name].copy() for name in ("embed.weight", "bias")}
    words = r"'head.weight' is only in the second, where it is 'embed.weight' under another name"
    with pytest.raises(LayoutError, match=words):
        fastema.Plan(avg, model)
