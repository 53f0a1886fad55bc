"""Attacks on the host side of CUDA launches: memory freed while they wait, and exceptions."""

import gc
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastema
from fastema.rules import warmup

from ..support.stub_gpu import assert_equal, change_weights, gpu, shadow
from .late_device import MAIN, SIDE, THIRD, LateGpu, late

__all__ = ["gpu", "late"]


@pytest.mark.parametrize("stream", [MAIN, SIDE])
@pytest.mark.parametrize("capturable", [False, True])
def test_weights_freed_while_an_update_is_pending_are_averaged(
    late: LateGpu, stream: int, capturable: bool
) -> None:
    model = torch.nn.ParameterList([late.random(40, 7), late.random(5)])
    rule = warmup(0.9)
    ema = fastema.EMA(model, rule, capturable=capturable)
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    late.driver.late = True
    for step in range(1, 4):
        for parameter in model:  # only pending updates protect the old memory
            parameter.data = late.random(*parameter.shape)
        for name, parameter in model.named_parameters():
            want[name].lerp_(parameter.detach(), rule.weight(step))
        with late.on(stream):
            ema.update()
    late.assert_no_violations()
    for name, tensor in want.items():
        torch.testing.assert_close(ema.shadow[name], tensor)


def updates_on_three_streams(late: LateGpu) -> None:
    weights = [late.random(300), late.random(7, 3)]
    ema = fastema.EMA(weights, warmup(0.9))
    late.driver.late = True
    for k in range(6):
        with late.on((MAIN, SIDE, THIRD)[k % 3]):
            ema.update()


def calls_made_once(late: LateGpu) -> None:
    weights = [late.random(300), late.random(7, 3).bfloat16()]
    ema = fastema.EMA(weights, 0.5, shadow_dtype="float32")
    others = [late.random(300), late.random(7, 3).bfloat16()]
    late.driver.late = True
    with late.on(SIDE):
        ema.update()
        ema.copy_to(others)
        fastema.lerp_(others, weights, 0.5)
        ema.load_state_dict(ema.state_dict())


def a_clock_on_another_stream(late: LateGpu) -> None:
    ema = fastema.EMA([late.random(300)], warmup(0.9), capturable=True)
    late.driver.late = True
    with late.on(SIDE):
        ema.update()


def results_that_are_made_after_the_first_stream_is_known(late: LateGpu) -> None:
    ema = fastema.EMA([late.random(300)], 0.9, on_nonfinite="skip")
    with late.on(SIDE):
        ema.update()
    late.driver.late = True
    ema.update()


def a_ring_on_the_host(late: LateGpu) -> None:
    sma = fastema.SMA([late.random(300), late.random(7, 3)], 3, ring_device="cpu")
    late.driver.late = True
    for stream in (MAIN, SIDE, MAIN):
        with late.on(stream):
            sma.update()


def a_ring_on_the_host_that_is_dropped_in_a_capture(late: LateGpu) -> None:
    sma = fastema.SMA([late.random(300)], 3, ring_device="cpu")
    late.driver.late = True
    sma.update()
    with late.capture():
        del sma
        gc.collect()


@pytest.mark.parametrize(
    "scenario",
    [
        updates_on_three_streams,
        pytest.param(calls_made_once, marks=pytest.mark.slow),
        a_clock_on_another_stream,
        results_that_are_made_after_the_first_stream_is_known,
        a_ring_on_the_host,
        a_ring_on_the_host_that_is_dropped_in_a_capture,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_dropped_memory_is_kept_until_pending_work_is_done(
    late: LateGpu, scenario: Callable[[LateGpu], None]
) -> None:
    scenario(late)
    late.assert_no_violations()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_swapped_weights_may_be_restored_on_another_stream(
    late: LateGpu, dtype: torch.dtype
) -> None:
    """One dtype swaps, one parks, and one uses a spare buffer that is dropped at once."""
    weights = {"w": late.tensor(torch.randn(300).to(dtype))}
    ema = fastema.EMA(weights, 0.5, shadow_dtype="float32")
    change_weights(weights.values())
    ema.update()
    raw, average = weights["w"].clone(), shadow(ema)
    late.driver.late = True
    with late.on(SIDE):
        ema.apply_shadow()
    late.driver.finish()  # callers synchronize their own streams
    assert not torch.equal(weights["w"], raw)
    with late.on(THIRD):
        ema.restore()
    late.assert_no_violations()
    assert torch.equal(weights["w"], raw)
    assert_equal(shadow(ema), average)


@pytest.mark.slow
@pytest.mark.parametrize("capturable", [False, True])
def test_an_interrupt_waits_for_all_launches_of_an_update(late: LateGpu, capturable: bool) -> None:
    weights = [late.random(30), late.random(30).bfloat16(), late.random(3).double()]
    ema = fastema.EMA(weights, 0.5, capturable=capturable)
    ema.update()
    late.driver.take()
    launch = late.driver.launch

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return launch(*arguments)

    late.driver.launch = interrupted  # type: ignore[method-assign]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            ema.update()
    finally:
        signal.signal(signal.SIGINT, handler)
    late.driver.launch = launch  # type: ignore[method-assign]
    assert len(late.driver.take()) == 3 + capturable
    assert ema.num_updates == 2


HANDLERS = """
    import faulthandler, os, signal, sys
    faulthandler.dump_traceback_later(50, exit=True)
    import numpy as np
    from fastema.engine import cuda as engine
    from fastema.engine.program import Program
    from fastema.layout.group import Pair
    from fastema.layout.spec import TensorSpec
    from tests.support.stub_gpu import StubContext, StubDriver, stub_cubin

    driver = StubDriver()
    home = StubContext(0, driver)
    engine._driver = lambda: driver

    def program():
        arrays = [np.ones(3, np.float32) for _ in range(2)]
        specs = [TensorSpec(a.ctypes.data, (3,), (1,), "f32", "cuda:0", owner=a, context=home)
                 for a in arrays]
        return Program({"all": [Pair("w", *specs)]})

    one, other = program(), program()

    def save(*_):
        other.run({"all": "copy"})
        one.run({"all": "copy"})
        print("saved")

    wanted = getattr(signal, sys.argv[1])
    signal.signal(wanted, save)

    def slow(key):
        if key.operation == "lerp":
            os.kill(os.getpid(), wanted)
        return stub_cubin(key)

    engine.cubin = slow
    launch = driver.launch

    def interrupted(key, *rest):
        if key.operation == "lerp":
            os.kill(os.getpid(), wanted)
        return launch(key, *rest)

    driver.launch = interrupted
    one.run({"all": "lerp"})
    print("done")
"""


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_signal_handler_that_saves_does_not_deadlock(name: str, python: Callable[..., str]) -> None:
    """The signal arrives during a compilation, and again during a launch."""
    assert python(HANDLERS, name, timeout=60.0).split() == ["saved", "saved", "done"]
