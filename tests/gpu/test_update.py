"""Updates of every pair of dtypes: as specified, as on the CPU, and nothing else written."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import fastema
from fastema.kernels.table import CHUNK

from ..shadow.stored import exact
from ..shadow.truth import Loop, arithmetic_of
from ..support import reference
from .given import (
    FLAT,
    FLOATS,
    SPACED,
    Expected,
    Given,
    assert_all_equal,
    assert_equal,
    host,
)

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

DECAY = 0.9
SEED = 2**35 + 3

PAIRS = list(product(FLOATS, FLOATS))
ROUNDED = [(model, average) for model, average in PAIRS if average in ("bf16", "f16")]


def averages_of(given: Given, **options: Any) -> tuple[fastema.EMA, fastema.EMA]:
    """The same average on the device and on the CPU, of equal weights."""
    return fastema.EMA(given.there, **options), fastema.EMA(given.here, **options)


@pytest.mark.parametrize(
    ("model", "average", "rounding"),
    [(m, a, "nearest") for m, a in PAIRS] + [(m, a, "stochastic") for m, a in ROUNDED],
)
def test_every_pair(device: torch.device, model: str, average: str, rounding: str) -> None:
    given = Given(FLAT, FLOATS[model], device)
    given.refresh(0)
    options = {"decay": DECAY, "shadow_dtype": average, "rounding": rounding, "seed": SEED}
    ema, twin = averages_of(given, **options)
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
        given.refresh(step)
        ema.update()
        twin.update()
        for name, weights in given.there.items():
            expected[name].update(weights, 1 - DECAY, step)
            expected[name].check(ema.shadow[name], name)
            loops[name].step(exact(weights.cpu()), 1 - DECAY)
            loops[name].check(exact(ema.shadow[name].cpu()), name)
    assert_all_equal(ema.shadow, twin.shadow)
    given.assert_rest_untouched()


@pytest.mark.parametrize(
    ("model", "average"), [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("f64", "f16")]
)
def test_gaps_and_orders_of_axes(device: torch.device, model: str, average: str) -> None:
    given = Given(SPACED, FLOATS[model], device)
    given.refresh(0)
    ema, twin = averages_of(given, decay=DECAY, shadow_dtype=average)
    expected = {name: Expected(tensor, name) for name, tensor in ema.shadow.items()}
    for step in range(1, 4):
        given.refresh(step)
        ema.update()
        twin.update()
        for name, weights in given.there.items():
            expected[name].update(weights, 1 - DECAY, step)
            expected[name].check(ema.shadow[name], name)
    assert_all_equal(ema.shadow, twin.shadow)
    given.assert_rest_untouched()


@pytest.mark.parametrize("layouts", [FLAT, SPACED], ids=["flat", "spaced"])
@pytest.mark.parametrize("model", ["bf16", "f32"])
def test_an_average_in_two_halves(
    device: torch.device, model: str, layouts: dict[str, Any]
) -> None:
    given = Given(layouts, FLOATS[model], device)
    given.refresh(0)
    ema, twin = averages_of(given, decay=DECAY, shadow_dtype="bf16+16")
    whole = {name: Expected(x.float(), name) for name, x in given.there.items()}
    for step in range(1, 4):
        given.refresh(step)
        ema.update()
        twin.update()
        for name, weights in given.there.items():
            whole[name].update(weights, 1 - DECAY, step)
    for name, tensor in ema.shadow.items():
        high, _ = reference.split(whole[name].value)
        assert (host(tensor) == high).all(), name
    state, other = ema.state_dict(), twin.state_dict()
    for part in ("shadow", "residual"):
        assert_all_equal(state[part][0], other[part][0])


@pytest.mark.parametrize("weight", [0.0, 0.001, 0.75, 1.0])
@pytest.mark.parametrize(
    ("avg", "x"),
    [("f32", "f32"), ("f32", "bf16"), ("f32", "f16"), ("bf16", "bf16"), ("f16", "f16")],
)
def test_any_bits(device: torch.device, avg: str, x: str, weight: float) -> None:
    """NaN, infinities, subnormals, both zeros: as specified, on both sides."""
    sides = [Given({"w": lambda new: new(70_001)[1:]}, FLOATS[code], device) for code in (avg, x)]
    for seed, side in enumerate(sides):
        side.refresh(seed, "bits")
    dst, src = sides
    want = reference.lerp(host(dst.there["w"]), host(src.there["w"]), weight, avg, x)
    fastema.Plan(dst.there, src.there).lerp_(weight)
    fastema.Plan(dst.here, src.here).lerp_(weight)
    assert_all_equal(dst.there, dst.here)
    expected = Expected(dst.there["w"], "w")
    expected.value = want
    expected.check(dst.there["w"])


def views(length: int) -> dict[str, Any]:
    """Tensors of a size at each distance from 16 bytes that their dtypes allow."""
    return {
        f"{length} from {start}": lambda new, start=start: new(length + 12)[start : start + length]
        for start in range(9)
    }


SIZES = [1, 2, 7, 8, 9, 63, 64, 65, 255, 257, 2_047, CHUNK - 1, CHUNK, CHUNK + 1]


@pytest.mark.parametrize(
    ("model", "average"), [("f32", "f32"), ("bf16", "f32"), ("bf16", "bf16"), ("f64", "f64")]
)
def test_odd_sizes_and_offsets(device: torch.device, model: str, average: str) -> None:
    """Both sides begin anywhere: the flat average's places depend on what lies before."""
    layouts = {name: view for size in SIZES for name, view in views(size).items()}
    dst, src = (Given(layouts, FLOATS[code], device) for code in (average, model))
    for seed, side in enumerate((dst, src)):
        side.refresh(seed)
    want = {
        name: reference.lerp(host(dst.there[name]), host(x), 0.3, average, model)
        for name, x in src.there.items()
    }
    fastema.Plan(dst.there, src.there).lerp_(0.3)
    for name, tensor in dst.there.items():
        expected = Expected(tensor, name)
        expected.value = want[name]
        expected.check(tensor, name)
    for side in (dst, src):
        side.assert_rest_untouched()


