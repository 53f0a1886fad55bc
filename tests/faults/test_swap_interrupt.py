"""Ctrl-C at any moment: average, model and counters stay consistent, and nothing is lost."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import fastema

from ..shadow.kinds import KINDS, all_of, last, which
from .interrupts import every_place, rung_during

pytestmark = pytest.mark.torch


def bits(weights: Any) -> dict[str, bytes]:
    return {
        name: tensor.detach().clone().view(torch.uint8).numpy().tobytes()
        for name, tensor in weights.items()
    }


# Dtype of the weights, and what is built of them: one of each way to lie in memory, to be updated,
# and to change places with the weights.
CASES: dict[str, tuple[torch.dtype, Callable[..., Any]]] = {
    "f32 in bf16": (torch.bfloat16, lambda w: fastema.EMA(w, 0.75, shadow_dtype="float32")),
    "f64 in f16": (torch.float16, lambda w: fastema.EMA(w, 0.75, shadow_dtype="float64")),
    "mean": (torch.float32, KINDS["SMA"]),
    "two halves": (torch.float32, KINDS["split"]),
    "three halves": (torch.bfloat16, KINDS["three split"]),
}


class Case:
    """A dict of weights and its average, each with numbers of its own, and what they should be."""

    def __init__(
        self, weights: torch.dtype, build: Callable[..., Any], sizes: tuple[int, ...]
    ) -> None:
        torch.manual_seed(0)
        self.weights = {f"w{i}": torch.randn(size).to(weights) for i, size in enumerate(sizes)}
        self.weights["n"] = torch.arange(5)
        self.build = build
        self.average = build(self.weights)
        for _ in range(5):
            self.change_()
            self.average.update()
        self.change_()
        self.note()

    def change_(self) -> None:
        for tensor in self.weights.values():
            tensor.copy_((tensor * -2 + 1).clamp(-99, 99))

    def apply(self) -> None:
        self.average.apply_shadow(**which(self.average))

    def swapped(self) -> Any:
        return self.average.swapped(**which(self.average))

    def note(self) -> None:
        self.raw, self.all = bits(self.weights), all_of(self.average)
        with self.swapped():
            self.held = bits(self.weights)
        assert self.held != self.raw

    def settle(self) -> None:
        """Both sides agree with what the average says it is; then bring it back to rest."""
        assert all_of(self.average) == self.all
        if self.average.applied:
            assert bits(self.weights) == self.held
            self.average.restore()
        assert bits(self.weights) == self.raw
        assert all_of(self.average) == self.all
        self.usable_elsewhere()

    def usable_elsewhere(self) -> None:
        """No lock was left behind: another thread gets through."""
        thread = threading.Thread(target=lambda: (self.apply(), self.average.restore()))
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        assert not self.average.applied


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*CASES[request.param], sizes=(3, 70))


single = pytest.mark.parametrize("case", [c for c in CASES if c != "three halves"], indirect=True)
convertible = pytest.mark.parametrize(
    "case", ["f32 in bf16", "f64 in f16", "two halves"], indirect=True
)
"""A windowed mean keeps its dtype."""


def test_apply_interrupted_at_every_place(case: Case) -> None:
    every_place(case.apply, case.settle)


def test_restore_interrupted_at_every_place(case: Case) -> None:
    def check() -> None:
        case.settle()
        case.apply()

    case.apply()
    every_place(case.average.restore, check)


def test_block_interrupted_at_every_place(case: Case) -> None:
    """However it ends, the raw weights are back, or said to be due: Python itself may be stopped
    between the end of a block and what undoes it."""
    entered = []

    def block() -> None:
        with case.swapped():
            entered.append(bits(case.weights) == case.held)

    late = []

    def check() -> None:
        late.append(case.average.applied)
        if case.average.applied:
            case.average.restore()
        assert bits(case.weights) == case.raw
        case.settle()

    every_place(block, check)
    assert sum(late) < 10
    assert all(entered)
    assert entered


def test_update_interrupted_at_every_place(case: Case) -> None:
    """It was done, all parts of it, or it was not."""

    def both() -> tuple[dict[str, Any], dict[str, Any]]:
        twin = case.build(case.weights)
        twin.load_state_dict(case.average.state_dict())
        before = all_of(twin)
        twin.update()
        return before, all_of(twin)

    states = [both()]

    def check() -> None:
        (before, after), now = states.pop(), all_of(case.average)
        done = now["num_updates"] - before["num_updates"]
        assert now == (after if done else before)
        assert bits(case.weights) == case.raw
        assert not case.average.applied
        case.change_()
        case.note()
        states.append(both())

    every_place(case.average.update, check)


def test_update_without_work_interrupted_at_every_place() -> None:
    weights = [torch.randn(5)]
    ema = fastema.EMA(weights, 0.5, update_every=10**6)
    before = bits(ema.shadow)
    seen = [0]

    def check() -> None:
        assert ema.num_updates - seen[0] in (0, 1)
        seen[0] = ema.num_updates
        assert bits(ema.shadow) == before

    every_place(ema.update, check)


def test_skipped_update_interrupted_at_every_place() -> None:
    """Nothing is written; that it was skipped is counted once at most."""
    weights = {"w": torch.randn(70), "n": torch.arange(5)}
    ema = fastema.EMA(weights, 0.5, on_nonfinite="skip")
    before = bits(ema.shadow)
    weights["w"][69] = float("nan")
    weights["n"] += 1
    seen = [0]

    def check() -> None:
        assert ema.num_skipped - seen[0] in (0, 1)
        seen[0] = ema.num_skipped
        assert ema.num_updates == 0
        assert bits(ema.shadow) == before

    every_place(ema.update, check)
    assert seen[0] > 20


@single
def test_load_interrupted_at_every_place(case: Case) -> None:
    """Tensors and counters are all the old ones or all the new ones."""
    old, before = case.average.state_dict(), all_of(case.average)
    case.average.update()
    new, after = case.average.state_dict(), all_of(case.average)
    states = {before["num_updates"]: before, after["num_updates"]: after}
    case.average.load_state_dict(old)

    def check() -> None:
        assert all_of(case.average) == states[case.average.num_updates]
        case.average.load_state_dict(old)

    every_place(lambda: case.average.load_state_dict(new), check)


@convertible
def test_conversion_interrupted_at_every_place(case: Case) -> None:
    """The average is of the one dtype or of the other, and what is shown is what is updated."""
    average = case.average
    kept = average.state_dict()
    old = kept["shadow"][-1]["w0"].dtype
    back = "bf16+16" if "residual" in kept else old
    new = torch.float64
    if old == torch.float64:
        new = torch.complex64  # is refused

    def exact() -> dict[str, bytes]:
        target = {name: tensor.double() for name, tensor in case.weights.items() if name != "n"}
        target["n"] = case.weights["n"].clone()
        average.copy_to(target, **which(average))
        return bits(target)

    values = exact()

    def convert() -> None:
        with contextlib.suppress(fastema.errors.DTypeError):
            average.to(dtype=new)

    def check() -> None:
        assert exact() == values
        for name, tensor in last(average).items():
            assert tensor.dtype in (old, new) if name != "n" else torch.int64
        before = bits(last(average))
        average.update()
        assert bits(last(average))["w1"] != before["w1"]
        average.to(dtype=back)
        average.load_state_dict(kept)

    every_place(convert, check)


# -- real signals ---------------------------------------------------------------------------------

needs_timers = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
# An interrupt that arrives while Python runs a weak reference's callback is printed and dropped.
may_be_dropped = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MEGABYTE_SIZES = (700_000, 1, 300_001)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = fastema.get_num_threads()
    fastema.set_num_threads(2)
    yield
    fastema.set_num_threads(before)


@pytest.mark.slow
@needs_timers
@may_be_dropped
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", CASES)
def test_timers(name: str) -> None:
    case = Case(*CASES[name], sizes=MEGABYTE_SIZES)
    chance = random.Random(0)

    def several() -> None:
        for _ in range(3):
            case.apply()
            case.average.restore()
            with case.swapped():
                pass

    rung = 0
    for _ in range(40):
        rung += rung_during(chance.uniform(1e-5, 8e-3), several)
        assert all_of(case.average) == case.all
        if case.average.applied:
            assert bits(case.weights) == case.held
            case.average.restore()
        assert bits(case.weights) == case.raw
    assert rung
    case.settle()


@pytest.mark.slow
@needs_timers
@may_be_dropped
@pytest.mark.usefixtures("two_threads")
def test_timers_in_updates_count_what_was_done() -> None:
    """Each update halves the distance to 0: the values tell how many there were."""

    def fresh() -> fastema.EMA:
        weights = [torch.ones(700_000), torch.ones(300_001)]
        ema = fastema.EMA(weights, 0.5)
        for tensor in weights:
            tensor.zero_()
        return ema

    def four_updates(ema: fastema.EMA) -> None:
        for _ in range(4):
            ema.update()

    ema, chance = fresh(), random.Random(1)
    for _ in range(40):
        start = ema.num_updates
        rung_during(chance.uniform(1e-5, 4e-3), partial(four_updates, ema))
        assert start <= ema.num_updates <= start + 4
        for tensor in ema.shadow.values():
            assert torch.equal(tensor, torch.full_like(tensor, 0.5**ema.num_updates))
        if ema.num_updates > 100:
            ema = fresh()
