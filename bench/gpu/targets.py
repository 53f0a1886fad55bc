"""Performance targets on a GPU, compared with a run. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.race.report import Row, number

OURS, PLAN, CAPTURED = "fastema.EMA", "fastema.Plan.lerp_", "fastema.EMA, captured"
COMPILED = "torch.compile of a lerp_ loop"
FOREACH, COPY = "torch._foreach_lerp_", "device-to-device copy"

SAME = "Update: flat-1B, f32 model, f32 average"
MIXED = "Update: flat-1B, bf16 model, f32 average"
NARROW = "Update: flat-1B, bf16 model, bf16 average"
SMALL = "Update: small-1000, f32 model, f32 average"
TINY = "Update: tiny-64, f32 model, f32 average"
GPT2 = "Update: gpt2-small, bf16 model, f32 average"
SWAP = "Swap and back: gpt2-small, bf16 model, f32 average"
WINDOW = "Mean of the last 3 weights: gpt2-small, f32"
LINK = "Offload: the link to the host"
STEP = "Offload: a training step"


class RunFigures:
    """Lookup of a run's figures by case and entry; a missing figure is None."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [row for row in rows if "device_ms" in row.figures]

    def least(self, case: str, fits: Callable[[str], bool], figure: str) -> float | None:
        """Return the smallest value of a figure over the entries for which ``fits`` is true."""
        found = [r[figure] for r in self._rows if r.table == case and fits(r.entry)]
        return min(found, default=None)

    def of(self, case: str, entry: str, figure: str = "device_ms") -> float | None:
        """Return one figure of one entry."""
        return self.least(case, lambda name: name == entry, figure)

    def beyond(self, case: str, entry: str, other: str) -> float | None:
        """Return how many microseconds longer one entry takes on the device than another."""
        longer, shorter = self.of(case, entry), self.of(case, other)
        return None if longer is None or shorter is None else (longer - shorter) * 1e3

    def allocations(self) -> float | None:
        """Return the largest number of allocations in an update by fastema, None if unknown."""
        ours = [r.figures for r in self._rows if r.entry.startswith("fastema")]
        counted = [figures["allocations"] for figures in ours if "allocations" in figures]
        return None if None in counted or not counted else max(counted)


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _is_torch(entry: str) -> bool:
    """Return whether an entry is torch itself: an operation, a loop, or `AveragedModel`."""
    return entry.startswith(("torch ", "torch.", "AveragedModel"))


def _is_eager_torch(entry: str) -> bool:
    return _is_torch(entry) and entry != COMPILED


def targets(rows: Sequence[Row], *, dry_run: bool = False) -> Iterator[Row]:
    """Yield a row per target: the target, the measured value, and whether the target is met.

    A dry run meets and misses none. A race never times torch's functions in place of our kernels
    (`bench.gpu.race.start`): their targets stay without a value.
    """
    found = RunFigures(rows)
    ms = found.of
    eager = found.least(MIXED, _is_eager_torch, "device_ms")
    averaged_model = found.least(SMALL, lambda e: e.startswith("AveragedModel"), "host_us")
    host = ms(SMALL, OURS, "host_us")
    bf16 = "bf16 -> f32, 1B elements"
    wanted = [
        ("f32 -> f32, 1B elements, of the copy", ">=", 0.95, "", ms(SAME, OURS, "share_of_copy")),
        (f"{bf16}, of the copy", ">=", 0.95, "", ms(MIXED, OURS, "share_of_copy")),
        (
            "bf16 -> bf16, 1B elements, of the copy",
            ">=",
            0.95,
            "",
            ms(NARROW, OURS, "share_of_copy"),
        ),
        (
            f"{bf16}, against the best of torch, not compiled",
            *(">=", 1.7, "×", _over(eager, ms(MIXED, OURS))),
        ),
        (
            f"{bf16}, against {COMPILED}",
            *(">=", 0.97, "×", _over(ms(MIXED, COMPILED), ms(MIXED, OURS))),
        ),
        (
            "bf16 at random, 1B elements, against timm ModelEmaV3, stochastic",
            *(">=", 6.0, "×", _over(ms(NARROW, "timm ModelEmaV3, stochastic"), ms(NARROW, OURS))),
        ),
        (
            "1,000 small tensors, host time against AveragedModel, its faster way",
            *(">=", 20.0, "×", _over(averaged_model, host)),
        ),
        ("1,000 small tensors, host time of an update", "<=", 100.0, " µs", host),
        (
            "device time of a replay beyond that of the bare kernel, 1,000 small tensors",
            *("<=", 3.0, " µs", found.beyond(SMALL, CAPTURED, PLAN)),
        ),
        (
            "the same, GPT-2 small, bf16 -> f32",
            *("<=", 3.0, " µs", found.beyond(GPT2, CAPTURED, PLAN)),
        ),
        (
            f"64 tiny tensors, device time beyond that of {FOREACH}",
            *("<=", 1.0, " µs", found.beyond(TINY, OURS, FOREACH)),
        ),
        (
            "memory requests of an update, the most of all cases",
            *("<=", 0.0, "", found.allocations()),
        ),
    ]
    for target, sign, bound, unit, value in wanted:
        met = None if value is None else value >= bound if sign == ">=" else value <= bound
        figures = {
            "wanted": f"{sign} {number(bound)}{unit}",
            "measured": None if value is None else f"{number(value)}{unit}",
            "value": value,
            "met": None if dry_run else met,
        }
        yield Row("Targets", target, figures)
    level = _over(ms(SAME, FOREACH), ms(SAME, OURS))
    measured = None if level is None else f"{number(level)}×"
    yield Row(
        "Targets",
        f"f32 -> f32, 1B elements, against {FOREACH}, one pass as well",
        {"wanted": None, "measured": measured, "value": level, "met": None},
    )
    if dry_run:
        yield Row("Targets", "all", missing="not judged: a dry run says nothing of a GPU")