@pytest.mark.parametrize(("avg", "x"), PAIRS)
def test_copies_write_every_element(device: torch.device, avg: str, x: str) -> None:
    """Into memory full of NaN, so that what was left out shows."""
    layouts = {**FLAT, **SPACED} if (avg, x) == ("f32", "bf16") else FLAT
    src = Given(layouts, FLOATS[x], device)
    dst = Given(layouts, FLOATS[avg], device)
    src.refresh(1)
    fastema.copy_(dst.there, src.there)
    for name, tensor in dst.there.items():
        expected = Expected(tensor, name)
        expected.value = reference.cast(host(src.there[name]), x, avg)
        expected.check(tensor, name)
    dst.assert_rest_untouched()


def test_integers_booleans_and_complex_numbers_keep_their_bits(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)

    def numbers(dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.randint(0, 2, (1_003,), generator=generator).bool()
        raw = torch.randint(0, 256, (1_003 * dtype.itemsize,), generator=generator)
        return raw.to(torch.uint8).view(dtype)

    dtypes = [
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.complex64, torch.complex128),
    ]
    one, other = ({str(d): numbers(d).to(device)[1:] for d in dtypes} for _ in range(2))
    before = [{name: host(t).tobytes() for name, t in side.items()} for side in (one, other)]
    fastema.swap_(one, other)
    after = [{name: host(t).tobytes() for name, t in side.items()} for side in (other, one)]
    assert before == after
    fastema.copy_(one, other)
    assert {name: host(t).tobytes() for name, t in one.items()} == after[0]


def test_a_thousand_small_tensors(device: torch.device) -> None:
    shapes = {f"t{i}": (1 + 37 * i % 61, 1 + (i * i + 11 * i) % 29) for i in range(1_000)}
    layouts = {name: lambda new, s=shape: new(*s) for name, shape in shapes.items()}
    given = Given(layouts, torch.bfloat16, device)
    given.refresh(0)
    ema, twin = averages_of(given, decay=(0.9, 0.99), shadow_dtype="float32")
    for step in range(1, 3):
        given.refresh(step)
        ema.update()
        twin.update()
    for one, other in zip(ema.shadows, twin.shadows, strict=True):
        assert_all_equal(one, other)


def test_weights_that_moved_are_found_again(device: torch.device) -> None:
    given = Given({**FLAT, **SPACED}, torch.float32, device)
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
    assert_all_equal(ema.shadow, twin.shadow)


def test_modules_and_their_buffers(device: torch.device) -> None:
    """Batch statistics are copied, counters exactly; frozen parameters take no part."""

    def network() -> torch.nn.Module:
        torch.manual_seed(5)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 7, 3), torch.nn.BatchNorm2d(7), torch.nn.Linear(7, 5)
        )
        net[2].bias.requires_grad_(False)
        return net.to(torch.bfloat16)

    here, there = network(), network().to(device)
    ema, twin = (fastema.EMA(net, DECAY, shadow_dtype="float32") for net in (there, here))
    assert set(ema.averaged_names) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}
    generator = torch.Generator().manual_seed(9)
    for step in range(1, 4):
        tensors = zip(here.state_dict().values(), there.state_dict().values(), strict=True)
        for one, other in tensors:
            if one.is_floating_point():
                one.normal_(generator=generator)
            else:
                one.fill_(2**40 + step)
            other.copy_(one)
        ema.update()
        twin.update()
        assert_all_equal(ema.shadow, twin.shadow)
    assert int(ema.shadow["1.num_batches_tracked"]) == 2**40 + 3
    assert_equal(ema.shadow["1.running_var"], there[1].running_var)
