"""Random rounding of whole averages: by definition, wherever they run, and no stalls."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import fastema
from fastema.kernels.table import CHUNK

from ..support import reference
from .stored import Specified, exact, same
from .weights import FLOATS, refresh_, train_

pytestmark = pytest.mark.torch

DECAY = 0.99
NARROW = {"bf16": torch.bfloat16, "f16": torch.float16}


def weights_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Odd sizes, odd beginnings, gaps and orders of axes."""
    base = torch.empty(40_001, dtype=dtype)
    image = torch.empty(3, 5, 7, 9, dtype=dtype)
    weights = {
        "scalar": torch.empty((), dtype=dtype),
        "odd": base[3:1000],
        "gaps": base[1001:3001:2],
        "rows": torch.empty(31, 90, dtype=dtype)[:, 1:70],
        "transposed": torch.empty(37, 129, dtype=dtype).t(),
        "channels last": image.to(memory_format=torch.channels_last),
        "permuted": torch.empty(6, 33, 20, dtype=dtype).permute(2, 0, 1),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    refresh_(weights, 0)
    return weights


@pytest.mark.parametrize("average", NARROW)
@pytest.mark.parametrize("model", FLOATS)
def test_every_tensor_is_rounded_as_specified(model: str, average: str) -> None:
    weights = weights_of(FLOATS[model])
    ema = fastema.EMA(weights, DECAY, shadow_dtype=NARROW[average], seed=2**35 + 3)
    specified = {
        name: Specified(tensor, name, seed=2**35 + 3) for name, tensor in ema.shadow.items()
    }
    for step in range(1, 5):
        refresh_(weights, step)
        ema.update()
        for name, one in specified.items():
            one.update(weights[name], 1 - DECAY, step)
            one.check(ema.shadow[name])


FORMATS = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("shape", [(40, 24, 3, 3), (64, 3, 7, 7), (1, 2, 1, 70_001)])
@pytest.mark.parametrize("dtype", NARROW)
def test_the_order_in_memory_changes_no_bit(dtype: str, shape: tuple[int, ...]) -> None:
    start = torch.randn(shape).to(NARROW[dtype])
    weights = {name: {"w": of(start.clone())} for name, of in FORMATS.items()}
    averages = {name: fastema.EMA(one, 0.99, seed=3) for name, one in weights.items()}
    for step in range(3):
        for name, one in weights.items():
            one["w"].copy_(start * (1.5 + step))
            averages[name].update()
    specified = averages["contiguous"].shadow["w"]
    for one in averages.values():
        assert torch.equal(one.shadow["w"], specified)
    assert not torch.equal(averages["contiguous"].shadow["w"], start)


def test_a_run_resumed_in_another_memory_format_has_the_same_bits() -> None:
    def trained(step: int, model: nn.Module) -> None:
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                values = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + i))
                p.copy_(values)

    def built() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 40, 3)).bfloat16()

    formats = [torch.contiguous_format, torch.channels_last]
    results = []
    for first, second in product(formats, formats):
        model = built().to(memory_format=first)
        ema = fastema.EMA(model, 0.9)
        for step in range(4):
            trained(step, model)
            ema.update()
        state = ema.state_dict()
        model = built().to(memory_format=second)
        ema = fastema.EMA(model, 0.9)
        ema.load_state_dict(state)
        for step in range(4, 8):
            trained(step, model)
            ema.update()
        assert ema.shadow["1.weight"].stride() == model[1].weight.stride()
        results.append({name: tensor.contiguous() for name, tensor in ema.shadow.items()})
    for one in results:
        assert same(one, results[0])


@pytest.mark.parametrize(("start", "every"), [(0, 3), (2, 1), (3, 2)])
def test_the_step_is_the_number_of_the_call(start: int, every: int) -> None:
    weights = {"w": torch.randn(333).bfloat16()}
    ema = fastema.EMA(weights, DECAY, start_after=start, update_every=every)
    specified = Specified(ema.shadow["w"], "w")
    for step in range(1, 12):
        refresh_(weights, step)
        ema.update()
        if step <= start:
            specified = Specified(weights["w"], "w")
        elif (step - start) % every == 0:
            specified.update(weights["w"], -math.expm1(every * math.log(DECAY)), step)
    specified.check(ema.shadow["w"])


