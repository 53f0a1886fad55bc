"""Measure the cost of averages beyond a plain EMA.

Several averages in one pass, the windowed mean, 16-bit averages by rounding, guards, and the
synthesis of averages from snapshots on disk, each compared with the usual way without fastema.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastema
from bench.race import shapes
from bench.race.checks import sample
from bench.race.contest import Job, contest
from bench.race.flat_module import build, randomise_
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows, format_range
from fastema.cli.clock import seconds
from tests.support.peers import import_timm_averages

Result = Callable[[], list[Tensor]]
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Contender:
    """One way to do the work: ``setup(model)`` returns a call and a function for its result.

    The function returns the average's tensors after a call, in the order of the parameters. It is
    None if the result cannot be compared, for instance because of stochastic rounding.
    """

    name: str
    setup: Callable[[nn.Module], tuple[Job, Result | None]]
    bytes_per_element: float


@dataclass(frozen=True)
class Workload:
    """Entries that do the same work on the same weights; ratios are relative to the first."""

    title: str
    inventory: Callable[[], shapes.Inventory]
    dtype: str
    entries: list[Contender]


def _averages(average: Any, model: nn.Module, which: int = 0) -> Result:
    names = [name for name, _ in model.named_parameters()]
    return lambda: [average.shadows[which][name] for name in names]


def _ours(
    make: Callable[[nn.Module], Any], nbytes: float, name: str, result_index: int | None = 0
) -> Contender:
    def setup(model: nn.Module) -> tuple[Job, Result | None]:
        average = make(model)
        return average.update, None if result_index is None else _averages(
            average, model, result_index
        )

    return Contender(name, setup, nbytes)


# -- several averages -----------------------------------------------------------------------------

DECAYS = (0.9, 0.99, 0.999)


def _three_passes(model: nn.Module) -> tuple[Job, Result]:
    averages = [fastema.EMA(model, decay) for decay in DECAYS]

    def update() -> None:
        for average in averages:
            average.update()

    return update, _averages(averages[0], model)


def _three_foreach(model: nn.Module) -> tuple[Job, Result]:
    weights = [p.detach() for p in model.parameters()]
    averages = [[w.clone() for w in weights] for _ in DECAYS]

    def update() -> None:
        for average, decay in zip(averages, DECAYS, strict=True):
            torch._foreach_lerp_(average, weights, 1 - decay)

    return update, lambda: averages[0]


def _three_averaged_models(model: nn.Module) -> tuple[Job, Result]:
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d)) for d in DECAYS]
    for average in averages:
        average.update_parameters(model)  # the first call only copies

    def update() -> None:
        for average in averages:
            average.update_parameters(model)

    return update, lambda: list(averages[0].module.parameters())


SEVERAL = [
    _ours(lambda m: fastema.EMA(m, DECAYS), 28, "fastema.EMA, three decays"),
    Contender("three fastema.EMA", _three_passes, 36),
    Contender("three torch._foreach_lerp_", _three_foreach, 36),
    Contender("three AveragedModel multi_avg_fn", _three_averaged_models, 36),
]

# -- the windowed mean ----------------------------------------------------------------------------


def _build_full_window(size: int, model: nn.Module) -> fastema.SMA:
    average = fastema.SMA(model, size)
    for _ in range(size):  # fill the window: all later calls do the same work
        average.update()
    return average


def _window(size: int) -> Contender:
    name = f"fastema.SMA, window {size}"
    return _ours(partial(_build_full_window, size), 32, name, 0 if size == 10 else None)


def _ring(size: int, model: nn.Module) -> tuple[list[list[Tensor]], list[Tensor], Iterator[int]]:
    """Return `size` copies of the weights, the weights, and an iterator over slots."""
    weights = [p.detach() for p in model.parameters()]
    slots = [[w.clone() for w in weights] for _ in range(size)]
    return slots, weights, cycle(range(size))


def _reaverage_foreach(size: int, model: nn.Module) -> tuple[Job, Result]:
    slots, weights, turns = _ring(size, model)
    average = [w.clone() for w in weights]

    def update() -> None:
        torch._foreach_copy_(slots[next(turns)], weights)
        torch._foreach_copy_(average, slots[0])
        for slot in slots[1:]:
            torch._foreach_add_(average, slot)
        torch._foreach_div_(average, size)

    return update, lambda: average


def _reaverage_loop(size: int, model: nn.Module) -> tuple[Job, Result]:
    slots, weights, turns = _ring(size, model)
    average = list(weights)

    def update() -> None:
        slot = next(turns)
        for i, weight in enumerate(weights):
            slots[slot][i] = weight.clone()
            average[i] = torch.stack([one[i] for one in slots]).mean(0)

    return update, lambda: average


WINDOWED = [
    _window(10),
    Contender("copies of 10, re-averaged by foreach", partial(_reaverage_foreach, 10), 8 + 12 * 10),
    Contender("copies of 10, torch.stack().mean(0)", partial(_reaverage_loop, 10), 8 + 12 * 10),
]
FLAT_IN_WINDOW = [_window(size) for size in (10, 2, 5, 20)]

# -- rounding -------------------------------------------------------------------------------------


def _timm(stochastic: bool, model: nn.Module) -> tuple[Job, None]:
    ema = import_timm_averages().ModelEmaV3(model, decay=0.9, stochastic_rounding=stochastic)
    return (lambda: ema.update(model)), None


def _stochastic(dtype: Any, nbytes: float, name: str, **options: Any) -> Contender:
    return _ours(
        lambda m: fastema.EMA(m, 0.9, shadow_dtype=dtype, **options),
        nbytes,
        name,
        result_index=None,
    )


ROUNDED = [
    _stochastic("bfloat16", 6, "fastema.EMA, stochastic"),
    _stochastic("bfloat16", 6, "fastema.EMA, nearest", rounding="nearest"),
    _stochastic("bf16+16", 10, "fastema.EMA, bf16+16"),
    _stochastic("float32", 10, "fastema.EMA, float32"),
    Contender("timm ModelEmaV3, stochastic", partial(_timm, True), 6),
    Contender("timm ModelEmaV3, nearest", partial(_timm, False), 6),
]

# -- guards ---------------------------------------------------------------------------------------


def _guarded(dtype: str, nbytes: float) -> list[Contender]:
    size = 4 if dtype == "f32" else 2
    make = partial(fastema.EMA, decay=0.9, shadow_dtype="float32")
    return [
        _ours(make, nbytes, "no guard"),
        _ours(partial(make, on_nonfinite="skip"), nbytes + size, 'on_nonfinite="skip"'),
    ]


# -- other means ----------------------------------------------------------------------------------


def _setup_averaged_model(model: nn.Module) -> tuple[Job, Result]:
    averaged = AveragedModel(model)
    return (lambda: averaged.update_parameters(model)), lambda: list(averaged.module.parameters())


MEANS = [
    _ours(fastema.SWA, 12, "fastema.SWA"),
    _ours(lambda m: fastema.PowerEMA(m), 20, "fastema.PowerEMA, two widths", None),
    Contender("AveragedModel", _setup_averaged_model, 12),
]


def works(quick: bool) -> list[Workload]:
    """Return the races, in full or in quick mode."""
    large = partial(shapes.gpt2, layers=2, vocab=1_024) if quick else shapes.gpt2
    six = large if quick else partial(shapes.gpt2, layers=6)  # three whole rings do not fit
    half = partial(shapes.gpt2, layers=1, vocab=1_024) if quick else partial(shapes.gpt2, layers=4)
    name = "two layers of GPT-2" if quick else "GPT-2 small"
    some = name if quick else f"six layers of {name}"
    bf16 = "bf16 weights"
    return [
        Workload(f"Three averages, f32, {name}", large, "f32", SEVERAL),
        Workload(f"Mean of the last 10 weights, f32, {some}", six, "f32", WINDOWED),
        Workload("The same at other windows, a smaller model", half, "f32", FLAT_IN_WINDOW),
        Workload(f"{bf16}, averages of 16 bits and more, {name}", large, "bf16", ROUNDED),
        Workload(f"Guards, f32, {name}", large, "f32", _guarded("f32", 12)),
        Workload(f"Guards, {bf16}, f32 average, {name}", large, "bf16", _guarded("bf16", 10)),
        Workload(f"Other means, f32, {name}", large, "f32", MEANS),
    ]


def race(work: Workload, quick: bool) -> list[Row]:
    """Compare the entries' results after two updates, then race them and return their rows."""
    inventory = work.inventory()
    model = build(inventory, work.dtype)
    jobs: dict[str, Job] = {}
    results: dict[str, Result] = {}
    for entry in work.entries:
        jobs[entry.name], result = entry.setup(model)
        if result is not None:
            results[entry.name] = result
    for seed in (1, 2):
        randomise_(model, seed)
        for job in jobs.values():
            job()
    _assert_agreement(work.title, {n: [sample(t) for t in get()] for n, get in results.items()})
    results.clear()
    return contest(
        work.title,
        jobs,
        rounds=12,
        budget_s=0.5 if quick else 40.0,
        n_elements=shapes.total_elements(inventory),
        bytes_per_element={entry.name: entry.bytes_per_element for entry in work.entries},
    )


