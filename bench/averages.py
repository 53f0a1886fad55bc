"""``python -m bench.averages [--quick]``: what the averages beyond a plain EMA cost.

Several averages in one pass, the windowed mean, 16-bit averages by rounding, guards, and the
synthesis of averages from snapshots on disk; each beside what people do without fastema.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastema
from bench import machine, models, report
from bench.clock import interleave, spread
from bench.flatmodule import build, randomise_
from bench.peers import timm_model_ema
from bench.verify import sample
from fastema.engine.limit import ReadReadWrite, StreamCopy

Job = Callable[[], object]


@dataclass(frozen=True)
class Entry:
    """One way to do a contest's work: ``setup(model)`` returns the call and how to see its result.

    `result` gives the average's tensors after a call, in the order of the parameters, or is None
    where rounding at random leaves nothing to compare with.
    """

    name: str
    setup: Callable[[nn.Module], tuple[Job, Callable[[], list[Tensor]] | None]]
    nbytes: float
    missing: str | None = None


@dataclass(frozen=True)
class Contest:
    """Entries that do the same work on the same weights; the first is what others are set against.

    Entries whose result can be compared must agree after two updates, to a few roundings.
    """

    title: str
    note: str
    inventory: Callable[[], models.Inventory]
    dtype: str
    entries: list[Entry]
    tolerance: float = 2e-6
    rows: list[dict[str, Any]] = field(default_factory=list)


def _averages(average: Any, model: nn.Module, which: int = 0) -> Callable[[], list[Tensor]]:
    names = [name for name, _ in model.named_parameters()]
    return lambda: [average.shadows[which][name] for name in names]


def _ours(
    make: Callable[[nn.Module], Any], nbytes: float, name: str, shown: int | None = 0
) -> Entry:
    def setup(model: nn.Module) -> tuple[Job, Callable[[], list[Tensor]] | None]:
        average = make(model)
        return average.update, None if shown is None else _averages(average, model, shown)

    return Entry(name, setup, nbytes)


# -- several averages -----------------------------------------------------------------------------

DECAYS = (0.9, 0.99, 0.999)


def _three_passes(model: nn.Module) -> tuple[Job, Callable[[], list[Tensor]]]:
    averages = [fastema.EMA(model, decay) for decay in DECAYS]

    def update() -> None:
        for average in averages:
            average.update()

    return update, _averages(averages[0], model)


def _three_foreach(model: nn.Module) -> tuple[Job, Callable[[], list[Tensor]]]:
    weights = [p.detach() for p in model.parameters()]
    averages = [[w.clone() for w in weights] for _ in DECAYS]

    def update() -> None:
        for average, decay in zip(averages, DECAYS, strict=True):
            torch._foreach_lerp_(average, weights, 1 - decay)

    return update, lambda: averages[0]


def _three_averaged_models(model: nn.Module) -> tuple[Job, Callable[[], list[Tensor]]]:
    averages = [AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(d)) for d in DECAYS]
    for average in averages:
        average.update_parameters(model)  # the first call only copies

    def update() -> None:
        for average in averages:
            average.update_parameters(model)

    return update, lambda: list(averages[0].module.parameters())


SEVERAL = [
    _ours(lambda m: fastema.EMA(m, DECAYS), 28, "fastema.EMA, three decays"),
    Entry("three fastema.EMA", _three_passes, 36),
    Entry("three torch._foreach_lerp_", _three_foreach, 36),
    Entry("three AveragedModel multi_avg_fn", _three_averaged_models, 36),
]

# -- the windowed mean ----------------------------------------------------------------------------


def _full(size: int, model: nn.Module) -> fastema.SMA:
    average = fastema.SMA(model, size)
    for _ in range(size):  # from here on each call does what it does for the rest of a run
        average.update()
    return average


def _window(size: int) -> Entry:
    name = f"fastema.SMA, window {size}"
    return _ours(partial(_full, size), 32, name, 0 if size == 10 else None)


def _ring(size: int, model: nn.Module) -> tuple[list[list[Tensor]], list[Tensor], Iterator[int]]:
    """Copies of the weights, the parameters, and the slot for each call."""
    weights = [p.detach() for p in model.parameters()]
    slots = [[w.clone() for w in weights] for _ in range(size)]
    return slots, weights, cycle(range(size))


def _again_foreach(size: int, model: nn.Module) -> tuple[Job, Callable[[], list[Tensor]]]:
    slots, weights, turns = _ring(size, model)
    average = [w.clone() for w in weights]

    def update() -> None:
        torch._foreach_copy_(slots[next(turns)], weights)
        torch._foreach_copy_(average, slots[0])
        for slot in slots[1:]:
            torch._foreach_add_(average, slot)
        torch._foreach_div_(average, size)

    return update, lambda: average


def _again_loop(size: int, model: nn.Module) -> tuple[Job, Callable[[], list[Tensor]]]:
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
    Entry("copies of 10, re-averaged by foreach", partial(_again_foreach, 10), 8 + 12 * 10),
    Entry("copies of 10, torch.stack().mean(0)", partial(_again_loop, 10), 8 + 12 * 10),
]
FLAT_IN_WINDOW = [_window(size) for size in (10, 2, 5, 20)]

# -- rounding -------------------------------------------------------------------------------------


def _timm(stochastic: bool, model: nn.Module) -> tuple[Job, None]:
    ema = timm_model_ema().ModelEmaV3(model, decay=0.9, stochastic_rounding=stochastic)
    return (lambda: ema.update(model)), None


def _stochastic(dtype: Any, nbytes: float, name: str, **options: Any) -> Entry:
    return _ours(
        lambda m: fastema.EMA(m, 0.9, shadow_dtype=dtype, **options), nbytes, name, shown=None
    )


ROUNDED = [
    _stochastic("bfloat16", 6, "fastema.EMA, stochastic"),
    _stochastic("bfloat16", 6, "fastema.EMA, nearest", rounding="nearest"),
    _stochastic("bf16+16", 10, "fastema.EMA, bf16+16"),
    _stochastic("float32", 10, "fastema.EMA, float32"),
    Entry("timm ModelEmaV3, stochastic", partial(_timm, True), 6),
    Entry("timm ModelEmaV3, nearest", partial(_timm, False), 6),
]

# -- guards ---------------------------------------------------------------------------------------


def _guarded(dtype: str, nbytes: float) -> list[Entry]:
    size = 4 if dtype == "f32" else 2
    make = partial(fastema.EMA, decay=0.9, shadow_dtype="float32")
    return [
        _ours(make, nbytes, "no guard"),
        _ours(partial(make, drift=True), nbytes, "drift=True"),
        _ours(partial(make, on_nonfinite="skip"), nbytes + size, 'on_nonfinite="skip"'),
        _ours(partial(make, on_nonfinite="skip", drift=True), nbytes + size, "both of them"),
    ]


# -- other means ----------------------------------------------------------------------------------


def _averaged_equally(model: nn.Module) -> tuple[Job, Callable[[], list[Tensor]]]:
    averaged = AveragedModel(model)
    return (lambda: averaged.update_parameters(model)), lambda: list(averaged.module.parameters())


MEANS = [
    _ours(fastema.SWA, 12, "fastema.SWA"),
    _ours(lambda m: fastema.PowerEMA(m), 20, "fastema.PowerEMA, two widths", None),
    Entry("AveragedModel", _averaged_equally, 12),
]


def contests(quick: bool) -> list[Contest]:
    """Return the contests of one mode."""
    large = partial(models.gpt2, layers=2, vocab=8_192) if quick else models.gpt2
    six = large if quick else partial(models.gpt2, layers=6)  # three rings of the whole: too much
    half = partial(models.gpt2, layers=2, vocab=4_096) if quick else partial(models.gpt2, layers=4)
    name = "two layers of GPT-2" if quick else "GPT-2 small"
    return [
        Contest(
            f"Three averages, f32, {name}",
            "One pass reads the weights once: 4 + 8 * 3 bytes per element for 3 * 12.",
            *(large, "f32", SEVERAL),
        ),
        Contest(
            f"Mean of the last 10 weights, f32, {'' if quick else 'six layers of '}{name}",
            "fastema moves 32 bytes per element whatever the window.",
            *(six, "f32", WINDOWED),
        ),
        Contest(
            "The same at other windows, a smaller model",
            "Fewer layers; all of it is the same work per element.",
            *(half, "f32", FLAT_IN_WINDOW),
        ),
        Contest(
            f"bf16 weights, averages of 16 bits and more, {name}",
            "bf16+16 is a float32 average whose first half is the bf16 checkpoint.",
            *(large, "bf16", ROUNDED),
        ),
        Contest(
            f"Guards, f32, {name}",
            "skip reads the weights once more before anything is written.",
            *(large, "f32", _guarded("f32", 12)),
        ),
        Contest(
            f"Guards, bf16 weights, f32 average, {name}",
            "The same.",
            *(large, "bf16", _guarded("bf16", 10)),
        ),
        Contest(
            f"Other means, f32, {name}",
            "PowerEMA keeps two averages: 20 bytes per element.",
            *(large, "f32", MEANS),
        ),
    ]


def run(contest: Contest, quick: bool) -> list[dict[str, Any]]:
    """Check the entries against each other, race them, and return the rows."""
    model = build(contest.inventory(), contest.dtype)
    jobs: dict[str, Job] = {}
    results: dict[str, Callable[[], list[Tensor]]] = {}
    for entry in contest.entries:
        jobs[entry.name], result = entry.setup(model)
        if result is not None:
            results[entry.name] = result
    for seed in (1, 2):
        randomise_(model, seed)
        for job in jobs.values():
            job()
    _assert_agreement(contest, results)
    results.clear()
    elements = models.total_elements(contest.inventory())
    least = contest.entries[0].nbytes
    yardsticks = [ReadReadWrite(int(elements * least)), StreamCopy(int(elements * least))]
    jobs |= {"limit: read-read-write": yardsticks[0], "limit: streaming copy": yardsticks[1]}
    durations = interleave(jobs, 12, budget_s=2.0 if quick else 40.0)
    limit = min(median(durations[name]) for name in list(jobs)[-2:]) / least
    nbytes = {entry.name: entry.nbytes for entry in contest.entries}
    ours = median(durations[contest.entries[0].name])
    rows = []
    for name, times in durations.items():
        p20, p80 = spread(times)
        typical = median(times)
        moved = nbytes.get(name, least)
        rows.append(
            {
                "entry": name,
                "n_elements": elements,
                "bytes_per_element": moved,
                "rounds": len(times),
                "median_ms": typical * 1e3,
                "p20_ms": p20 * 1e3,
                "p80_ms": p80 * 1e3,
                "share_of_limit": limit * moved / typical,
                "ratio": typical / ours,
            }
        )
    return rows


def _assert_agreement(contest: Contest, results: dict[str, Callable[[], list[Tensor]]]) -> None:
    seen = {name: [sample(t) for t in result()] for name, result in results.items()}
    if not seen:
        return
    (first, want), *others = seen.items()
    for name, got in others:
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            error = float((one - other).abs().max())
            assert error <= contest.tolerance, f"{contest.title}: {name} and {first}, {i}: {error}"


# -- synthesis ------------------------------------------------------------------------------------


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
    """Time one call, with the files in the system's cache or not."""
    for path in paths:
        with path.open("rb") as opened:
            if cold:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    if not cold:
        _read_all(paths)
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def synthesis(quick: bool) -> list[dict[str, Any]]:
    """Time the synthesis of an average from 20 snapshots."""
    inventory = models.gpt2(layers=2, vocab=8_192) if quick else models.gpt2()
    with tempfile.TemporaryDirectory() as folder:
        model = build(inventory, "f32")
        ema = fastema.PowerEMA(model)
        for step in range(10):
            randomise_(model, step + 1)
            ema.update()
            fastema.posthoc.save_snapshot(ema, folder)
        del ema
        paths = sorted(Path(folder).glob("*.safetensors"))
        ways: dict[str, Job] = {
            "fastema.posthoc.synthesize": lambda: fastema.posthoc.synthesize(folder, sigma_rel=0.2),
            "only reading the files": lambda: _read_all(paths),
            "safetensors load_file, add_": lambda: _load_and_add(paths),
        }
        durations = {}
        for where in ("in the file cache", "on the disk"):
            for name, way in ways.items():
                for _ in range(1 if quick else 3):
                    seconds = _once(way, paths, cold=where == "on the disk")
                    durations.setdefault(f"{name}, {where}", []).append(seconds)
        size = sum(path.stat().st_size for path in paths)
        ours = median(durations["fastema.posthoc.synthesize, in the file cache"])
        return [
            {
                "entry": name,
                "files": len(paths),
                "bytes": size,
                "rounds": len(times),
                "median_ms": median(times) * 1e3,
                "fastest_ms": min(times) * 1e3,
                "slowest_ms": max(times) * 1e3,
                "gbps": size / median(times) / 1e9,
                "ratio": median(times) / ours,
            }
            for name, times in durations.items()
        ]