def test_seeds_tensors_and_rounding() -> None:
    start = torch.randn(2000).bfloat16()
    weights = {"a": start.clone(), "b": start.clone()}
    options = [{}, {"seed": 0}, {"seed": 1}, {"rounding": "stochastic"}, {"rounding": "nearest"}]
    default, again, other, named, nearest = (fastema.EMA(weights, DECAY, **one) for one in options)
    for tensor in weights.values():
        tensor.add_(1)
    for one in (default, again, other, named, nearest):
        one.update()
    assert same(default.shadow, again.shadow)
    assert same(default.shadow, named.shadow)
    assert not same(default.shadow, other.shadow)
    assert not torch.equal(default.shadow["a"], default.shadow["b"])
    assert torch.equal(nearest.shadow["a"], nearest.shadow["b"])
    specified = Specified(start, "a", random=False)
    specified.update(weights["a"], 1 - DECAY, 1)
    specified.check(nearest.shadow["a"])


# -- the same bits wherever and however it runs ----------------------------------------------------


@pytest.mark.usefixtures("eager")
def test_threads_and_company_do_not_matter(threads: Callable[[int], None]) -> None:
    shapes = {"large": (3 * CHUNK + 5,), "matrix": (300, 700), "small": (9,)}
    weights = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    start = {name: tensor.clone() for name, tensor in weights.items()}

    def of(names: list[str], count: int, **options: object) -> dict[str, torch.Tensor]:
        threads(count)
        for name, tensor in weights.items():
            tensor.copy_(start[name])
        ema = fastema.EMA({name: weights[name] for name in names}, **options)
        for step in range(3):
            for name, tensor in weights.items():
                tensor.copy_(start[name] * (1.3 + step))
            ema.update()
        return dict(ema.shadows[0])

    whole = of(list(shapes), 1)
    assert same(of(list(shapes), 2), whole)
    assert same(of(list(shapes), 4), whole)
    several = of(list(shapes), 3, decay=(0.999, 0.9, 0.5))  # in chunks of another size
    assert same(several, whole)
    backwards = of(list(shapes)[::-1], 2)
    for name in shapes:
        assert torch.equal(of([name], 2)[name], whole[name])
        assert torch.equal(backwards[name], whole[name])


def test_weights_that_move_change_no_bit() -> None:
    weights, twins = weights_of(torch.bfloat16), weights_of(torch.bfloat16)
    ema, moving = fastema.EMA(weights, DECAY), fastema.EMA(twins, DECAY)
    for step in range(1, 9):
        train_(weights, range(step, step + 1), ema)
        if step % 2:
            # To gaps, to another order of axes, and back: the average stays where it is.
            for tensor in twins.values():
                if tensor.dim() == 1:
                    tensor.data = torch.empty(3 * len(tensor), dtype=tensor.dtype)[::3]
                elif tensor.dim() > 1:
                    tensor.data = torch.empty_like(tensor.mT.contiguous()).mT
        train_(twins, range(step, step + 1), moving)
        assert same(moving.shadow, ema.shadow)


# -- nearest stalls, random does not ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
def test_nearest_never_moves_where_random_follows(dtype: str) -> None:
    """Decay 0.999 and weights that move by 1 %: 1,500 updates."""
    start = torch.randn(20_000, dtype=torch.float64).add_(3).to(NARROW[dtype])
    weights = {"w": start.clone()}
    nearest = fastema.EMA(weights, 0.999, rounding="nearest")
    random = fastema.EMA(weights, 0.999)
    wide = fastema.EMA(weights, 0.999, shadow_dtype="float64")
    weights["w"].mul_(1.01)
    for _ in range(1500):
        for one in (nearest, random, wide):
            one.update()
    assert torch.equal(nearest.shadow["w"], start)
    went = exact(random.shadow["w"]) - exact(start)
    should = exact(wide.shadow["w"]) - exact(start)
    # Elements round independently of each other: their mean has a known standard error.
    error = went - should
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(error.size)
    assert abs(went.sum() / should.sum() - 1) < 0.02
    # No element is far off: some units in the last place, of which it makes one step at a time.
    unit = 2.0 * np.abs(exact(start)) * 2.0 ** -reference.FLOATS[dtype].digits
    assert (np.abs(error) / unit).max() < 6
    assert np.median(np.abs(error) / unit) < 1
