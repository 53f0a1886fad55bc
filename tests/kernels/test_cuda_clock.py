"""The GPU's clock, with its threads run on the host: when updates are due, and their weights.

It differs from :meth:`fastema.rules.Schedule.weights` in two ways, both bounded here. Its weights
come from polynomials (:mod:`fastema.engine.weight_table`): after the first 64 updates they may
have a relative error of 4e-15 and, where the rule's weight is one minus a decay that changes, an
error of twice the rounding of that decay, 2**-53 for each step of an update. From update 2**31 on,
the weight stays constant.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit, types
from numpy.typing import NDArray

import fastema
from fastema.average.clock import launch_args
from fastema.average.device_clock import tables_for
from fastema.engine.step_counter import StepCounter
from fastema.engine.weight_table import evaluate
from fastema.kernels import cuda_clock
from fastema.kernels import table as abi
from fastema.kernels.table import CLOCK_CELLS, MAX_AVERAGES
from fastema.kernels.words import load, pointer_i64
from fastema.rules import (
    Constant,
    CumulativeMean,
    Power,
    Rule,
    Schedule,
    constant,
    cumulative_mean,
    debiased,
    half_life,
    inverse_gamma,
    power,
    warmup,
)

from ..support.stub_gpu import StubGpu, compile_clock_on_host, gpu

__all__ = ["gpu"]

Table = NDArray[np.float64]

LAST = 2**31
"""The last update that a weight table covers."""

POISON = -0x0123456789ABCDEF
AROUND = 16
"""Poisoned cells on either side of a clock."""


@dataclasses.dataclass(frozen=True)
class Ramp(Rule):
    """A custom rule whose decay rises linearly and then jumps."""

    steps: int

    def decay(self, n: int) -> float:
        if n >= self.steps:
            return 0.9995
        return 0.5 + 0.4 * n / self.steps


RULES: tuple[Rule, ...] = (
    constant(0.999),
    warmup(0.999),
    inverse_gamma(0.9999),
    inverse_gamma(0.999, inv_gamma=3.0, power=0.75, minimum=0.1),
    power(0.05),
    power(0.2),
    cumulative_mean(),
    debiased(constant(0.999)),
    debiased(warmup(0.99)),
    constant(0.0),
    half_life(500),
    Ramp(700),
)


@functools.cache
def table_of(rule: Rule, every: int) -> Table:
    (table,) = tables_for(Schedule((rule,), every))
    return table


def tables_of(rules: Sequence[Rule], every: int) -> list[Table]:
    """Return the cached tables of some rules; building one takes a tenth of a second."""
    return [table_of(rule, every) for rule in rules]


@functools.cache
def compile_for_threads() -> Any:
    """Compile the kernel for any number and order of threads: ``run(clock, order, threads)``."""
    read, advance = cuda_clock.read, cuda_clock.advance

    def run(clock, order, threads):  # type: ignore[no-untyped-def]
        before = read(clock, clock)
        for k in range(threads):
            advance(clock, before, load(pointer_i64(order), k), threads)

    return njit(types.void(types.int64, types.int64, types.int64), error_model="numpy")(run)


class Clock:
    """A clock in poisoned memory."""

    def __init__(
        self,
        tables: Sequence[Table],
        *,
        done: int = 0,
        start: int = 0,
        every: int = 1,
        window: int = 0,
        seed: int = 5,
    ) -> None:
        self._whole = np.full(CLOCK_CELLS + 2 * AROUND, POISON, np.int64)
        self.cells = self._whole[AROUND:-AROUND]
        self.address = self.cells.ctypes.data
        self.tables = [np.ascontiguousarray(table) for table in tables]
        for place, value in {
            **{
                abi.DONE: done,
                abi.STEP: done,
                abi.SEED: seed,
                abi.START: start,
                abi.EVERY: every,
                abi.WINDOW: window,
                **dict.fromkeys((abi.TRIES, abi.NOT_FINITE, abi.SKIPPED), 0),
            },
            **{abi.TABLES + 2 * k + 1: 0 for k in range(MAX_AVERAGES)},
        }.items():
            self.cells[place] = value
        for k, table in enumerate(self.tables):
            self.cells[abi.TABLES + 2 * k] = table.ctypes.data
            self.cells[abi.TABLES + 2 * k + 1] = len(table)

    def advance(self, run: Callable[[int], None] | None = None) -> None:
        """Run the next update; assert that it writes exactly the cells that it has to."""
        before = self._whole.copy()
        done = int(self.cells[abi.DONE])
        written = [abi.IDLE, abi.STEP, *range(abi.WEIGHTS, abi.WEIGHTS + MAX_AVERAGES)]
        if self.cells[abi.WINDOW]:
            written += [abi.SLOT, abi.TURN]
        self.cells[written] = POISON
        calls = int(self.cells[abi.TRIES])
        run(self.address) if run else compile_clock_on_host()(self.address, 1)
        assert self.cells[abi.DONE] == self.cells[abi.STEP] == done + 1
        assert self.cells[abi.TRIES] == calls + 1
        assert self.cells[abi.IDLE] in (0, 1)
        rest = np.ones(len(before), bool)
        rest[AROUND + np.array([abi.DONE, abi.TRIES, *written])] = False
        assert np.array_equal(self._whole[rest], before[rest])
        kept = self.cells[abi.WEIGHTS : abi.WEIGHTS + MAX_AVERAGES] == POISON
        if self.cells[abi.WINDOW]:
            assert kept[1:].all()
        else:
            count = 0 if self.cells[abi.IDLE] else len(self.tables)
            assert kept.tolist() == [k >= count for k in range(MAX_AVERAGES)]

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights that this update's kernels find; none if it is idle."""
        if self.cells[abi.IDLE]:
            return ()
        found = self.cells[abi.WEIGHTS : abi.WEIGHTS + len(self.tables)].view(np.float64)
        return tuple(found.tolist())


