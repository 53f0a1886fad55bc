"""Steps taken by one native call are those that Python takes, and nothing else is skipped."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema import rules
from fastema.errors import ArgumentError, StateError

from .kinds import KINDS

COUNT = 70
"""More steps than are asked for at once."""


def weights(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) for shape in ((3, 5), (7,), ())]


def step(model: list[np.ndarray], random: np.random.Generator) -> None:
    for one in model:
        one[...] = random.standard_normal(one.shape)


def content(average: Any) -> list[Any]:
    values = [one[name].copy() for one in average.shadows for name in one]
    return [average.num_updates, average.version, average.decay, *values]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def native_steps(average: Any) -> int:
    """Return how many native calls have taken a step."""
    steady = average._clock.steady
    return steady.run.num_done if steady is not None else 0


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every third": {"update_every": 3},
    "late": {"start_after": 40},
    "late, every fifth": {"start_after": 33, "update_every": 5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_native_steps_equal_those_of_python(kind: str, options: dict[str, Any]) -> None:
    model, random = weights(0), np.random.default_rng(1)
    average, python = (KINDS[kind](model, **options) for _ in range(2))
    for _ in range(COUNT):
        step(model, random)
        average.update()
        python.update(steps=np.int64(1))  # not the default's object: taken by Python
        assert same(content(average), content(python))
    assert native_steps(average) > COUNT // 4
    assert not native_steps(python)
    assert average.state_dict().keys() == python.state_dict().keys()
    for name, value in average.state_dict().items():
        np.testing.assert_array_equal(value, python.state_dict()[name])


class Settable(rules.Rule):
    """A rule that is no frozen dataclass: its decay may change at any time."""

    value = 0.5

    def decay(self, n: int) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        return {"rule": "Settable"}


@dataclass(frozen=True)
class Holder(rules.Rule):
    inner: rules.Rule

    def decay(self, n: int) -> float:
        return self.inner.decay(n)


@pytest.mark.parametrize("wrap", [lambda rule: rule, Holder])
def test_a_rule_that_can_change_is_asked_at_each_step(wrap: Callable[[Any], Any]) -> None:
    rule = Settable()
    w = np.zeros(3)
    ema = fastema.EMA([w], wrap(rule))
    expected = 0.0
    for n in range(1, 50):
        w[:] = n
        rule.value = 1 / n
        ema.update()
        expected = rule.value * expected + (1 - rule.value) * n
        np.testing.assert_allclose(ema.shadow["0"], expected)
    assert native_steps(ema) > 40


@dataclass(frozen=True)
class Table(rules.Rule):
    decays: tuple[float, ...]

    def decay(self, n: int) -> float:
        return self.decays[n - 1]


def test_a_rule_that_ends_is_asked_up_to_its_end() -> None:
    model, random = weights(0), np.random.default_rng(1)
    rule = Table(tuple(np.linspace(0.5, 0.9, COUNT).tolist()))
    average, python = (fastema.EMA(model, rule) for _ in range(2))
    for _ in range(COUNT):
        step(model, random)
        average.update()
        python.update(steps=np.int64(1))
        assert same(content(average), content(python))
    with pytest.raises(IndexError):
        average.update()
    assert same(content(average), content(python))


def test_a_signal_handler_updates_while_rules_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.zeros(3)
    ema = fastema.EMA([w], 0.5)
    for _ in range(33):  # the first by Python, then as many as are asked for at once
        ema.update()
    weigh, left = rules.Schedule.weigh, [5]

    def interrupted(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            ema.update()
        return weigh(*args)

    monkeypatch.setattr(rules.Schedule, "weigh", interrupted)
    w[:] = 1
    for _ in range(3):
        ema.update()
    assert ema.num_updates == 37
    np.testing.assert_allclose(ema.shadow["0"], 1 - 0.5**4)


def module(*, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1)
    )


def changed(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(torch.randn_like(one))


class Reference:
    """The average of a model's parameters in float64."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay, self.values = decay, self.read(model)

    @staticmethod
    def read(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: one.detach().double() for name, one in model.named_parameters()}

    def update(self, model: torch.nn.Module) -> None:
        for name, one in self.read(model).items():
            self.values[name].lerp_(one, 1 - self.decay)

    def check(self, ema: Any) -> None:
        for name, value in self.values.items():
            torch.testing.assert_close(ema.shadow[name].double(), value, rtol=1e-5, atol=1e-6)


def replace_data(model: Any) -> None:
    model[0].weight.data = torch.randn(6, 4)


def replace_parameter(model: Any) -> None:
    model[2].weight = torch.nn.Parameter(torch.randn(1, 6))


