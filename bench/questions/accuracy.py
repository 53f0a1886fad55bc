"""Measure the errors of averages against exact ones.

One update: the largest error for each pair of dtypes, against extended precision. Long runs: the
error of a whole average after 10,000 and 100,000 updates, against the same recursion in float64
over the same weights, for fastema in every precision and for the peers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastema
from bench.race import peers
from bench.race.flat_module import STD, FlatModule
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
SIXTEEN_BITS = ("f16", "bf16")

Wide = NDArray[np.longdouble]
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class AccuracySizes:
    """Sizes of the measurements."""

    elements: int  # in the table of one update
    short: int  # updates in that table's last column
    run_elements: int
    marks: tuple[int, ...]  # updates after which a long run is compared


FULL = AccuracySizes(elements=100_000, short=1_000, run_elements=4_096, marks=(10_000, 100_000))
QUICK = AccuracySizes(elements=4_000, short=50, run_elements=512, marks=(50, 250))


# -- one update -----------------------------------------------------------------------------------

WEIGHTS = (0.5, 0.1, 0.001)
DECAY = 0.999


def to_long_double(tensor: Tensor) -> Wide:
    """Return a tensor's values in extended precision."""
    return tensor.double().numpy().astype(np.longdouble)


def last_place(values: Wide, dtype: str) -> Wide:
    """Return the unit in the last place of each value in a dtype."""
    info = torch.finfo(DTYPES[dtype])
    powers = np.ldexp(np.longdouble(1), np.frexp(values)[1] - 1)
    return np.maximum(powers, info.smallest_normal) * info.eps


def build_stochastic_average(start: Tensor, dtype: str, decay: float) -> tuple[fastema.EMA, Tensor]:
    """Return an average of `start` with stochastic rounding, and the average's tensor."""
    ema = fastema.EMA([start], decay, shadow_dtype=DTYPES[dtype], rounding="stochastic")
    (avg,) = ema.shadow.values()
    return ema, avg


def one_update(
    avg_dtype: str, dtype: str, rounding: str, elements: int, generator: torch.Generator
) -> float:
    """Return the largest error of one update, in ulps of the larger of average and weight."""
    worst = 0.0
    for weight in WEIGHTS:
        avg = torch.randn(elements, generator=generator).to(DTYPES[avg_dtype])
        x = torch.randn(elements, generator=generator).to(DTYPES[dtype])
        if rounding == "nearest":
            update: Callable[[], object] = partial(fastema.lerp_, avg, x, weight)
        else:
            held = avg.to(DTYPES[dtype], copy=True)
            ema, avg = build_stochastic_average(held, avg_dtype, 1 - weight)
            held.copy_(x)
            update = ema.update
        larger = np.maximum(np.abs(to_long_double(avg)), np.abs(to_long_double(x)))
        exact = to_long_double(avg) + np.longdouble(weight) * (
            to_long_double(x) - to_long_double(avg)
        )
        update()
        worst = max(
            worst,
            float(np.max(np.abs(to_long_double(avg) - exact) / last_place(larger, avg_dtype))),
        )
    return worst


def many_updates(
    avg_dtype: str,
    dtype: str,
    rounding: str,
    elements: int,
    updates: int,
    generator: torch.Generator,
) -> float:
    """Return the relative error of an average after many updates of noisy weights."""
    target = torch.randn(elements, generator=generator)
    x = target.to(DTYPES[dtype], copy=True)
    if rounding == "nearest":
        avg = target.to(DTYPES[avg_dtype], copy=True)
        plan = fastema.Plan(avg, x)
        update: Callable[[], object] = partial(plan.lerp_, 1 - DECAY)
    else:
        ema, avg = build_stochastic_average(x, avg_dtype, DECAY)
        update = ema.update
    exact = to_long_double(avg)
    for _ in range(updates):
        x.copy_(target + 0.1 * torch.randn(elements, generator=generator))
        exact += np.longdouble(1 - DECAY) * (to_long_double(x) - exact)
        update()
    return root_mean_square(to_long_double(avg) - exact) / root_mean_square(exact)


def updates(amount: AccuracySizes) -> Iterator[Row]:
    """Yield one row for each pair of dtypes and kind of rounding."""
    generator = torch.Generator().manual_seed(0)
    cases = [(*pair, "nearest") for pair in product(DTYPES, DTYPES)]
    cases += [(*pair, "stochastic") for pair in product(SIXTEEN_BITS, DTYPES)]
    for avg, dtype, rounding in cases:
        how = (avg, dtype, rounding)
        figures = {
            "weights": dtype,
            "rounding": rounding,
            "one_update_ulp": one_update(*how, amount.elements, generator),
            "many_updates_relative": many_updates(
                *how, amount.elements // 10, amount.short, generator
            ),
        }
        yield Row(f"One update, and {amount.short:,}", f"{avg} average", figures)


