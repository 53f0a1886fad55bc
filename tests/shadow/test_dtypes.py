"""Every pair of weights' dtype and average's dtype against a float64 loop."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastema  # noqa: E402
from fastema.errors import DTypeError, LayoutError, PrecisionWarning  # noqa: E402

from .truth import Loop, arithmetic_of  # noqa: E402
from .weights import FLOATS, bits, net, refresh_  # noqa: E402

pytestmark = pytest.mark.torch

COMPLEX = {"c64": torch.complex64, "c128": torch.complex128}
REAL_PART = {"c64": "f32", "c128": "f64"}
SHAPES = [(), (1,), (63,), (64,), (130,), (7, 11), (2, 3, 5), (0, 4)]
DECAY, UPDATES = 0.9, 60


def real(tensor: torch.Tensor) -> np.ndarray:
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return parts.detach().double().numpy()


def run_pair(weights: torch.dtype, stored: torch.dtype, code: str, arithmetic: str) -> None:
    params = [torch.empty(shape, dtype=weights) for shape in SHAPES]
    refresh_(params, 0)
    ema = fastema.EMA(params, DECAY, shadow_dtype=stored)
    loops = [Loop(real(p), code, arithmetic) for p in params]
    for n in range(1, UPDATES + 1):
        refresh_(params, n)
        ema.update()
        for loop, p in zip(loops, params, strict=True):
            loop.step(real(p), 1 - DECAY)
    assert ema.num_updates == UPDATES
    for name, loop in zip(ema.shadow, loops, strict=True):
        assert ema.shadow[name].dtype == stored
        loop.check(real(ema.shadow[name]), name)


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("weights", FLOATS)
def test_equals_a_float64_loop(weights: str, stored: str) -> None:
    run_pair(FLOATS[weights], FLOATS[stored], stored, arithmetic_of(weights, stored))


@pytest.mark.parametrize("stored", COMPLEX)
@pytest.mark.parametrize("weights", COMPLEX)
def test_complex_equals_a_float64_loop(weights: str, stored: str) -> None:
    code = REAL_PART[stored]
    run_pair(COMPLEX[weights], COMPLEX[stored], code, arithmetic_of(REAL_PART[weights], code))


@pytest.mark.parametrize("name", ["float32", "f32", torch.float32])
def test_shadow_dtype_is_a_name_or_a_dtype(name: object) -> None:
    ema = fastema.EMA(net(0, torch.bfloat16), shadow_dtype=name)
    assert ema.shadow["conv.weight"].dtype == torch.float32


def test_float_shadow_dtype_makes_complex_averages_complex() -> None:
    params = {"a": torch.randn(5, dtype=torch.complex128), "b": torch.randn(5).double()}
    ema = fastema.EMA(params, shadow_dtype=torch.float32)
    assert ema.shadow["a"].dtype == torch.complex64
    assert ema.shadow["b"].dtype == torch.float32


def test_one_average_of_many_dtypes() -> None:
    params = {code: torch.empty(70, dtype=dtype) for code, dtype in {**FLOATS, **COMPLEX}.items()}
    params["count"] = torch.empty(9, dtype=torch.int64)
    refresh_(params, 0)
    ema = fastema.EMA(params, DECAY)
    loops = {
        code: Loop(
            real(p), REAL_PART.get(code, code), "f32" if code not in ("f64", "c128") else "f64"
        )
        for code, p in params.items()
        if code != "count"
    }
    for n in range(1, 20):
        refresh_(params, n)
        ema.update()
        for code, loop in loops.items():
            loop.step(real(params[code]), 1 - DECAY)
    for code, loop in loops.items():
        assert ema.shadow[code].dtype == params[code].dtype
        loop.check(real(ema.shadow[code]), code)
    assert torch.equal(ema.shadow["count"], params["count"])


SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool]


@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED])
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


def test_half_average_of_complex_weights_is_refused_by_name() -> None:
    params = {"fine": torch.randn(3), "phase": torch.randn(3, dtype=torch.complex64)}
    with pytest.raises(DTypeError, match="phase"):
        fastema.EMA(params, shadow_dtype=torch.bfloat16)


def test_only_integers_is_nothing_to_average() -> None:
    with pytest.raises(LayoutError, match="nothing to average"):
        fastema.EMA([torch.arange(4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_warning_where_most_updates_are_lost(dtype: torch.dtype) -> None:
    with pytest.warns(PrecisionWarning, match="float32"):
        fastema.EMA(net(0, dtype), 0.999)


@pytest.mark.parametrize("update_every", [1, 3, 7, 1000])
def test_no_warning_where_updates_are_kept(update_every: int) -> None:
    # Warnings are errors in this suite.
    fastema.EMA(net(0, torch.bfloat16), 0.5, update_every=update_every)
    fastema.EMA(net(0, torch.bfloat16), 0.999, shadow_dtype="float32", update_every=update_every)
    fastema.EMA(net(), 0.9999, update_every=update_every)


def test_narrow_average_moves_as_long_as_updates_round_to_something() -> None:
    x = torch.full((100,), 1.0, dtype=torch.bfloat16)
    ema = fastema.EMA([x], 0.9)
    x.fill_(2.0)
    for _ in range(100):
        ema.update()
    # It stops where a tenth of the distance is below half a unit in the last place.
    assert 2.0 - 5 * 2.0**-7 <= ema.shadow["0"][0].item() <= 2.0


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_special_values(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, inf, nan]).to(dtype)
    ema = fastema.EMA([x], 0.5)
    x.copy_(torch.tensor([inf, -inf, nan, 1.0, inf, 1.0]))
    ema.update()
    expected = torch.tensor([inf, -inf, nan, 1.0, nan, nan]).to(dtype)
    torch.testing.assert_close(ema.shadow["0"], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_subnormals_are_not_flushed(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    x = torch.full((130,), tiny, dtype=dtype)
    ema = fastema.EMA([x], 0.5)
    x.zero_()
    ema.update()
    assert torch.equal(bits(ema.shadow["0"]), bits(torch.full((130,), tiny / 2, dtype=dtype)))


def test_changing_the_dtype_of_the_model_keeps_that_of_the_average() -> None:
    model = net()
    ema = fastema.EMA(model, DECAY)
    loop = Loop(real(model.hidden.weight), "f32", "f32")
    for n, change in enumerate([model.bfloat16, model.half, model.double, model.float], 1):
        change()
        refresh_(model, n)
        ema.update()
        loop.step(real(model.hidden.weight), 1 - DECAY)
        assert ema.shadow["hidden.weight"].dtype == torch.float32
    loop.check(real(ema.shadow["hidden.weight"]))


def test_to_changes_the_dtype_of_averaged_tensors_only() -> None:
    model = net()
    ema = fastema.EMA(model, DECAY)
    refresh_(model, 1)
    ema.update()
    before = {name: tensor.clone() for name, tensor in ema.shadow.items()}
    assert ema.to(dtype=torch.float64) is ema
    for name, tensor in ema.shadow.items():
        average = name in dict(model.named_parameters())
        assert tensor.dtype == (torch.float64 if average else before[name].dtype)
        torch.testing.assert_close(tensor.to(before[name].dtype), before[name], rtol=0, atol=0)
    refresh_(model, 2)
    ema.update()
    expected = before["hidden.bias"].double().lerp(model.hidden.bias.detach().double(), 1 - DECAY)
    torch.testing.assert_close(ema.shadow["hidden.bias"], expected)
