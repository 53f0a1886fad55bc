"""Random rounding of whole averages: as specified, whatever the threads and other tensors."""

from collections.abc import Callable

import pytest
import torch

import fastema
from fastema.kernels.table import CHUNK

from .stored import ReferenceAverage, is_same
from .weights import FLOATS, refresh_

pytestmark = pytest.mark.torch

DECAY = 0.99
NARROW = {"bf16": torch.bfloat16, "f16": torch.float16}


def make_weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return tensors with odd sizes, odd offsets, gaps and permuted axes."""
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
    weights = make_weights(FLOATS[model])
    ema = fastema.EMA(weights, DECAY, shadow_dtype=NARROW[average], seed=2**35 + 3)
    specified = {
        name: ReferenceAverage(tensor, name, seed=2**35 + 3) for name, tensor in ema.shadow.items()
    }
    for step in range(1, 5):
        refresh_(weights, step)
        ema.update()
        for name, one in specified.items():
            one.update(weights[name], 1 - DECAY, step)
            one.check(ema.shadow[name])


@pytest.mark.usefixtures("eager")
def test_rounding_ignores_threads_and_other_tensors(threads: Callable[[int], None]) -> None:
    shapes = {"large": (3 * CHUNK + 5,), "matrix": (300, 700), "small": (9,)}
    weights = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    start = {name: tensor.clone() for name, tensor in weights.items()}

    def shadow_of(names: list[str], count: int, **options: object) -> dict[str, torch.Tensor]:
        threads(count)
        for name, tensor in weights.items():
            tensor.copy_(start[name])
        ema = fastema.EMA({name: weights[name] for name in names}, **options)
        for step in range(3):
            for name, tensor in weights.items():
                tensor.copy_(start[name] * (1.3 + step))
            ema.update()
        return dict(ema.shadows[0])

    whole = shadow_of(list(shapes), 1)
    assert is_same(shadow_of(list(shapes), 2), whole)
    assert is_same(shadow_of(list(shapes), 4), whole)
    several = shadow_of(list(shapes), 3, decay=(0.999, 0.9, 0.5))  # with another chunk size
    assert is_same(several, whole)
    backwards = shadow_of(list(shapes)[::-1], 2)
    for name in shapes:
        assert torch.equal(shadow_of([name], 2)[name], whole[name])
        assert torch.equal(backwards[name], whole[name])