# -- the weights of a long run --------------------------------------------------------------------

DECAYS = (0.999, 0.9999, 0.99999)
MODELS = ("f32", "bf16")
SEED = 0
DRIFT = 0.01  # of the weights' scale, in one averaging horizon
NOISE = 0.1  # of the weights' scale
MEMORY = 0.9  # autocorrelation of the noise, from one step to the next
LOOK_EVERY = 10  # updates; an element that changes and returns in between counts as unchanged


def horizon_of(decay: float) -> int:
    """Return the averaging horizon of a decay in steps, ``1 / (1 - decay)``."""
    return round(1 / (1 - decay))


class Walk:
    """Weights like those of a training run: a drifting target with noise around it.

    ``target_n = scale * (a + DRIFT * n / horizon * b)`` with normal ``a`` and ``b``; the noise is
    autoregressive, ``e_n = MEMORY * e_(n-1) + sqrt(1 - MEMORY**2) * NOISE * scale * z_n``, and
    starts at zero. The start is rounded to bfloat16, so that every average can represent it.
    """

    def __init__(self, elements: int, horizon: int, seed: int = SEED) -> None:
        self._generator = np.random.default_rng(seed)
        start = torch.from_numpy(STD * self._normal(elements))
        self.start = start.bfloat16().float().numpy()
        self._velocity = DRIFT * STD / horizon * self._normal(elements)
        self._noise = np.zeros_like(self.start)
        self._step = 0

    def _normal(self, elements: int) -> NDArray[np.float32]:
        return self._generator.standard_normal(elements, dtype=np.float32)

    def advance(self) -> NDArray[np.float32]:
        """Return the weights after one more step."""
        self._step += 1
        self._noise *= MEMORY
        self._noise += math.sqrt(1 - MEMORY**2) * NOISE * STD * self._normal(len(self._noise))
        return self.start + self._step * self._velocity + self._noise


# -- the averages ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """An average whose error is measured, started by ``setup(model, decay)``."""

    package: str
    average: str
    rounding: str
    setup: Callable[[nn.Module, float], peers.PeerCalls]
    missing: str | None = None

    @property
    def name(self) -> str:
        """Name in tables."""
        rounding = f", {self.rounding}" if self.average in SIXTEEN_BITS else ""
        return f"{self.average}{rounding}: {self.package}"


def _ours(dtype: Any, rounding: Any, model: nn.Module, decay: float) -> peers.PeerCalls:
    ema = fastema.EMA(model, decay, shadow_dtype=dtype, rounding=rounding)
    return peers.PeerCalls(ema.update, lambda: list(ema.shadow.values()))


def _whole(model: nn.Module, decay: float) -> peers.PeerCalls:
    """Start a ``bf16+16`` average whose two halves are read back as float32."""
    ema = fastema.EMA(model, decay, shadow_dtype="bf16+16")
    seen = {name: torch.empty(p.shape) for name, p in model.named_parameters()}

    def average() -> list[Tensor]:
        ema.copy_to(seen)
        return list(seen.values())

    return peers.PeerCalls(ema.update, average)


OURS = "fastema"
ONCE = "the exact average, rounded once"
NONE = "no average: the weights themselves"
HALF = "fastema bf16+16, its bf16 half"
COMPARED = {
    "AveragedModel multi_avg_fn",
    "AveragedModel avg_fn",
    "torch_ema",
    "ema_pytorch",
    "timm ModelEmaV3",
    "timm ModelEmaV3, stochastic",
    "diffusers EMAModel",
}


def _peer(peer: peers.Peer, dtype: str, model: nn.Module, decay: float) -> peers.PeerCalls:
    return peer.setup(model, decay, DTYPES[dtype])


def _of_peers(dtype: str, rounding: str) -> Iterator[Subject]:
    """Yield the peers' averages in one dtype with one kind of rounding."""
    for peer in peers.PEERS:
        if peer.name in COMPARED and peer.stochastic == (rounding == "stochastic"):
            package = peer.name.removesuffix(", stochastic")
            yield Subject(package, dtype, rounding, partial(_peer, peer, dtype), peer.missing())


def _subject(dtype: str, rounding: str = "nearest") -> Subject:
    return Subject(OURS, dtype, rounding, partial(_ours, DTYPES[dtype], rounding))


SUBJECTS = (
    _subject("f32"),
    Subject(OURS, "bf16+16", "nearest", _whole),
    *_of_peers("f32", "nearest"),
    Subject(HALF, "bf16", "nearest", partial(_ours, "bf16+16", None)),
    _subject("bf16", "stochastic"),
    *_of_peers("bf16", "stochastic"),
    _subject("bf16"),
    *_of_peers("bf16", "nearest"),
    _subject("f16", "stochastic"),
    _subject("f16"),
)


