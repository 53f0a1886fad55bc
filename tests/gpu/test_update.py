"""Updates of every pair of dtypes match the specification and the CPU, and write no more."""

from itertools import product
from typing import Any

import pytest
import torch

import fastema
from fastema.kernels.table import CHUNK

from ..average.stored import exact
from ..average.truth import Loop, arithmetic_of
from ..support import reference
from .given import (
    FLOATS,
    LAYOUTS,
    Expected,
    Twins,
    assert_all_equal,
    assert_equal_averages,
    host,
    run,
)

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

DECAY = 0.9
SEED = 2**35 + 3

PAIRS = list(product(FLOATS, FLOATS))
NARROW = ("bf16", "f16")


@pytest.mark.parametrize(
    ("model", "average", "rounding"),
    [
        *((model, average, "nearest") for model, average in PAIRS),
        *((model, average, "stochastic") for model, average in PAIRS if average in NARROW),
    ],
)
def test_every_pair_of_dtypes_matches_the_specification(
    device: torch.device, model: str, average: str, rounding: str
) -> None:
    given = Twins(LAYOUTS, FLOATS[model], device)
    options: dict[str, Any] = {
        "decay": DECAY,
        "shadow_dtype": average,
        "rounding": rounding,
        "seed": SEED,
    }
    given.refresh(0)
    ema, twin = (fastema.EMA(side, **options) for side in (given.there, given.here))
    random = rounding == "stochastic"
    expected = {
        name: Expected(tensor, name, seed=SEED, random=random)
        for name, tensor in ema.shadow.items()
    }
    loops = {
        name: Loop(exact(x.cpu()), average, arithmetic_of(model, average), random)
        for name, x in given.there.items()
    }
    for step in range(1, 4):
        run(given, [step], ema, twin)
        for name, weights in given.there.items():
            expected[name].update(weights, 1 - DECAY, step)
            expected[name].check(ema.shadow[name], name)
            loops[name].step(exact(weights.cpu()), 1 - DECAY)
            loops[name].check(exact(ema.shadow[name].cpu()), name)
    assert_equal_averages(ema, twin)
    given.assert_rest_untouched()


@pytest.mark.parametrize("weight", [0.0, 0.001, 0.75, 1.0])
@pytest.mark.parametrize(
    ("avg", "x"),
    [("f32", "f32"), ("f32", "bf16"), ("f32", "f16"), ("bf16", "bf16"), ("f16", "f16")],
)
def test_any_bit_patterns_match_the_specification(
    device: torch.device, avg: str, x: str, weight: float
) -> None:
    """NaN, infinities, subnormals and both zeros, on both sides."""
    dst, src = (
        Twins({"w": lambda new: new(70_001)[1:]}, FLOATS[code], device) for code in (avg, x)
    )
    for seed, side in enumerate((dst, src)):
        side.refresh(seed, "bits")
    want = reference.lerp(host(dst.there["w"]), host(src.there["w"]), weight, avg, x)
    fastema.Plan(dst.there, src.there).lerp_(weight)
    fastema.Plan(dst.here, src.here).lerp_(weight)
    assert_all_equal(dst.there, dst.here)
    Expected(dst.there["w"], "w").check(dst.there["w"], value=want)


SIZES = [1, 2, 7, 8, 9, 63, 64, 65, 255, 257, 2_047, CHUNK - 1, CHUNK, CHUNK + 1]
VIEWS = {
    f"{n} from {start}": lambda new, n=n, start=start: new(n + 12)[start : start + n]
    for n in SIZES
    for start in range(9)
}
"""Tensors of each size, at each offset from 16 bytes that their dtypes allow."""


@pytest.mark.parametrize(
    ("model", "average"), [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("f64", "f64")]
)
def test_any_size_and_alignment_matches_the_specification(
    device: torch.device, model: str, average: str
) -> None:
    dst, src = (Twins(VIEWS, FLOATS[code], device) for code in (average, model))
    for seed, side in enumerate((dst, src)):
        side.refresh(seed)
    want = {
        name: reference.lerp(host(dst.there[name]), host(x), 0.3, average, model)
        for name, x in src.there.items()
    }
    fastema.Plan(dst.there, src.there).lerp_(0.3)
    for name, tensor in dst.there.items():
        Expected(tensor, name).check(tensor, name, want[name])
    for side in (dst, src):
        side.assert_rest_untouched()


def test_integers_booleans_and_complex_numbers_keep_their_bits(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)

    def numbers(dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.randint(0, 2, (1_003,), generator=generator).bool()
        raw = torch.randint(0, 256, (1_003 * dtype.itemsize,), generator=generator)
        return raw.to(torch.uint8).view(dtype)

    def bytes_of(side: dict[str, torch.Tensor]) -> dict[str, bytes]:
        return {name: host(tensor).tobytes() for name, tensor in side.items()}

    dtypes = [
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.complex64, torch.complex128),
    ]
    one, other = ({str(d): numbers(d).to(device)[1:] for d in dtypes} for _ in range(2))
    before = bytes_of(one), bytes_of(other)
    fastema.swap_(one, other)
    assert (bytes_of(other), bytes_of(one)) == before
    fastema.copy_(one, other)
    assert bytes_of(one) == before[0]


def test_moved_weights_are_located_again(device: torch.device) -> None:
    given = Twins(LAYOUTS, torch.float32, device)
    given.refresh(0)
    weights = {name: torch.nn.Parameter(t.clone()) for name, t in given.there.items()}
    ema, twin = fastema.EMA(weights, DECAY), fastema.EMA(given.here, DECAY)
    for step in range(1, 5):
        given.refresh(step)
        for name, parameter in weights.items():
            old = parameter.data
            parameter.data = given.there[name].clone()
            old.fill_(float("nan"))
        ema.update()
        twin.update()
    assert_equal_averages(ema, twin)