@pytest.mark.parametrize("window", [0, 3])
def test_a_flagged_update_is_skipped_and_counted(window: int) -> None:
    rules = (constant(0.9), power(0.05))
    schedule = Schedule(rules, 2, 3)
    clock = Clock(tables_of(rules, 2), start=3, every=2, window=window)
    flag = njit(types.void(types.int64), error_model="numpy")(cuda_clock.flag)
    generator, step, skipped = np.random.default_rng(7), 0, 0
    for _ in range(200):
        flagged = generator.random() < 0.4
        if flagged:
            flag(clock.address)
        idle = not expected_weights(schedule, step + 1)
        if flagged and not idle:
            before = clock.cells.copy()
            compile_clock_on_host()(clock.address, 1)
            skipped += 1
            same = np.ones(CLOCK_CELLS, bool)
            same[[abi.TRIES, abi.IDLE, abi.SKIPPED]] = False
            assert np.array_equal(clock.cells[same], before[same])
            assert clock.cells[abi.IDLE]
        else:
            compile_clock_on_host()(clock.address, 1)
            step += 1
            assert clock.cells[abi.IDLE] == idle
        assert clock.cells[[abi.DONE, abi.SKIPPED]].tolist() == [step, skipped]
    assert skipped > 20


def expected_weights(schedule: Schedule, step: int) -> tuple[float, ...]:
    """Return the schedule's weights, constant beyond the end of the clock's table."""
    start, every = schedule.start_after, schedule.update_every
    beyond = (step - start) // every - LAST
    return schedule.weights(step - max(beyond, 0) * every)


def allowed_error(rule: Rule, weight: float, every: int) -> float:
    """Return the largest error allowed in a weight."""
    if isinstance(rule, Constant):
        return 0.0
    exact = isinstance(rule, Power | CumulativeMean) or rule == debiased(constant(0.999))
    return 4e-15 * weight + (0.0 if exact else 2 * every * 2.0**-53)


def check(clock: Clock, schedule: Schedule, step: int) -> None:
    """Compare an update's weights with the schedule's, those of the first 64 updates to the bit."""
    want = expected_weights(schedule, step)
    got = clock.weights
    assert len(got) == len(want), step
    update = (step - schedule.start_after) // schedule.update_every
    if not want or update <= 64:
        assert got == want, step
        return
    for rule, a, b in zip(schedule.rules, got, want, strict=True):
        assert abs(a - b) <= allowed_error(rule, b, schedule.update_every), (rule, step, a, b)


@given(
    rules=st.lists(st.sampled_from(RULES), min_size=1, max_size=MAX_AVERAGES, unique=True),
    every=st.sampled_from([1, 2, 10]),
    start=st.integers(0, 2**33),
    power_of_two=st.integers(0, 41),
    data=st.data(),
)
def test_any_update_follows_the_schedule(
    rules: list[Rule], every: int, start: int, power_of_two: int, data: st.DataObject
) -> None:
    near = 2**power_of_two
    m = data.draw(st.integers(max(near - 70, -start), near + 70))
    done = max(start + m - 1, 0)
    schedule = Schedule(rules, every, start)
    clock = Clock(tables_of(tuple(rules), every), done=done, start=start, every=every)
    for step in range(done + 1, done + every + 2):
        clock.advance()
        check(clock, schedule, step)