def _assert_agreement(title: str, seen: dict[str, list[Tensor]]) -> None:
    for name, got in seen.items():
        first, want = next(iter(seen.items()))
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            error = float((one - other).abs().max())
            assert error <= TOLERANCE, f"{title}: {name} and {first}, {i}: {error}"


# -- synthesis ------------------------------------------------------------------------------------


SYNTHESIS = "An average put together from snapshots in float32"


def _read_all(paths: list[Path]) -> None:
    buffer = bytearray(1 << 22)
    for path in paths:
        with path.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _load_and_add(paths: list[Path]) -> None:
    from safetensors.torch import load_file

    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in load_file(path).items():
            if name in total:
                total[name].add_(tensor, alpha=1 / len(paths))
            else:
                total[name] = tensor * (1 / len(paths))


def _once(way: Job, paths: list[Path], cold: bool) -> float:
    """Return the time of one call; the files are in the page cache unless `cold`."""
    for path in paths:
        with path.open("rb") as opened:
            if cold:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    if not cold:
        _read_all(paths)
    return seconds(way)


def synthesis(quick: bool) -> Iterator[Row]:
    """Time the synthesis of an average from 20 snapshots, and yield the rows."""
    inventory = shapes.gpt2(layers=1, vocab=2_048) if quick else shapes.gpt2()
    with tempfile.TemporaryDirectory() as folder:
        model = build(inventory, "f32")
        ema = fastema.PowerEMA(model)
        for step in range(10):
            randomise_(model, step + 1)
            ema.update()
            fastema.posthoc.save_snapshot(ema, folder)
        del ema
        paths = sorted(Path(folder).glob("*.safetensors"))
        size = sum(path.stat().st_size for path in paths)
        ways: dict[str, Job] = {
            "fastema.posthoc.synthesize": lambda: fastema.posthoc.synthesize(folder, sigma_rel=0.2),
            "only reading the files": lambda: _read_all(paths),
            "safetensors load_file, add_": lambda: _load_and_add(paths),
        }
        durations = {
            f"{name}, {where}": [
                _once(way, paths, cold=where == "on the disk") for _ in range(1 if quick else 3)
            ]
            for where in ("in the file cache", "on the disk")
            for name, way in ways.items()
        }
    ours = median(durations["fastema.posthoc.synthesize, in the file cache"])
    for name, times in durations.items():
        figures = {
            "files": len(paths),
            "gb": size / 1e9,
            "rounds": len(times),
            "ms": median(times) * 1e3,
            "extremes_ms": [min(times) * 1e3, max(times) * 1e3],
            "gbps": size / median(times) / 1e9,
            "ratio": median(times) / ours,
        }
        yield Row(SYNTHESIS, name, figures)