# -- a long run -----------------------------------------------------------------------------------


def root_mean_square(values: NDArray[Any]) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(values**2)))


def values_of(tensor: Tensor) -> Reals:
    """Return a copy of a tensor's values in float64."""
    return np.array(tensor.detach().double().numpy())


class ExactAverage:
    """The recursion in float64, over the weights in the model's dtype."""

    def __init__(self, weights: Tensor, decay: float) -> None:
        self.start = values_of(weights)
        self.average = self.start.copy()
        self._weight = 1 - decay

    def update(self, weights: Tensor) -> None:
        """Do one step."""
        self.average += self._weight * (values_of(weights) - self.average)

    def compare(self, start: Reals, average: Reals) -> dict[str, float]:
        """Return error measures of an average that began at `start`.

        ``relative`` is the root-mean-square error divided by the root mean square of the exact
        average, ``of_movement`` the same error divided by that of the exact average's movement
        from its start. ``followed`` is the slope of a least-squares fit of the average's movement
        to the exact one: 0 if the average stands still, 1 if it is right except for noise.
        """
        way = self.average - self.start
        error = root_mean_square(average - self.average)
        return {
            "relative": error / root_mean_square(self.average),
            "of_movement": error / root_mean_square(way),
            "followed": float(np.sum((average - start) * way) / np.sum(way**2)),
        }


class TrackedAverage:
    """A running average, and a record of the elements that were ever seen changed."""

    def __init__(self, subject: Subject, model: nn.Module, decay: float) -> None:
        self.subject = subject
        self._running = subject.setup(model, decay)
        self._begin = self._now().clone()
        self._changed = torch.zeros(self._begin.shape, dtype=torch.bool)

    def _now(self) -> Tensor:
        (average,) = self._running.average()
        return average.detach()

    def update(self) -> None:
        """Do one step."""
        self._running.update()

    def look(self) -> None:
        """Record which elements differ from the start."""
        if not self._changed.all():
            self._changed |= self._now() != self._begin

    def compare(self, exact: ExactAverage) -> dict[str, float]:
        """Return the errors, and ``still``: the share of elements that never changed."""
        found = exact.compare(values_of(self._begin), values_of(self._now()))
        return found | {"still": 1 - float(self._changed.double().mean())}


def refusal(subject: Subject, weights: str) -> str | None:
    """Return why a subject cannot average weights of a dtype, or None if it can."""
    if subject.missing is not None:
        return f"absent: {subject.missing}"
    model = model_of(np.ones(4, np.float32), weights)
    try:
        subject.setup(model, 0.5).update()
    except RuntimeError as error:
        return f"raises: {type(error).__name__}, {str(error).splitlines()[0]}"
    return None


def model_of(weights: NDArray[np.float32], dtype: str) -> FlatModule:
    """Return a model with one tensor of these weights."""
    model = FlatModule([("weights", weights.shape)], DTYPES[dtype])
    model.weights.detach().copy_(torch.from_numpy(weights))
    return model


class Run:
    """A model in one dtype, its exact average, and the averages to compare with it."""

    def __init__(
        self, weights: str, start: NDArray[np.float32], decay: float, subjects: Iterable[Subject]
    ) -> None:
        self.weights = weights
        self._decay = decay
        self._step = 0
        self._model = model_of(start, weights)
        self._weights = self._model.weights.detach()
        self._exact = ExactAverage(self._weights, decay)
        self._tracks = [TrackedAverage(subject, self._model, decay) for subject in subjects]

    def advance(self, weights: Tensor) -> None:
        """Give the model new weights and update everything."""
        self._step += 1
        self._weights.copy_(weights)
        self._exact.update(self._weights)
        for track in self._tracks:
            track.update()
            if self._step % LOOK_EVERY == 0:
                track.look()

    def rows(self) -> Iterator[Row]:
        """Yield the errors of all averages, of rounded exact averages, and of the raw weights."""
        for track in self._tracks:
            yield from self._views(track.subject.name, track.compare(self._exact))
        bounds = {
            f"{dtype}: {ONCE}": torch.from_numpy(self._exact.average).to(DTYPES[dtype])
            for dtype in ("f32", *SIXTEEN_BITS)
        }
        for name, values in {**bounds, NONE: self._weights}.items():
            found = self._exact.compare(self._exact.start, values_of(values))
            if name == NONE:  # the raw weights are noise, so the slope has no meaning
                found["followed"] = None
            yield from self._views(name, found)

    def _views(self, name: str, found: dict[str, float | None]) -> Iterator[Row]:
        column = f"{self._decay}, {self._step:,}"
        for title, figures in VIEWS.items():
            shown = {figure: found[figure] for figure in figures if figure in found}
            yield Row(title.format(self.weights), name, shown, column)