def replace_layer(model: Any) -> None:
    model[2] = torch.nn.Linear(6, 1)


def move_in_memory(model: Any) -> None:
    old = model[0].weight.data
    model[0].weight.data = old.t().contiguous().t()


def nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    "change", [nothing, replace_data, replace_parameter, replace_layer, move_in_memory]
)
def test_tensors_that_move_are_located_again(change: Callable[[Any], None]) -> None:
    model = module()
    ema, reference = fastema.EMA(model, 0.8), Reference(model, 0.8)
    for turn in range(3):
        for _ in range(5):
            changed(model)
            ema.update()
            reference.update(model)
        assert native_steps(ema) >= 3
        change(model)
        ema.update()
        reference.update(model)
        reference.check(ema)
        assert ema.num_updates == 6 * (turn + 1)


def test_another_model_and_back() -> None:
    model, other = module(), module(seed=1)
    ema, reference = fastema.EMA(model, 0.8), Reference(model, 0.8)
    for turn in range(30):
        for one in (model, other):
            changed(one)
        now = other if turn % 7 in (3, 4, 5) else model
        ema.update(*([now] if now is other or turn % 2 else []))
        reference.update(now)
    reference.check(ema)


def test_nothing_is_averaged_while_the_average_is_applied() -> None:
    model = module()
    ema, reference = fastema.EMA(model, 0.8), Reference(model, 0.8)
    for _ in range(5):
        for _ in range(4):
            changed(model)
            ema.update()
            reference.update(model)
        with ema.swapped(), pytest.raises(StateError, match="applied"):
            ema.update()
        reference.check(ema)
    assert ema.num_updates == 20


def test_loading_and_moving_end_the_native_run() -> None:
    model = module()
    ema, reference = fastema.EMA(model, 0.8), Reference(model, 0.8)
    for _ in range(4):
        changed(model)
        ema.update()
    state = ema.state_dict()
    for _ in range(4):
        changed(model)
        ema.update()
    ema.load_state_dict(state)
    assert ema.num_updates == 4
    reference.values = {name: ema.shadow[name].double() for name in reference.values}
    for dtype in (torch.float64, torch.float32):
        for _ in range(4):
            changed(model)
            ema.update()
            reference.update(model)
        reference.check(ema)
        ema.to(dtype)
    assert ema.num_updates == 12
    ema.load_state_dict(fastema.EMA(model, 0.2).state_dict(), schedule="mine")
    assert ema.num_updates == 0
    changed(model)
    ema.update()
    assert ema.num_updates == 1
    with pytest.raises(ArgumentError, match="steps"):
        ema.update(steps=True)


def test_steps_that_were_left_out_count_in_the_next_update() -> None:
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([w], lr=1.0)
    wanted = iter([True] * 6 + [False, False] + [True] * 6)
    ema = fastema.EMA([w], 0.5)
    ema.follow(optimizer, update_if=lambda: next(wanted))
    value, expected, pending = 0.0, 0.0, 0
    for n in range(14):
        w.grad = torch.full((3,), -1.0)
        optimizer.step()
        value, pending = value + 1, pending + 1
        if n not in (6, 7):
            expected += (1 - 0.5**pending) * (value - expected)
            pending = 0
    torch.testing.assert_close(ema.shadow["0"], torch.full((3,), expected))
    assert ema.num_updates == 14


def test_threads_take_turns(threads: Callable[[int], None]) -> None:
    threads(2)
    size = 1 << 18
    w = np.ones(size, np.float32)
    ema = fastema.EMA([w], 0.9)
    seen: list[int] = []

    def update() -> None:
        for _ in range(60):
            ema.update()
            seen.append(ema.num_updates)

    workers = [threading.Thread(target=update) for _ in range(8)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert ema.num_updates == 480
    assert max(seen) == 480
    assert (ema.shadow["0"] == 1).all()


def test_reading_the_count_beside_updates() -> None:
    w = np.ones(1 << 16, np.float32)
    ema = fastema.EMA([w], 0.9)
    stop = threading.Event()
    counts: list[list[int]] = [[], []]

    def read() -> None:
        while not stop.is_set():
            counts[0].append(ema.num_updates)
            counts[1].append(ema.version)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(1000):
        ema.update()
    stop.set()
    reader.join()
    for one in counts:
        assert one == sorted(one)
        assert 0 <= one[0] <= one[-1] <= 1000


@pytest.fixture
def interval() -> Iterator[None]:
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("interval")
def test_reading_the_count_between_any_two_instructions() -> None:
    test_reading_the_count_beside_updates()
