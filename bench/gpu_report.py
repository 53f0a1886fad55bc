"""What a GPU check found, as tables. Nothing but the standard library is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.report import aligned, number, provenance

Row = dict[str, Any]
Result = dict[str, Any]

_OURS, _PLAN, _CAPTURED = "fastema.EMA", "fastema.Plan.lerp_", "fastema.EMA, captured"
_SAMPLED, _COMPILED = "fastema.EMA, watch=sample", "torch.compile of a lerp_ loop"
_FLAT, _SMALL = "update:flat-1B", "update:small-1000"

_MIXES = {
    "f32/f32": "f32 weights, f32 average",
    "bf16/f32": "bf16 weights, f32 average",
    "bf16/bf16": "bf16 weights, bf16 average",
}


def _of(rows: list[Row], case: str, entry: str, column: str) -> float | None:
    for row in rows:
        if row["case"] == case and row["entry"] == entry:
            value = row[column]
            return None if value is None else float(value)
    return None


def _best(rows: list[Row], case: str, fits: Callable[[str], bool], column: str) -> float | None:
    found = [r[column] for r in rows if r["case"] == case and fits(r["entry"])]
    return min(found, default=None)


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None or not other else one / other


def _torch_path(entry: str) -> bool:
    """Whether an entry is torch itself: an operation, a loop, `AveragedModel`."""
    return entry.startswith(("torch ", "torch.", "AveragedModel"))


def _eager_path(entry: str) -> bool:
    return _torch_path(entry) and entry != _COMPILED


def targets(rows: list[Row]) -> list[Row]:
    """Return what was aimed at, what was found, and whether it is met; None without a measurement.

    Each is ``{"target", "wanted", "at_least", "value", "unit", "met"}``.
    """
    mixed, same, narrow = (f"{_FLAT}:{mix}" for mix in ("bf16/f32", "f32/f32", "bf16/bf16"))
    small = f"{_SMALL}:f32/f32"

    def ms(case: str, entry: str) -> float | None:
        return _of(rows, case, entry, "device_ms")

    def beyond_plan(case: str) -> float | None:
        replay, bare = ms(case, _CAPTURED), ms(case, _PLAN)
        return None if replay is None or bare is None else (replay - bare) * 1e3

    def averaged_models(entry: str) -> bool:
        return entry.startswith("AveragedModel")

    host = _of(rows, small, _OURS, "host_us")
    counted = [r["allocations"] for r in rows if r["entry"].startswith("fastema")]
    allocations = None if None in counted or not counted else float(max(counted))
    wanted = [
        ("f32 -> f32, 1B elements, of the copy", 0.92, True, "", _of(rows, same, _OURS, _SHARE)),
        ("bf16 -> f32, 1B elements, of the copy", 0.92, True, "", _of(rows, mixed, _OURS, _SHARE)),
        (
            "bf16 -> f32, 1B elements, against the best of torch, not compiled",
            *(1.7, True, "×"),
            _over(_best(rows, mixed, _eager_path, "device_ms"), ms(mixed, _OURS)),
        ),
        (
            "bf16 -> f32, 1B elements, against the best of torch, torch.compile included",
            *(1.7, True, "×"),
            _over(_best(rows, mixed, _torch_path, "device_ms"), ms(mixed, _OURS)),
        ),
        (
            "bf16 at random, 1B elements, against timm ModelEmaV3, stochastic",
            *(6.0, True, "×"),
            _over(ms(narrow, "timm ModelEmaV3, stochastic"), ms(narrow, _OURS)),
        ),
        (
            "1,000 small tensors, host time against AveragedModel, its faster way",
            *(20.0, True, "×"),
            _over(_best(rows, small, averaged_models, "host_us"), host),
        ),
        ("1,000 small tensors, host time of an update", 100.0, False, " µs", host),
        (
            "1,000 small tensors, host time of an update, watch=sample",
            *(15.0, False, " µs"),
            _of(rows, small, _SAMPLED, "host_us"),
        ),
        (
            "device time of a replay beyond that of the bare kernel, 1,000 small tensors",
            *(5.0, False, " µs"),
            beyond_plan(small),
        ),
        (
            "the same, GPT-2 small, bf16 -> f32",
            *(5.0, False, " µs"),
            beyond_plan("update:gpt2-small:bf16/f32"),
        ),
        ("memory requests of an update, the most of all cases", 0.0, False, "", allocations),
    ]
    return [
        {
            "target": text,
            "wanted": bound,
            "at_least": at_least,
            "value": value,
            "unit": unit,
            "met": None if value is None else (value >= bound if at_least else value <= bound),
        }
        for text, bound, at_least, unit, value in wanted
    ]


_SHARE = "share_of_copy"


def _quantity(value: float, unit: str, is_share: bool) -> str:
    return f"{value:.1%}" if is_share else f"{number(value)}{unit}"


def _targets_table(result: Result) -> str:
    words = {True: "met", False: "missed", None: "not measured"}
    if result["dry_run"]:
        words = dict.fromkeys(words, "dry run")
    body = []
    for row in result["targets"]:
        share = row["target"].endswith("of the copy")
        bound = _quantity(row["wanted"], row["unit"], share)
        value = "–" if row["value"] is None else _quantity(row["value"], row["unit"], share)
        sign = "≥" if row["at_least"] else "≤"
        body.append([row["target"], f"{sign} {bound}", value, words[row["met"]]])
    parts = ["## Targets", aligned(["", "wanted", "measured", ""], body)]
    same = f"{_FLAT}:f32/f32"
    level = _over(
        _of(result["rows"], same, "torch._foreach_lerp_", "device_ms"),
        _of(result["rows"], same, _OURS, "device_ms"),
    )
    if level is not None:
        parts.append(
            "Of one dtype, torch._foreach_lerp_ is one pass over large tensors as well: it took "
            f"{number(level)} times as long as fastema.EMA."
        )
    return "\n\n".join(parts)


def _count(value: float | None, scale: float = 1.0) -> str:
    return "–" if value is None else number(value / scale)


def _case_table(rows: list[Row], others: Iterable[Row]) -> str:
    first = rows[0]
    _, model, mix = first["case"].split(":")
    head = ["", "device ms", "p20–p80", "host µs", "TB/s", "of the copy", "time / fastema"]
    head += ["allocations", "peak MB", "group"]
    body = [
        [
            row["entry"],
            f"{row['device_ms']:.4g}",
            f"{row['p20_ms']:.4g}–{row['p80_ms']:.4g}",
            number(row["host_us"]),
            number(row["tbps"]),
            f"{row['share_of_copy']:.1%}",
            _count(row["ratio_to_fastema"]),
            _count(row["allocations"]),
            _count(row["peak_bytes"], 1e6),
            str(row["heat"]),
        ]
        for row in rows
    ]
    parts = [
        f"### {model}, {_MIXES[mix]}",
        f"{first['n_tensors']:,} tensors, {first['n_elements']:,} elements, "
        f"{first['bytes_per_element']:.3g} bytes per element.",
        aligned(head, body),
    ]
    left_out = [f"- {row['entry']}: {row['reason']}." for row in others]
    if left_out:
        parts.append("Not run:\n\n" + "\n".join(left_out))
    return "\n\n".join(parts)


def _build_table(rows: list[Row]) -> str:
    body = [
        [row["what"], number(row["first_ms"]), number(row["again_ms"]), row["error"] or ""]
        for row in rows
    ]
    return "## Kernels\n\n" + aligned(["", "first use, ms", "the next, ms", "error"], body)


def _tests_text(tests: Row) -> str:
    counts = ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped"))
    lines = [f"{counts}, in {tests['seconds']:.0f} s."]
    if tests["timed_out"]:
        lines.append("They were stopped: the time was up.")
    lines += [f"- failed: {name}" for name in tests["failures"]]
    lines += [f"- skipped, {n} of them: {why}" for why, n in tests["reasons"].items()]
    return "## Tests\n\n" + "\n".join(lines)


_METHOD = """\
All entries of a group run in turn, A B C A B C ..., in one process; a case of which not all entries
fit in memory at once has several groups. Medians. Each result was found equal to a float64
reference first. *device* is the time between two events of the device around a call that was queued
before the device came to it, after memory larger than the caches was read; a call that waits for
the device itself shows that. *host* is what the call takes the host with nothing queued. TB/s
counts the least bytes that the work needs, whatever an entry really moves; *the copy* is the
device's own, of as many bytes up to 4 GB, in the same group. Allocations are requests to torch's
allocator in one call, and the peak of what they take."""


def _device(header: Row) -> str:
    device = header["device"]
    facts = [f"{device['memory_gb']:.0f} GB"] if device["memory_gb"] else []
    facts += [f"{device['multiprocessors']} multiprocessors"] if device["multiprocessors"] else []
    facts += [f"L2 {device['l2_mb']:.0f} MB"] if device["l2_mb"] else []
    facts += [f"driver {device['driver']}"] if device["driver"] else []
    return ", ".join([device["name"], *facts]) + "."


def markdown(result: Result) -> str:
    """Return all of a result, the verdicts first."""
    dry = result["dry_run"]
    name = result["header"]["device"]["name"]
    parts = [
        f"# {'Dry run: ' if dry else ''}fastema on {name}",
        *(["**Dry run on a CPU with tiny tensors: no number here says anything.**"] * dry),
        _device(result["header"]),
        provenance(result["header"]),
        *(["**Incomplete: it was ended before its end.**"] * (not result["complete"])),
        *(f"**Warning: {text}**" for text in result["warnings"]),
        _targets_table(result),
    ]
    if result["dropped"]:
        parts.append("Dropped, because the time was up: " + ", ".join(result["dropped"]) + ".")
    if result["failed"]:
        lines = [f"- {r['case']}, {r['entry']}: {r['reason']}" for r in result["failed"]]
        parts.append("Failed:\n\n" + "\n".join(lines))
    if result["build"]:
        parts.append(_build_table(result["build"]))
    if result["tests"] is not None:
        parts.append(_tests_text(result["tests"]))
    parts += ["## Benchmarks", _METHOD]
    cases = dict.fromkeys(row["case"] for row in [*result["rows"], *result["skipped"]])
    for case in cases:
        rows = [row for row in result["rows"] if row["case"] == case]
        others = [row for row in result["skipped"] if row["case"] == case]
        if rows:
            parts.append(_case_table(rows, others))
        else:
            parts.append(f"### {case}\n\nNot run: {others[0]['reason']}.")
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result["seconds"].items())
    return "\n\n".join([*parts, f"Time taken: {stages}."]) + "\n"
