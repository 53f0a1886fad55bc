"""Verify an entry's result before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Half the spacing of numbers just above 1: the relative error of rounding to nearest."""

_SAMPLE = 1 << 16


def sample(tensor: Tensor) -> Tensor:
    """Return a float64 copy of a tensor's first, last and evenly spaced elements.

    Tensors of up to 3 * 65,536 elements are copied whole, larger ones are reduced to that many.
    A chunk that is skipped, done twice or done with another tensor's data still shows.
    """
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= 3 * _SAMPLE:
        return flat.double()
    stride = flat.numel() // _SAMPLE
    return torch.cat([flat[:_SAMPLE], flat[::stride][:_SAMPLE], flat[-_SAMPLE:]]).double()


def assert_averaged(
    got: Sequence[Tensor],
    before: Sequence[Tensor],
    weights: Sequence[Tensor],
    decay: float,
    *,
    rounds_weights: bool = False,
    stochastic: bool = False,
) -> None:
    """Assert ``got == before + (1 - decay) * (weight - before)`` within rounding errors.

    Parameters
    ----------
    got
        Averages after one update.
    before
        Samples (see `sample`) of the averages before that update.
    weights
        The model's parameters.
    decay
        Weight of the old average.
    rounds_weights, stochastic
        As in `bench.race.peers.Peer`.

    Raises
    ------
    AssertionError
        If number, shapes or values differ; the message names the first tensor by position.

    Notes
    -----
    The bound is four roundings in the average's precision, relative to ``|before| + |weight|``:
    the longest way to write the update has four. Stochastic rounding doubles the bound, since its
    error is up to a whole spacing instead of half a spacing.
    """
    assert len(got) == len(before) == len(weights), (len(got), len(before), len(weights))
    for position, (average, old, weight) in enumerate(zip(got, before, weights, strict=True)):
        assert average.shape == weight.shape, (position, average.shape, weight.shape)
        x = sample(weight)
        want = old + (1 - decay) * (x - old)
        bound = 4 * UNIT_ROUNDOFF[average.dtype] * (old.abs() + x.abs())
        if stochastic:
            bound *= 2
        if rounds_weights and weight.dtype != average.dtype:
            bound += UNIT_ROUNDOFF[weight.dtype] * (1 - decay) * x.abs()
        wrong = (sample(average) - want).abs() > bound
        assert not bool(wrong.any()), (
            f"tensor {position}: {int(wrong.sum())} of {wrong.numel()} elements differ from the "
            f"float64 reference, the worst by {float((sample(average) - want).abs().max()):.3g}"
        )


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Assert that samples (see `sample`) of the tensors `got` equal the samples `want` exactly."""
    for position, (tensor, expected) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(sample(tensor), expected), f"tensor {position} differs"