VIEWS = {
    "{} weights: error as a share of how far the exact average has moved": ("of_movement", "still"),
    "{} weights: error as a share of the average itself": ("relative",),
    "{} weights: part of the way": ("followed",),
}
"""Title of a table -> figures that it shows of each average."""


def long_run(
    decay: float, amount: AccuracySizes, subjects: dict[str, list[Subject]]
) -> Iterator[Row]:
    """Yield the errors of all averages at the marks of a run; `subjects` is by weight dtype."""
    walk = Walk(amount.run_elements, horizon_of(decay))
    runs = [Run(weights, walk.start, decay, those) for weights, those in subjects.items()]
    for step in range(1, max(amount.marks) + 1):
        weights = torch.from_numpy(walk.advance())
        for run in runs:
            run.advance(weights)
        if step in amount.marks:
            for run in runs:
                yield from run.rows()


def long_runs(amount: AccuracySizes) -> Iterator[Row]:
    """Yield the rows of all runs, and a row with the reason for each refused subject."""
    reasons = {(w, subject): refusal(subject, w) for w in MODELS for subject in SUBJECTS}
    running = {w: [subject for subject in SUBJECTS if reasons[w, subject] is None] for w in MODELS}
    for decay in DECAYS:
        yield from long_run(decay, amount, running)
        print(f"decay {decay}: {max(amount.marks):,} updates", file=sys.stderr)
    for (weights, subject), reason in reasons.items():
        if reason is not None:
            yield Row(next(iter(VIEWS)).format(weights), subject.name, missing=reason)


@contextmanager
def limit_to_one_thread() -> Iterator[None]:
    """Limit torch and fastema to one thread in a block."""
    before = torch.get_num_threads(), fastema.get_num_threads()
    torch.set_num_threads(1)
    fastema.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        fastema.set_num_threads(before[1])


def rows(settings: Settings) -> Rows:
    """Yield the rows of long runs, then of single updates, on one thread."""
    amount = QUICK if settings.quick else FULL
    with limit_to_one_thread():
        yield from long_runs(amount)
        yield from updates(amount)


def percent(share: float) -> str:
    """Format a share with two significant digits; never round a share below 1 up to 100 %."""
    value = 100 * share
    if value == 0:
        return "0 %"
    if value < 0.001:
        return "< 0.001 %"
    if 99 < value < 100:
        return f"{math.floor(10 * value) / 10} %"
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f} %"


METHOD = f"""\
**Long runs.** Root-mean-square error of an average of {FULL.run_elements:,} weights
({QUICK.run_elements} in quick mode) against the same recursion in float64, over the weights as the
model holds them (f32, or rounded to bf16); all averages side by side over the same weights, on one
thread. Each weight follows a target that drifts, by a speed of its own, {100 * DRIFT:g} % of the
weights' scale in one averaging horizon of 1 / (1 - decay) updates, with noise of {100 * NOISE:g} %
of the scale about it (autoregressive, {MEMORY} from step to step). Averages begin as a copy of the
weights, at values that bf16 holds exactly.

*Share of how far the exact average has moved*: an average that stands still has 100 %; one that has
more is further from the exact average than the start is. In brackets, where there are any: elements
that were never seen to change. *Rounded once* is the exact average stored in that dtype without any
recursion: what the dtype itself costs. *Part of the way*: the slope of an average's movement over
the exact one's, by least squares; 0 stands still, 1 is right but for noise that differs from
element to element.

**One update.** The largest error against extended precision, of {FULL.elements:,} random weights
({QUICK.elements:,} in quick mode) at each of w = {", ".join(map(str, WEIGHTS))}, in units of the
last place that the larger of average and weight has in the average's dtype (the result itself may
be near zero). Storing to nearest costs a half, at random up to one; where weights and average are
computed with in the average's own precision, the difference of the two is rounded as well. Then the
root-mean-square error relative to the average's own after many updates at decay {DECAY}, with white
noise of a tenth of the weights."""

QUESTION = Question(
    "Accuracy of averages",
    METHOD,
    rows,
    figures={
        "of_movement": Figure("decay, updates", percent),
        "still": Figure("", lambda share: f"({percent(share)})" if share else ""),
        "relative": Figure("decay, updates", "{:.1e}".format),
        "followed": Figure("decay, updates", "{:.2f}".format),
        "weights": Figure("weights", str),
        "rounding": Figure("rounding", str),
        "one_update_ulp": Figure("one update, ulp", "{:.3f}".format),
        "many_updates_relative": Figure("many updates", "{:.1e}".format),
    },
)