def run_threads(clock: int, order: NDArray[np.int64]) -> None:
    compile_for_threads()(clock, order.ctypes.data, len(order))


def random_table(generator: np.random.Generator, rows: int, last: int) -> Table:
    """Draw a table of random polynomials, which belong to no rule."""
    firsts = np.unique(np.concatenate(([1], generator.integers(2, last, rows - 1))))
    table = generator.uniform(-0.2, 0.2, (len(firsts), abi.WEIGHT_COLUMNS))
    table[:, abi.FIRST] = firsts
    lengths = np.diff(np.append(firsts, 2 * last))
    table[:, abi.SCALE] = 2.0 ** (1 - np.ceil(np.log2(lengths)))
    table[generator.random(len(firsts)) < 0.2, abi.SCALE] = 0.0
    return table


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 600),
    count=st.integers(1, MAX_AVERAGES),
    last=st.sampled_from([1_000, 2**31, 2**44]),
    threads=st.sampled_from([1, 2, 7, 32, 256, 1024]),
)
def test_any_number_and_order_of_threads_evaluates_any_table(
    seed: int, rows: int, count: int, last: int, threads: int
) -> None:
    generator = np.random.default_rng(seed)
    tables = [random_table(generator, max(rows // (k + 1), 1), last) for k in range(count)]
    edges = tables[0][:, abi.FIRST].astype(np.int64)
    looked_at = [*generator.choice(edges, 3), *(generator.choice(edges, 3) - 1)]
    looked_at += [1, 2 * last, int(generator.integers(1, last))]
    order = generator.permutation(threads)
    for update in map(int, looked_at):
        if update < 1:
            continue
        clock = Clock(tables, done=update - 1)
        clock.advance(lambda cells: run_threads(cells, order))
        want = [evaluate(table, update) for table in tables]
        np.testing.assert_allclose(clock.weights, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("start", [0, 1, 6])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 7, 1000])
def test_a_clock_sets_slot_and_turn_of_windowed_means(window: int, every: int, start: int) -> None:
    sma = fastema.SMA([np.zeros(1)], window=window, update_every=every, start_after=start, seed=3)
    schedule = sma.schedule
    for done in (0, 2**31 - 2, 2**40 - 3):
        clock = Clock([], done=done, start=start, every=every, window=window, seed=3)
        for step in range(done + 1, done + 2_500 if not done else done + 30):
            clock.advance()
            weights = schedule.weights(step)
            assert bool(clock.cells[abi.IDLE]) == (not weights), step
            if not weights:
                continue
            number = float(clock.cells[abi.WEIGHTS : abi.WEIGHTS + 1].view(np.float64)[0])
            found = number, int(clock.cells[abi.SLOT]), int(clock.cells[abi.TURN])
            args = launch_args(schedule, 3, step, weights)
            if step == start:  # a copy
                assert found == (1.0, 0, 0)
            else:
                assert found == (args.numbers[0], args.slot, args.turn)
                assert clock.cells[abi.WINDOW] == args.window
                assert (clock.cells[abi.SEED], clock.cells[abi.STEP]) == (args.seed, args.step)


def test_a_reset_clock_follows_its_new_schedule(gpu: StubGpu) -> None:
    """The host writes the cells that the kernel reads."""
    clock = StepCounter([gpu.contexts[0], gpu.contexts[1]])
    addresses = [clock.args.clocks[f"cuda:{index}"] for index in range(2)]
    generator = np.random.default_rng(8)
    for _ in range(12):
        count = int(generator.integers(1, MAX_AVERAGES + 1))
        rules = tuple(RULES[k] for k in generator.choice(len(RULES), count, replace=False))
        every, start = int(generator.choice([1, 2, 10])), int(generator.integers(0, 20))
        schedule, done = Schedule(rules, every, start), int(generator.integers(0, 10_000))
        clock.set(tables_of(rules, every), done=done, seed=9, start=start, every=every)
        for step in range(done + 1, done + 40):
            clock.advance()
            assert clock.done() == step
            for address in addresses:
                memory = (ctypes.c_int64 * CLOCK_CELLS).from_address(address)
                cells = np.frombuffer(memory, np.int64)
                want = schedule.weights(step)
                assert bool(cells[abi.IDLE]) == (not want)
                assert (cells[abi.STEP], cells[abi.SEED]) == (step, 9)
                got = cells[abi.WEIGHTS : abi.WEIGHTS + len(want)].view(np.float64)
                slack = [allowed_error(*one, every) for one in zip(rules, want, strict=False)]
                assert (np.abs(got - want) <= slack).all()
