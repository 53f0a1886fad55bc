"""Averages of every kind, for tests that must hold for all of them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import fastema

from ..support.states import nested
from .weights import Tensor, assert_bits, bits, net, snapshot, train_

Kind = Callable[..., Any]
"""``kind(weights, **options)`` builds an average."""


build_three = partial(fastema.EMA, decay=(0.5, 0.75, 0.875))


def build_into(weights: Any, **options: Any) -> Any:
    """Return an average in a copy of the weights, which the test does not keep."""
    options = {"buffers": "copy", "overwrite": True, **options}
    return fastema.EMA(weights, decay=0.75, into=copy.deepcopy(weights), **options)


KINDS: dict[str, Kind] = {
    "EMA": partial(fastema.EMA, decay=0.75),
    "three": build_three,
    "SWA": fastema.SWA,
    "SMA": partial(fastema.SMA, window=3),
    "PowerEMA": fastema.PowerEMA,
    "split": partial(fastema.EMA, decay=0.75, shadow_dtype="bf16+16"),
    "three split": partial(build_three, shadow_dtype="bf16+16"),
    "random": partial(fastema.EMA, decay=0.75, shadow_dtype="bfloat16"),
    "into": build_into,
}

VARIED = ("three", "SMA", "split", "three split", "random", "into")
"""Kinds that differ in memory layout; the others are an EMA with another rule."""


def build_trained(kind: str, model: Any = None, updates: int = 5, **options: Any) -> Any:
    """Return an average of a kind after some updates, by default of a new `Net`."""
    model = net() if model is None else model
    average = KINDS[kind](model, **options)
    train_(model, range(1, updates + 1), average)
    return average


PARTS = ("shadow", "residual", "ring")
"""The lists of tensors in a state."""


def which(average: Any) -> dict[str, int]:
    """Return the argument that selects the last of several averages; empty for a single one."""
    count = len(average.shadows)
    return {"which": count - 1} if count > 1 else {}


def last_shadow(average: Any) -> dict[str, Tensor]:
    """Return the tensors of the last average."""
    return dict(average.shadows[-1])


def full_state(average: Any) -> dict[Any, Any]:
    """Return all state of an average, to the bit: tensors, residuals, rings, counters, schedule."""
    state = nested(average.state_dict(copy=False))
    parts = {part: state.pop(part) for part in PARTS if part in state}
    return state | {
        (part, i, name): (tensor.dtype, bits(tensor).numpy().tobytes())
        for part, averages in [*parts.items(), ("shadows", average.shadows)]
        for i, tensors in enumerate(averages)
        for name, tensor in tensors.items()
    }


@contextmanager
def assert_unchanged(weights: Any, *averages: Any) -> Iterator[None]:
    """Assert that the block leaves weights and averages unchanged to the bit, and none applied."""
    raw, held = snapshot(weights), [full_state(one) for one in averages]
    yield
    assert_bits(weights, raw)
    assert [full_state(one) for one in averages] == held
    assert not any(one.applied for one in averages)