# -- the report -----------------------------------------------------------------------------------


def _table(rows: list[dict[str, Any]]) -> str:
    number = report.number
    head = ["", "ms", "p20–p80", "bytes per element", "of the limit", "time / the first"]
    body = [
        [
            row["entry"],
            number(row["median_ms"]),
            f"{number(row['p20_ms'])}–{number(row['p80_ms'])}",
            f"{row['bytes_per_element']:g}",
            f"{row['share_of_limit']:.0%}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return report.aligned(head, body)


def _synthesis_table(rows: list[dict[str, Any]]) -> str:
    number = report.number
    head = ["", "ms", "fastest–slowest", "GB/s", "time / the first"]
    body = [
        [
            row["entry"],
            number(row["median_ms"]),
            f"{number(row['fastest_ms'])}–{number(row['slowest_ms'])}",
            number(row["gbps"]),
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    first = rows[0]
    return "\n\n".join(
        [
            "### An average put together from snapshots",
            f"{first['files']} files with {first['bytes'] / 1e9:.3g} GB in float32.",
            report.aligned(head, body),
        ]
    )


_METHOD = """\
All entries of a table run in turn, A B C A B C ..., in one process; medians of the rounds. Before,
those whose result is comparable were found equal. *Of the limit*: the share of this machine's
memory bandwidth, measured in the same run by plain kernels that move bytes, that an entry would
use if it moved no more bytes than the column says."""


def markdown(result: dict[str, Any]) -> str:
    """Return all tables of a result."""
    parts = ["# What the averages cost", report.provenance(result["header"]), _METHOD]
    for contest in result["contests"]:
        parts += [f"### {contest['title']}", contest["note"], _table(contest["rows"])]
    return "\n\n".join([*parts, _synthesis_table(result["synthesis"])]) + "\n"


def _measured(quick: bool) -> Iterator[dict[str, Any]]:
    for contest in contests(quick):
        began = time.perf_counter()
        rows = run(contest, quick)
        gc.collect()
        print(f"{contest.title}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        yield {"title": contest.title, "note": contest.note, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.averages", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    options = parser.parse_args()
    command = "python -m bench.averages" + (" --quick" if options.quick else "")
    result = {
        "header": machine.header(command, "averages"),
        "contests": list(_measured(options.quick)),
        "synthesis": synthesis(options.quick),
    }
    text = markdown(result)
    print(text)
    name = "averages-quick" if options.quick else "averages"
    report.store(options.out, name, result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
