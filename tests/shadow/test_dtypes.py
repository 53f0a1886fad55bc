"""Every pair of weights' dtype and average's dtype against a float64 loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import DTypeError

from .kinds import KINDS, all_of, three
from .truth import Loop, arithmetic_of
from .weights import FLOATS, bits, net, refresh_, train_

pytestmark = pytest.mark.torch

COMPLEX = {"c64": torch.complex64, "c128": torch.complex128}
REAL_PART = {"c64": "f32", "c128": "f64"}
SHAPES = [(), (1,), (63,), (64,), (130,), (7, 11), (2, 3, 5), (0, 4)]
NARROW = {"bf16": torch.bfloat16, "f16": torch.float16}
DECAY, UPDATES = 0.9, 60


def real(tensor: torch.Tensor) -> np.ndarray:
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return parts.detach().double().numpy()


KEPT = [(w, s, r) for w in FLOATS for s in FLOATS for r in (None, "nearest")]
KEPT += [(w, s, None) for w in COMPLEX for s in COMPLEX]


@pytest.mark.parametrize(("weights", "stored", "rounding"), KEPT)
def test_equals_a_float64_loop(weights: str, stored: str, rounding: str | None) -> None:
    dtypes, code = {**FLOATS, **COMPLEX}, REAL_PART.get(stored, stored)
    params = [torch.empty(shape, dtype=dtypes[weights]) for shape in SHAPES]
    refresh_(params, 0)
    ema = fastema.EMA(params, DECAY, shadow_dtype=dtypes[stored], rounding=rounding)
    arithmetic = arithmetic_of(REAL_PART.get(weights, weights), code)
    random = code in NARROW and rounding != "nearest"
    loops = [Loop(real(p), code, arithmetic, random) for p in params]
    for n in range(1, UPDATES + 1):
        refresh_(params, n)
        ema.update()
        for loop, p in zip(loops, params, strict=True):
            loop.step(real(p), 1 - DECAY)
    assert ema.num_updates == UPDATES
    for name, loop in zip(ema.shadow, loops, strict=True):
        assert ema.shadow[name].dtype == dtypes[stored]
        loop.check(real(ema.shadow[name]), name)


WHOLE = [torch.bool, *(getattr(torch, f"{u}int{n}") for u in ("", "u") for n in (8, 16, 32, 64))]


@pytest.mark.parametrize("dtype", WHOLE)
def test_integers_and_booleans_are_copied_exactly(dtype: torch.dtype) -> None:
    params = {"w": torch.randn(5), "n": torch.randint(0, 2, (333,)).to(dtype)}
    ema = fastema.EMA(params, 0.999, shadow_dtype=torch.float64)
    refresh_(params, 7)
    if dtype == torch.int64:
        params["n"][0] = 2**53 + 1  # not a float64
    ema.update()
    assert ema.shadow["n"].dtype == dtype
    assert torch.equal(ema.shadow["n"], params["n"])


@pytest.mark.parametrize("shadow_dtype", [torch.int32, torch.bool, "int8", "nonsense", "c64"])
def test_shadow_dtype_that_cannot_hold_weights(shadow_dtype: object) -> None:
    with pytest.raises(DTypeError):
        fastema.EMA(net(), shadow_dtype=shadow_dtype)


def test_random_bits_are_the_default_of_narrow_averages_and_of_no_others() -> None:
    def bits_of(dtype: torch.dtype, **options: object) -> torch.Tensor:
        x = [torch.ones(500)]
        ema = fastema.EMA(x, 0.9, shadow_dtype=dtype, **options)
        refresh_(x, 1)
        ema.update()
        return bits(ema.shadow["0"])

    for dtype in FLOATS.values():
        default, nearest = bits_of(dtype), bits_of(dtype, rounding="nearest")
        assert torch.equal(default, bits_of(dtype, rounding="stochastic"))
        assert torch.equal(default, nearest) == (dtype.itemsize > 2)
        assert torch.equal(default, bits_of(dtype, seed=7)) == (dtype.itemsize > 2)
        assert torch.equal(nearest, bits_of(dtype, rounding="nearest", seed=7))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_special_values(dtype: torch.dtype, rounding: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, inf, nan]).to(dtype)
    ema = fastema.EMA([x], 0.5, rounding=rounding)
    x.copy_(torch.tensor([inf, -inf, nan, 1.0, inf, 1.0]))
    ema.update()
    expected = torch.tensor([inf, -inf, nan, 1.0, nan, nan]).to(dtype)
    torch.testing.assert_close(ema.shadow["0"], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_device_takes_all_of_an_average_along(kind: str) -> None:
    """In whatever order of axes, and the run goes on to the bit."""
    weights = [torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last), torch.randn(6, 9).t()]
    average, twin = KINDS[kind](weights), KINDS[kind](weights)
    for n in range(1, 12):
        refresh_(weights, n)
        average.update()
        twin.update()
        if n in (2, 7):
            before = all_of(average)
            assert average.to("cpu") is average
            assert all_of(average) == before
            held = average.state_dict(copy=False)["shadow"][-1]
            assert held["0"].stride() == weights[0].stride()
        assert all_of(average) == all_of(twin)


CHANGES = [("float32", "bf16+16"), ("bf16+16", "float64"), ("bf16+16", "bfloat16")]
CHANGES += [("float64", "bf16+16"), ("bfloat16", "bf16+16"), ("bf16+16", "bf16+16")]


@pytest.mark.parametrize(("old", "new"), CHANGES)
@pytest.mark.parametrize("build", [fastema.EMA, three], ids=["EMA", "three"])
def test_to_two_halves_and_back(build: object, old: str, new: str) -> None:
    """Both together are converted, not the one that is seen; then the run goes on in the other."""
    model = net()
    average = build(model, shadow_dtype=old)
    train_(model, range(1, 6), average)

    def exact(which: int) -> dict[str, torch.Tensor]:
        target = net(3, torch.float64)
        average.copy_to(target, which=which)
        return {name: p.detach() for name, p in target.named_parameters()}

    before = [exact(which) for which in range(len(average.shadows))]
    average.to(dtype=new)
    kept = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(new, torch.float32)
    for which, old_values in enumerate(before):
        for name, value in exact(which).items():
            assert torch.equal(value, old_values[name].to(kept).double())
    assert ("residual" in average.state_dict()) == (new == "bf16+16")
    state = average.state_dict()
    twin = build(model, shadow_dtype=new)
    twin.load_state_dict(state)
    refresh_(model, 9)
    average.update()
    twin.update()
    assert all_of(average) == all_of(twin)


def test_what_cannot_be_in_two_halves_is_refused() -> None:
    weights = {"fine": torch.randn(3), "phase": torch.randn(3, dtype=torch.complex64)}
    with pytest.raises(DTypeError, match=r"phase: .*c64 weights cannot be in two halves"):
        fastema.EMA(weights, shadow_dtype="bf16+16")
    with pytest.raises(DTypeError, match=r"windowed.*halves"):
        fastema.SMA(net(), shadow_dtype="bf16+16")
    ema = fastema.EMA(weights)
    with pytest.raises(DTypeError, match=r"c64.*halves"):
        ema.to(dtype="bf16+16")
    ema.update()
