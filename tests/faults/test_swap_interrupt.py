"""Ctrl-C at any moment: average, model and counters stay consistent, and nothing is lost."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fastema  # noqa: E402

from .interrupts import every_place, rung_during  # noqa: E402

pytestmark = pytest.mark.torch


def bits(weights: Any) -> dict[str, bytes]:
    return {
        name: tensor.detach().clone().view(torch.uint8).numpy().tobytes()
        for name, tensor in weights.items()
    }


DTYPES = {
    "f32 in f32": (torch.float32, torch.float32),
    "f32 in bf16": (torch.bfloat16, torch.float32),
    "f64 in f16": (torch.float16, torch.float64),
}


class Case:
    """A dict of weights and its average, each with numbers of its own, and what they should be."""

    def __init__(self, weights: torch.dtype, stored: torch.dtype, sizes: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.weights = {f"w{i}": torch.randn(size).to(weights) for i, size in enumerate(sizes)}
        self.weights["n"] = torch.arange(5)
        self.ema = fastema.EMA(self.weights, 0.75, shadow_dtype=stored)
        self.change_()
        self.ema.update()
        self.change_()
        self.note()

    def change_(self) -> None:
        for tensor in self.weights.values():
            tensor.copy_(tensor * -2 + 1)

    def note(self) -> None:
        self.raw, self.average = bits(self.weights), bits(self.ema.shadow)
        self.updates = self.ema.num_updates
        with self.ema.swapped():
            self.held = bits(self.weights)
        assert len({*map(str, (self.raw, self.average, self.held))}) >= 2

    def settle(self) -> None:
        """Both sides agree with what the average says it is; then bring it back to rest."""
        assert bits(self.ema.shadow) == self.average
        assert bits(self.ema.state_dict()["shadow"][0]) == self.average
        if self.ema.applied:
            assert bits(self.weights) == self.held
            self.ema.restore()
        assert bits(self.weights) == self.raw
        assert bits(self.ema.shadow) == self.average
        assert self.ema.num_updates == self.updates
        self.usable_elsewhere()

    def usable_elsewhere(self) -> None:
        """No lock was left behind: another thread gets through."""
        thread = threading.Thread(target=lambda: (self.ema.apply_shadow(), self.ema.restore()))
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        assert not self.ema.applied


@pytest.fixture(params=DTYPES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*DTYPES[request.param], sizes=(3, 70))


def test_apply_interrupted_at_every_place(case: Case) -> None:
    every_place(case.ema.apply_shadow, case.settle)


def test_restore_interrupted_at_every_place(case: Case) -> None:
    def check() -> None:
        case.settle()
        case.ema.apply_shadow()

    case.ema.apply_shadow()
    every_place(case.ema.restore, check)


def test_block_interrupted_at_every_place(case: Case) -> None:
    """However it ends, the raw weights are back, or said to be due: Python itself may be stopped
    between the end of a block and what undoes it."""
    entered = []

    def block() -> None:
        with case.ema.swapped():
            entered.append(bits(case.weights) == case.held)

    late = []

    def check() -> None:
        late.append(case.ema.applied)
        if case.ema.applied:
            case.ema.restore()
        assert bits(case.weights) == case.raw
        case.settle()

    every_place(block, check)
    assert sum(late) < 10
    assert all(entered)
    assert entered


def test_update_interrupted_at_every_place(case: Case) -> None:
    def check() -> None:
        done = case.ema.num_updates
        assert done in (case.updates, case.updates + 1)
        if done == case.updates:
            assert bits(case.ema.shadow) == case.average
        else:
            assert bits(case.ema.shadow) == expected()
        assert bits(case.weights) == case.raw
        assert not case.ema.applied
        case.change_()
        case.note()

    def expected() -> dict[str, bytes]:
        twin = fastema.EMA(case.weights, 0.75, shadow_dtype=case.ema.shadow["w0"].dtype)
        state = twin.state_dict()
        for name, tensor in state["shadow"].items():
            tensor.copy_(torch.frombuffer(bytearray(case.average[name]), dtype=tensor.dtype))
        twin.load_state_dict(state)
        twin.update()
        return bits(twin.shadow)

    every_place(case.ema.update, check)


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


def test_load_interrupted_at_every_place(case: Case) -> None:
    """Tensors and counters are both the old ones or both the new ones."""
    old = case.ema.state_dict()
    old["shadow"] = {name: tensor.clone() for name, tensor in old["shadow"].items()}
    case.ema.update()
    new = case.ema.state_dict()
    new["shadow"] = {name: tensor.clone() for name, tensor in new["shadow"].items()}
    states = {old["num_updates"]: bits(old["shadow"]), new["num_updates"]: bits(new["shadow"])}
    case.ema.load_state_dict(old)

    def check() -> None:
        assert bits(case.ema.shadow) == states[case.ema.num_updates]
        case.ema.load_state_dict(old)

    every_place(lambda: case.ema.load_state_dict(new), check)


def test_conversion_interrupted_at_every_place(case: Case) -> None:
    """The average is of the one dtype or of the other, and what is shown is what is updated."""
    dtypes = [case.ema.shadow["w0"].dtype, torch.float64]
    if dtypes[0] == torch.float64:
        dtypes[1] = torch.complex64  # is refused
    old = {name: tensor.double() for name, tensor in case.ema.shadow.items()}

    def convert() -> None:
        with contextlib.suppress(fastema.errors.DTypeError):
            case.ema.to(dtype=dtypes[1])

    def check() -> None:
        for name, tensor in case.ema.shadow.items():
            assert tensor.dtype in (*dtypes, torch.int64)
            assert torch.equal(tensor.double(), old[name])
        state = case.ema.state_dict()
        before = bits(case.ema.shadow)
        state["shadow"] = {name: tensor.clone() for name, tensor in state["shadow"].items()}
        case.ema.update()
        assert bits(case.ema.shadow)["w1"] != before["w1"]
        case.ema.load_state_dict(state)
        case.ema.to(dtype=dtypes[0])

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
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_timers(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = Case(*dtypes, sizes=MEGABYTE_SIZES)
    chance = random.Random(0)

    def several() -> None:
        for _ in range(3):
            case.ema.apply_shadow()
            case.ema.restore()
            with case.ema.swapped():
                pass

    rung = 0
    for _ in range(40):
        rung += rung_during(chance.uniform(1e-5, 8e-3), several)
        assert bits(case.ema.shadow) == case.average
        if case.ema.applied:
            assert bits(case.weights) == case.held
            case.ema.restore()
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
