"""The CuPy bridge on a stub of CuPy: host arrays, and the GPU kernels' code run on the host."""

from typing import Any

import numpy as np
import pytest

import fastema
from fastema.bridges import registry
from fastema.errors import BridgeError, DTypeError, StateError

from ..average.truth import Loop
from ..support.mixed import CODES, draw_arrays
from ..support.stub_cupy import Device, Stream, array, cupy, ndarray
from ..support.stub_gpu import StubDriver

NEEDS = ("torch",)
__all__ = ["cupy"]
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("cupy")]


def to_gpu(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: array(one) for name, one in arrays.items()}


def bits(weights: Any) -> dict[str, bytes]:
    return {name: one.there.tobytes() for name, one in weights.items()}


def array_of_fours() -> list[Any]:
    return [array(np.full(100, 4.0, np.float32))]


def test_views_are_read_in_place_and_unusable_arrays_are_named() -> None:
    whole = array(np.arange(40.0))
    rows = ndarray((4, 3), np.float64, whole.data + 16, (80, 8))
    spec = registry.describe(rows)
    assert (spec.address, spec.strides, spec.dtype) == (whole.data.ptr + 16, (10, 1), "f64")
    assert (spec.device, spec.writable, spec.owner) == ("cuda:0", True, rows)
    np.testing.assert_array_equal(fastema.EMA([rows], 0.5).shadow["0"].there, rows.there)
    odd_steps = ndarray((3,), np.float32, array(np.ones(9)).data, (6,))
    for odd, message in ((array(np.zeros(3, "M8[s]")), "datetime64"), (odd_steps, "strides")):
        with pytest.raises((BridgeError, DTypeError), match=rf"^odd: .*{message}"):
            fastema.EMA({"fine": array(np.ones(2)), "odd": odd}, 0.5)


@pytest.mark.each_value
@pytest.mark.parametrize("stored", ["f32", "bf16"])
@pytest.mark.parametrize("weights", ["f32", "bf16"])
def test_average_equals_a_float64_loop_and_swaps_are_exact(weights: str, stored: str) -> None:
    held = to_gpu(draw_arrays(0, weights))
    ema = fastema.EMA(held, 0.9, shadow_dtype=CODES[stored])
    loops = {n: Loop(x.there, stored, "f32", stored == "bf16") for n, x in held.items()}
    for n in range(1, 6):
        new = draw_arrays(n, weights)
        if n == 3:
            held.update(to_gpu(new))  # replaced arrays are found
        for name, one in held.items():
            one.there[...] = new[name]
        before = bits(held)
        ema.update()
        assert bits(held) == before
        for name, loop in loops.items():
            loop.step(new[name], 1 - 0.9)
    for name, loop in loops.items():
        assert type(ema.shadow[name]) is ndarray
        assert ema.shadow[name].dtype == CODES[stored]
        loop.check(ema.shadow[name].there.astype(np.float64), name)
    later = fastema.EMA(held, 0.5, shadow_dtype=CODES[stored])
    later.load_state_dict(ema.state_dict())
    raw, average = bits(held), bits(ema.shadow)
    assert bits(later.shadow) == average
    for _ in range(2):
        with ema.swapped():
            for name, one in held.items():
                close = ema.shadow[name].there.astype(np.float64)
                np.testing.assert_allclose(one.there.astype(np.float64), close, rtol=2**-7)
        assert bits(held) == raw
        assert bits(ema.shadow) == average


def test_updates_run_on_the_arrays_device_and_its_stream(cupy: StubDriver) -> None:
    with Device(1):
        weights = [array(np.arange(1.0, 9.0, dtype=np.float32))]
    ema = fastema.EMA(weights, 0.5)
    cupy.take()
    weights[0].there[...] = 0
    ema.update()
    assert {stream for *_, stream in cupy.take()} == {5001}
    assert ema.shadow["0"].device.id == 1
    np.testing.assert_array_equal(ema.shadow["0"].there, np.arange(1.0, 9.0) / 2)


def test_update_does_not_wait_but_get_does(cupy: StubDriver) -> None:
    weights = array_of_fours()
    ema = fastema.EMA(weights, 0.5)
    ema.update()
    before, cupy.pending = Stream.waits, []
    weights[0].there[...] = 8
    ema.update()
    assert Stream.waits == before
    np.testing.assert_array_equal(ema.shadow["0"].there, 4)
    np.testing.assert_array_equal(ema.shadow["0"].get(), 6)


def test_calls_that_wait_are_refused_in_a_capture(
    cupy: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = array_of_fours()
    ema = fastema.EMA(weights, 0.5)
    ema.update()
    spec = registry.describe(weights[0])
    assert spec.context is not None
    there, _ = spec.context.upload(np.ones(3))
    monkeypatch.setattr(Stream, "captured", True)
    for call in (
        spec.context.wait,
        lambda: spec.context.upload(np.ones(3)),
        lambda: spec.context.download(there),
        lambda: spec.context.write(there, np.ones(3)),
    ):
        with pytest.raises(StateError, match=r"cuda:0: .* while a graph is captured"):
            call()
