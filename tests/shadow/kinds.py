"""Averages of every kind, for what has to hold for all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import fastema

from .weights import Tensor, assert_bits, bits, net, snapshot, train_

Kind = Callable[..., Any]
"""``kind(weights, **options)`` builds an average."""


three = partial(fastema.EMA, decay=(0.5, 0.75, 0.875))

KINDS: dict[str, Kind] = {
    "EMA": partial(fastema.EMA, decay=0.75),
    "three": three,
    "SWA": fastema.SWA,
    "SMA": partial(fastema.SMA, window=3),
    "PowerEMA": fastema.PowerEMA,
    "split": partial(fastema.EMA, decay=0.75, shadow_dtype="bf16+16"),
    "three split": partial(three, shadow_dtype="bf16+16"),
    "random": partial(fastema.EMA, decay=0.75, shadow_dtype="bfloat16"),
}

VARIED = ("three", "SMA", "split", "three split", "random")
"""Kinds that differ in how they lie in memory; the others are an EMA with another rule."""


def trained_kind(kind: str, model: Any = None, updates: int = 5, **options: Any) -> Any:
    """An average of a kind after some updates, of a `Net` unless a model is given."""
    model = net() if model is None else model
    average = KINDS[kind](model, **options)
    train_(model, range(1, updates + 1), average)
    return average


PARTS = ("shadow", "residual", "ring")
"""The lists of tensors in a state."""


def which(average: Any) -> dict[str, int]:
    """The argument that names the last of several averages; none where there is one."""
    count = len(average.shadows)
    return {"which": count - 1} if count > 1 else {}


def last(average: Any) -> dict[str, Tensor]:
    """The tensors of that one."""
    return dict(average.shadows[-1])


def all_of(average: Any) -> dict[Any, Any]:
    """All that an average holds, bit for bit: averages, companions, rings, counters, schedule."""
    state = average.state_dict(copy=False)
    parts = {part: state.pop(part) for part in PARTS if part in state}
    return state | {
        (part, i, name): (tensor.dtype, bits(tensor).numpy().tobytes())
        for part, averages in [*parts.items(), ("shadows", average.shadows)]
        for i, tensors in enumerate(averages)
        for name, tensor in tensors.items()
    }


@contextmanager
def unchanged(weights: Any, *averages: Any) -> Iterator[None]:
    """A block after which weights and averages are what they were, to the bit."""
    raw, held = snapshot(weights), [all_of(one) for one in averages]
    yield
    assert_bits(weights, raw)
    assert [all_of(one) for one in averages] == held
    assert not any(one.applied for one in averages)
