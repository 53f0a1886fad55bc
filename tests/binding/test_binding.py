"""Binding: matching, moved tensors, swaps."""

import signal
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import fastema
from fastema.binding.binding import Binding, Match
from fastema.binding.swap import CallableWay, MemorySwap, Swap, WriteWatch
from fastema.bridges.registry import describe
from fastema.compat.averager import ModelAverager
from fastema.engine.program import Program
from fastema.errors import LayoutError
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair
from fastema.layout.spec import Leaves

LERP = {"all": "lerp"}


def match_by_name(average: Leaves, model: Leaves) -> Match:
    found = {leaf.name: leaf.spec for leaf in model.items}
    pairs = [Pair(leaf.name, leaf.spec, found[leaf.name]) for leaf in average.items]
    return Match({"all": pairs}, average, model)


def run(binding: Binding, model: Any = None) -> None:
    with binding.current(model) as program:
        program.run(LERP, LaunchArgs((0.5,)))


@pytest.fixture
def sides(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    return tuple({name: rng.standard_normal(7) for name in "ab"} for _ in range(2))  # type: ignore[return-value]


def replace_b(x: dict[str, Any], rng: np.random.Generator) -> None:
    x["b"] = rng.standard_normal(7)


def test_failed_block_keeps_the_previous_model(
    sides: tuple[dict[str, Any], dict[str, Any]], rng: np.random.Generator
) -> None:
    avg, x = sides
    binding = Binding(avg, x, match_by_name)
    other = {name: rng.standard_normal(7) for name in x}
    with pytest.raises(ZeroDivisionError), binding.current(other):
        raise ZeroDivisionError
    assert binding.container is x
    run(binding, other)
    assert binding.container is other


def test_mismatched_model_changes_nothing(sides: tuple[dict[str, Any], dict[str, Any]]) -> None:
    avg, x = sides
    binding = Binding(avg, x, match_by_name)
    raw = {name: one.copy() for name, one in avg.items()}
    with pytest.raises(KeyError):
        run(binding, {"a": x["a"]})
    for name, one in raw.items():
        np.testing.assert_array_equal(avg[name], one)
    run(binding)


def test_cached_value_is_rebuilt_when_pairs_change(
    sides: tuple[dict[str, Any], dict[str, Any]], rng: np.random.Generator
) -> None:
    avg, x = sides
    binding, cached = Binding(avg, x, match_by_name), []
    for _ in range(3):
        with binding.current():
            binding.cached("one", lambda: cached.append(1))
    assert len(cached) == 1
    replace_b(x, rng)
    with binding.current():
        binding.cached("one", lambda: cached.append(1))
    assert len(cached) == 2


def test_overlapping_memory_is_refused() -> None:
    memory = np.arange(12.0)
    with pytest.raises(LayoutError, match=r"average of a .* overlap"):
        Binding({"a": memory[:8]}, {"a": memory[4:]}, match_by_name)


def test_jax_arrays_are_located_at_every_call_and_not_kept() -> None:
    jnp = pytest.importorskip("jax.numpy")
    avg = {"a": np.zeros(5)}
    binding = Binding(avg, {"a": jnp.ones(5)}, match_by_name)
    run(binding)
    run(binding, {"a": jnp.full(5, 3.0)})
    np.testing.assert_allclose(avg["a"], 0.5 * 0.5 + 1.5)
    assert all(pair.src.owner is None for pair in binding.pairs)
    assert binding.addresses == {}


class Way:
    def __init__(self, log: list[str], name: str, fails: bool = False) -> None:
        self.log, self.name, self.fails = log, name, fails

    def apply(self) -> None:
        if self.fails:
            raise ValueError(self.name)
        self.log.append(f"+{self.name}")

    def restore(self) -> None:
        self.log.append(f"-{self.name}")


def test_ways_are_undone_once_in_reverse_order() -> None:
    log: list[str] = []
    swap = Swap(Way(log, "a"), Way(log, "b"))
    for call in (swap.apply, swap.apply, swap.restore, swap.restore):
        call()
    assert log == ["+a", "+b", "-b", "-a"]
    assert not swap.applied


def test_failed_way_undoes_earlier_ways() -> None:
    log: list[str] = []
    swap = Swap(Way(log, "a"), Way(log, "b", fails=True), Way(log, "c"))
    with pytest.raises(ValueError, match="b"):
        swap.apply()
    assert log == ["+a", "-a"]
    assert not swap.applied


def test_failed_restore_can_be_repeated() -> None:
    log, failures = [], [OSError("busy")]

    def restore() -> None:
        if failures:
            raise failures.pop()
        log.append("-b")

    swap = Swap(Way(log, "a"), CallableWay(lambda: log.append("+b"), restore))
    swap.apply()
    with pytest.raises(OSError, match="busy"):
        swap.restore()
    assert swap.applied
    swap.restore()
    assert log == ["+a", "+b", "-a", "-b"]
    assert not swap.applied


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("when", ["apply", "restore"])
def test_interrupt_waits_for_the_end_of_apply_or_restore(when: str) -> None:
    log: list[str] = []

    def call(sign: str) -> None:
        if when == {"+": "apply", "-": "restore"}[sign]:
            signal.raise_signal(signal.SIGINT)
        log.append(sign)

    swap = Swap(CallableWay(lambda: call("+"), lambda: call("-")))
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
def test_swap_in_memory_restores_both_sides_to_the_bit(
    avg_dtype: str, x_dtype: str, rng: np.random.Generator
) -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    dtypes = [bfloat16 if code == "bf16" else np.dtype(code) for code in (avg_dtype, x_dtype)]
    avg, x = (rng.standard_normal(33).astype(dtype) for dtype in dtypes)
    raw = avg.tobytes(), x.tobytes()
    memory = MemorySwap([Pair("w", describe(avg), describe(x))])
    swap = Swap(memory)
    swap.apply()
    want: Any = np.frombuffer(raw[0], dtypes[0]).astype(np.float64)
    np.testing.assert_allclose(x.astype(np.float64), want, rtol=2.0**-8)
    assert x.tobytes() != raw[1]
    swap.restore()
    assert (avg.tobytes(), x.tobytes()) == raw
    assert memory.has_copies == (avg_dtype != x_dtype and (avg_dtype, x_dtype) != ("f4", "bf16"))


def make_immutable(kind: str, values: list[float]) -> object:
    """Return an immutable array."""
    if kind == "jax":
        return jnp.array(values, jnp.float32)
    array = np.array(values, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("kind", ["jax", "read-only"])
def test_swapped_yields_the_arrays_that_hold_the_average(kind: str) -> None:
    ema = fastema.EMA({"w": make_immutable(kind, [1.0, 2.0])}, decay=0.5)
    latest = {"w": np.array([3.0, 4.0], np.float32)}
    ema.update(latest)
    with ema.swapped() as weights:
        assert weights is latest
        np.testing.assert_array_equal(weights["w"], [2.0, 3.0])
    np.testing.assert_array_equal(latest["w"], [3.0, 4.0])


def test_swap_with_immutable_arrays_is_refused() -> None:
    plan = fastema.Plan([np.full(2, 3.0, np.float32)], [jnp.array([1.0, 2.0])])
    plan.lerp_(0.5)
    with pytest.raises(LayoutError, match="read-only"):
        plan.swap_()


@pytest.mark.torch
@pytest.mark.parametrize("fails", ["run", "begin"])
def test_swap_that_fails_midway_is_rolled_back(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 2)
    ema = fastema.EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight += 1
    ema.update()
    raw, average = model.weight.detach().clone(), ema.shadow["weight"].clone()
    holder = Program if fails == "run" else WriteWatch
    with monkeypatch.context() as patch:

        def broken(*_: object) -> None:
            raise MemoryError(fails)

        patch.setattr(holder, fails, broken)
        with pytest.raises(MemoryError):
            ema.apply_shadow()
    assert not ema.applied
    assert torch.equal(model.weight, raw)
    assert torch.equal(ema.shadow["weight"], average)
    with ema.swapped():
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, raw)


def test_failed_restore_of_one_way_still_undoes_the_others() -> None:
    undone: list[str] = []
    broken = [True]

    def restore() -> None:
        if broken:
            raise MemoryError("no room")
        undone.append("second")

    swap = Swap(
        CallableWay(lambda: None, lambda: undone.append("first")),
        CallableWay(lambda: None, restore),
        CallableWay(lambda: None, lambda: undone.append("third")),
    )
    swap.apply()
    with pytest.raises(MemoryError):
        swap.restore()
    assert undone == ["third", "first"]
    assert swap.applied
    broken.clear()
    swap.restore()
    assert undone == ["third", "first", "second"]
    assert not swap.applied


@pytest.mark.torch
def test_weights_are_restored_even_if_averages_cannot_be() -> None:
    model = torch.nn.Linear(3, 2)
    averaged = torch.nn.Linear(3, 2)
    raw = model.weight.detach().double()
    averager = ModelAverager(averaged)

    def move() -> None:
        with averager.swapped(model):
            model.double()
            del averaged.bias

    with pytest.raises(LayoutError, match="'bias' is gone"):
        move()
    assert torch.equal(model.weight.detach(), raw)
