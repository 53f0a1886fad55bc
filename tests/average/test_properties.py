"""Algebraic properties of averages."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastema

from .weights import FLOATS, assert_bits, refresh_, snapshot, values

pytestmark = pytest.mark.torch

MIXED = {**FLOATS, "c64": torch.complex64, "c128": torch.complex128, "i64": torch.int64}

# The first example of a dtype pair compiles its kernel.
small = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

Weights = dict[str, torch.Tensor]


def lay_out(shape: tuple[int, ...], code: str, layout: str) -> torch.Tensor:
    dtype = MIXED[code]
    if layout == "transposed":
        return torch.zeros(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])
    if layout == "spaced":
        whole = torch.zeros([2 * n for n in shape], dtype=dtype)
        return whole[tuple(slice(0, 2 * n, 2) for n in shape)]
    if layout == "offset":
        length = torch.Size(shape).numel()
        return torch.zeros(length + 3, dtype=dtype)[3:].view(shape)
    return torch.zeros(shape, dtype=dtype)


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.tuples(st.integers(60, 200))
layouts = st.sampled_from(["plain", "transposed", "spaced", "offset"])


def tensors(codes: st.SearchStrategy[str]) -> st.SearchStrategy[torch.Tensor]:
    return st.builds(lay_out, shapes, codes, layouts)


def weight_dicts(*codes: str) -> st.SearchStrategy[Weights]:
    sets = st.lists(tensors(st.sampled_from(codes)), min_size=1, max_size=6)
    # Floats that are all of shape (0,) are refused: ZeRO-3 may have emptied them.
    return sets.filter(
        lambda found: any(t.dtype != torch.int64 and t.shape != (0,) for t in found)
    ).map(lambda found: {f"t{i}": tensor for i, tensor in enumerate(found)})


seeds = st.integers(0, 2**31)


def run(weights: Weights, seed: int, updates: int, ema: fastema.EMA) -> Iterator[Weights]:
    for n in range(1, updates + 1):
        refresh_(weights, seed + n)
        ema.update()
        yield values(weights)


@small
@given(weight_dicts(*FLOATS), st.floats(0.0, 0.9), seeds, st.integers(1, 8))
def test_average_stays_within_the_range_of_its_weights(
    weights: Weights, decay: float, seed: int, updates: int
) -> None:
    refresh_(weights, seed)
    low = {name: tensor.clone() for name, tensor in weights.items()}
    high = values(weights)
    ema = fastema.EMA(weights, decay)
    for seen in run(weights, seed, updates, ema):
        for name, tensor in seen.items():
            low[name], high[name] = low[name].minimum(tensor), high[name].maximum(tensor)
    for name, average in ema.shadow.items():
        # Each update may round past the bounds by half a unit in the last place.
        room = updates * torch.finfo(average.dtype).eps * high[name].abs().maximum(low[name].abs())
        assert (average >= low[name] - room).all()
        assert (average <= high[name] + room).all()


@small
@given(weight_dicts(*FLOATS), seeds, st.integers(1, 4), st.integers(0, 4))
def test_update_every_and_start_after_only_choose_steps(
    weights: Weights, seed: int, every: int, start: int
) -> None:
    """Equivalent to calling ``update`` at those steps only, with the decay to the k-th power."""
    refresh_(weights, seed)

    def averages() -> fastema.EMA:
        return fastema.EMA(weights, 0.5**every, rounding="nearest")

    # Rounded to nearest: random bits depend on the step, which differs.
    ema = fastema.EMA(weights, 0.5, update_every=every, start_after=start, rounding="nearest")
    by_hand = averages()
    for n, _ in enumerate(run(weights, seed, 9, ema), 1):
        if n == start:
            by_hand = averages()
        elif n > start and (n - start) % every == 0:
            by_hand.update()
    assert_bits(dict(ema.shadow), snapshot(dict(by_hand.shadow)))