def rows(settings: Settings) -> Rows:
    """Run the chosen races, then the synthesis."""
    for work in works(settings.quick):
        if settings.wants(work.title):
            yield from race(work, settings.quick)
            gc.collect()
            print(work.title, file=sys.stderr)
    if settings.wants(SYNTHESIS):
        yield from synthesis(settings.quick)


def cases(settings: Settings) -> list[str]:
    """Return the titles of the races and of the synthesis."""
    return [*(work.title for work in works(settings.quick)), SYNTHESIS]


METHOD = """\
All entries of a table run in turn, A B C A B C ..., in one process; medians of the rounds. Before,
those whose result is comparable were found equal. *Of the limit*: the share of this machine's
memory bandwidth, measured in the same run by plain kernels that move bytes, that an entry would
use if it moved no more bytes than the column says. Three averages in one pass read the weights
once: 4 + 8 * 3 bytes per element for 3 * 12. A windowed mean moves 32 whatever the window. bf16+16
is a float32 average whose first half is the bf16 checkpoint. `on_nonfinite="skip"` reads the
weights once more before anything is written. PowerEMA keeps two averages."""

QUESTION = Question(
    "What the averages cost",
    METHOD,
    rows,
    cases,
    figures={
        "files": Figure("files", str, caption=True),
        "gb": Figure("GB", "{:.3g}".format, caption=True),
        "extremes_ms": Figure("fastest–slowest", format_range),
    },
)
