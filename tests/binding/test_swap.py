"""A swap runs each way once, undoes it once, and undoes what was done if one fails."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest

from fastema.binding.swap import Calls, InMemory, Swap
from fastema.bridges.registry import describe
from fastema.layout.group import Pair


class Way:
    def __init__(self, log: list[str], name: str, fails: bool = False) -> None:
        self.log, self.name, self.fails = log, name, fails

    def apply(self) -> None:
        if self.fails:
            raise ValueError(self.name)
        self.log.append(f"+{self.name}")

    def restore(self) -> None:
        self.log.append(f"-{self.name}")


def test_ways_are_undone_in_the_other_order_and_once() -> None:
    log: list[str] = []
    swap = Swap(Way(log, "a"), Way(log, "b"))
    for call in (swap.apply, swap.apply, swap.restore, swap.restore):
        call()
    assert log == ["+a", "+b", "-b", "-a"]
    assert not swap.applied


def test_a_way_that_fails_undoes_those_before() -> None:
    log: list[str] = []
    swap = Swap(Way(log, "a"), Way(log, "b", fails=True), Way(log, "c"))
    with pytest.raises(ValueError, match="b"):
        swap.apply()
    assert log == ["+a", "-a"]
    assert not swap.applied


def test_a_restore_that_fails_can_be_called_again() -> None:
    log, failures = [], [OSError("busy")]

    def restore() -> None:
        if failures:
            raise failures.pop()
        log.append("-b")

    swap = Swap(Way(log, "a"), Calls(lambda: log.append("+b"), restore))
    swap.apply()
    with pytest.raises(OSError, match="busy"):
        swap.restore()
    assert swap.applied
    swap.restore()
    assert log == ["+a", "+b", "-a", "-b"]
    assert not swap.applied


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("when", ["apply", "restore"])
def test_an_interrupt_waits_for_the_end_of_either(when: str) -> None:
    log: list[str] = []

    def call(sign: str) -> None:
        if when == {"+": "apply", "-": "restore"}[sign]:
            signal.raise_signal(signal.SIGINT)
        log.append(sign)

    swap = Swap(Calls(lambda: call("+"), lambda: call("-")))
    try:
        swap.apply()
        swap.restore()
    except KeyboardInterrupt:
        assert log == ["+"] if when == "apply" else ["+", "-"]
    else:
        pytest.fail("the interrupt was lost")
    swap.restore()
    assert log == ["+", "-"]


PAIRS = [("f4", "f4"), ("f8", "f4"), ("f4", "f8"), ("f2", "f4"), ("f4", "bf16"), ("bf16", "f4")]


@pytest.mark.parametrize(("avg_dtype", "x_dtype"), PAIRS)
def test_memory_comes_back_to_the_bit(
    avg_dtype: str, x_dtype: str, rng: np.random.Generator
) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    dtypes = [bfloat16 if code == "bf16" else np.dtype(code) for code in (avg_dtype, x_dtype)]
    avg, x = (rng.standard_normal(33).astype(dtype) for dtype in dtypes)
    raw = avg.tobytes(), x.tobytes()
    memory = InMemory([Pair("w", describe(avg), describe(x))])
    swap = Swap(memory)
    swap.apply()
    want: Any = np.frombuffer(raw[0], dtypes[0]).astype(np.float64)
    np.testing.assert_allclose(x.astype(np.float64), want, rtol=2.0**-8)
    assert x.tobytes() != raw[1]
    swap.restore()
    assert (avg.tobytes(), x.tobytes()) == raw
    assert memory.has_copies == (avg_dtype != x_dtype and (avg_dtype, x_dtype) != ("f4", "bf16"))
