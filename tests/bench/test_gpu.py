"""The GPU check runs dry: the same lines on the CPU, with tiny tensors and the host's clock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    gpu,
    gpu_cases,
    gpu_clock,
    gpu_peers,
    gpu_race,
    gpu_report,
    models,
)
from bench.flatmodule import DTYPES
from bench.peers import OURS, Peer, Running

from ..support.requirements import require, require_packages

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")


# -- the dry run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """The result of a dry run, of its tests a part, its table, and what was printed."""
    folder = tmp_path_factory.mktemp("dry")
    before = sorted((ROOT / "bench" / "results").iterdir())
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--small"]
    command += ["--minutes", "15", "--out", str(folder), "--select", "bf16-f32 or nothing_waits"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-4_000:]
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    assert sorted(path.name for path in folder.iterdir()) == ["gpu-dry-run.json", "gpu-dry-run.md"]
    stored = json.loads((folder / "gpu-dry-run.json").read_text(encoding="utf-8"))
    return stored, (folder / "gpu-dry-run.md").read_text(encoding="utf-8"), done.stdout


@pytest.mark.slow
def test_dry_run(dry: tuple[dict[str, Any], str, str]) -> None:
    result, text, printed = dry
    assert result["dry_run"]
    assert result["complete"]
    assert set(result["seconds"]) == {"build", "tests", "benchmark"}
    assert result["header"]["device"]["name"]
    assert result["warnings"] == result["failed"] == result["dropped"] == []
    assert all(row["first_ms"] > 0 and row["again_ms"] > 0 for row in result["build"])
    assert not any(row["error"] for row in result["build"])
    assert text in printed
    assert text.startswith("# Dry run:")
    assert "no number here says anything" in text


@pytest.mark.slow
def test_tests_of_the_dry_run(dry: tuple[dict[str, Any], str, str]) -> None:
    """Those of the GPU pass on a CPU, but for what only a GPU has.

    All of them: ``FASTEMA_GPU_TESTS_ON=cpu python -m pytest tests/gpu``.
    """
    tests = dry[0]["tests"]
    assert tests["failed"] == 0
    assert not tests["timed_out"]
    assert tests["status"] == 0
    assert tests["passed"] > 5
    assert sum(tests["reasons"].values()) == tests["skipped"] > 0
    assert "only a GPU has it" in " ".join(tests["reasons"])


NUMBERS = {
    *("n_tensors", "n_elements", "bytes", "bytes_per_element", "rounds", "heat"),
    *("device_ms", "p20_ms", "p80_ms", "host_us", "tbps", "share_of_copy", "ratio_to_fastema"),
}


@pytest.mark.slow
def test_rows_of_the_dry_run(dry: tuple[dict[str, Any], str, str]) -> None:
    result, text, _ = dry
    by_case: dict[str, dict[str, Any]] = {case.name: {} for case in gpu_cases.SMALL}
    for row in result["rows"]:
        assert all(row[column] > 0 for column in NUMBERS), row
        assert {row[c] for c in ("allocations", "peak_bytes", "driver_bytes")} == {None}
        assert row["p20_ms"] <= row["device_ms"] <= row["p80_ms"]
        by_case[row["case"]][row["entry"]] = row
    everyone = {peer.name for peer in gpu_peers.DEVICE_PEERS}
    for name, rows in by_case.items():
        out = {row["entry"] for row in result["skipped"] if row["case"] == name}
        assert out | set(rows) == {*everyone, gpu_peers.COPY}, name
        assert not out & set(rows)
        assert next(iter(rows)) == OURS
        assert rows[OURS]["ratio_to_fastema"] == 1
        assert rows[gpu_peers.COPY]["share_of_copy"] == pytest.approx(1)
        _, model, mix = name.split(":")
        assert f"### {model}, {gpu_report._MIXES[mix]}" in text
    assert all(f"- {row['entry']}: {row['reason']}." in text for row in result["skipped"])
    assert len(result["targets"]) == len(gpu_report.targets([]))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_dry_run_stays_out_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a dry run belongs elsewhere" in refused(capsys, "--device", "cpu", "--small")
    below = str(ROOT / "bench" / "results" / "below")
    assert "a dry run belongs elsewhere" in refused(capsys, "--device", "cpu", "--out", below)


def test_what_cannot_be_done_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in refused(capsys)
    arguments = ["--device", "cpu", "--small", "--out", str(tmp_path)]
    assert "no case is called 'gpt3'" in refused(capsys, *arguments, "--case", "gpt3")


def test_cases_without_time_are_dropped_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "_TOOLKIT", tmp_path / "none")
    arguments = ["--device", "cpu", "--small", "--only", "benchmark", "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--minutes", "0", "--case", "flat-1B"]) == 0
    result = json.loads((tmp_path / "gpu-dry-run.json").read_text(encoding="utf-8"))
    names = [case.name for case in gpu_cases.SMALL if case.model == "flat-1B"]
    assert result["dropped"] == names
    assert result["rows"] == []
    assert f"Dropped, because the time was up: {', '.join(names)}." in capsys.readouterr().out


def test_the_toolkit_is_named_where_nothing_else_names_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", "before")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(gpu, "_TOOLKIT", tmp_path)
    gpu.name_toolkit()
    assert os.environ["CUDA_HOME"] == "before"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(gpu, "_TOOLKIT", tmp_path / "none")
    gpu.name_toolkit()
    assert "CUDA_HOME" not in os.environ
    monkeypatch.setattr(gpu, "_TOOLKIT", tmp_path)
    gpu.name_toolkit()
    assert os.environ["CUDA_HOME"] == str(tmp_path)


def test_names_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda", 0)
    assert gpu.stem(cuda, part=False) == "gpu-h100-80gb-hbm3"
    assert gpu.stem(cuda, part=True) == "gpu-h100-80gb-hbm3-part"
    assert gpu.stem(CPU, part=False) == "gpu-dry-run"


# -- cases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inventory", "tensors", "elements"),
    [
        (gpu_cases.llama(), 291, 6_738_415_616),
        (gpu_cases.vit(), 152, 86_567_656),
        (gpu_cases.hybrid(), 152 + 161, 86_567_656 + 25_557_032),
    ],
)
def test_inventories(inventory: models.Inventory, tensors: int, elements: int) -> None:
    assert len(inventory) == len({name for name, _ in inventory}) == tensors
    assert models.total_elements(inventory) == elements


def test_small_cases_stand_for_full_ones() -> None:
    assert {case.name for case in gpu_cases.SMALL} <= {case.name for case in gpu_cases.FULL}
    assert {c.model for c in gpu_cases.SMALL} == {c.model for c in gpu_cases.FULL}
    everyone = {peer.name for peer in gpu_peers.DEVICE_PEERS}
    assert all(set(case.entries) <= everyone for case in gpu_cases.FULL)


def test_traffic_counts_every_tensor_by_its_dtype() -> None:
    (case,) = (case for case in gpu_cases.SMALL if case.model == "vit-batchnorm")
    model = gpu_cases.build(case, CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}
    narrow, norm = 33 * 17 + 33, 5
    assert gpu_cases.traffic(case, model) == narrow * 10 + norm * 12 + 2 * (4 * 5 + 8)


def test_weights_are_random() -> None:
    case = gpu_cases.SMALL[0]
    model = gpu_cases.build(case, CPU)
    (flat,) = model.parameters()
    before = flat.clone()
    assert bool((flat != 0).all())
    gpu_cases.fill_(model, 1)
    assert not bool((flat == before).any())


# -- heats ----------------------------------------------------------------------------------------


class FakeClock(gpu_clock.HostClock):
    """Memory for a few entries of one byte each."""

    def __init__(self, room: int) -> None:
        super().__init__(CPU)
        self.room, self.held, self.released = room, 0, 0

    def free_bytes(self) -> int:
        return self.room - self.held

    def release(self) -> None:
        self.released += 1


def peer(name: str) -> Peer[Running]:
    return Peer(name, lambda model, decay, dtype: Running(lambda: None, list))


def grouped(
    clock: FakeClock, names: str, begin: Callable[[Peer[Running]], gpu_race.Started]
) -> tuple[list[str], dict[str, Exception | None]]:
    """Names of the entries of each group, and those that gave up."""
    gone: dict[str, Exception | None] = {}
    groups = []
    for group in gpu_race.heats([peer(n) for n in names], begin, gone.__setitem__, clock):
        groups.append("".join(one.name for one in group))
        clock.held = 0
    return groups, gone


def started(name: str, passing: int = 0) -> gpu_race.Started:
    return gpu_race.Started(name, lambda: None, 0.0, gpu_clock.Memory(0, passing, 0))


def test_all_that_fit_run_together() -> None:
    clock = FakeClock(room=9)
    assert grouped(clock, "ABC", lambda one: started(one.name)) == (["ABC"], {})


def test_what_does_not_fit_runs_in_another_group() -> None:
    clock = FakeClock(room=2)

    def begin(one: Peer[Running]) -> gpu_race.Started:
        if not clock.free_bytes():
            raise torch.cuda.OutOfMemoryError
        clock.held += 1
        return started(one.name)

    assert grouped(clock, "ABCDE", begin) == (["AB", "CD", "E"], {})


def test_what_is_needed_in_passing_counts_too() -> None:
    clock = FakeClock(room=10)

    def begin(one: Peer[Running]) -> gpu_race.Started:
        return started(one.name, passing=11 if one.name in "AC" else 0)

    # A leaves no room for what it needs in passing beside another, nor C.
    assert grouped(clock, "ABC", begin) == (["A", "B", "C"], {})


def test_what_fits_nowhere_gives_up() -> None:
    clock = FakeClock(room=10)
    broken = ValueError("broken")

    def begin(one: Peer[Running]) -> gpu_race.Started:
        if one.name == "B":
            raise torch.cuda.OutOfMemoryError
        if one.name == "C":
            raise broken
        return started(one.name)

    groups, gone = grouped(clock, "ABCD", begin)
    assert groups == ["AD"]
    assert gone == {"B": None, "C": broken}


def test_wrong_results_are_failures() -> None:
    def idle(model: torch.nn.Module, decay: float, dtype: torch.dtype) -> Running:
        averages = [p.detach().to(dtype, copy=True) for p in model.parameters()]
        return Running(lambda: None, lambda: averages)

    case, clock, outcome = gpu_cases.SMALL[0], gpu_clock.HostClock(CPU), gpu_race.Outcome()
    gpu_race.race(case, clock, outcome, gpu_clock.Budget(60), [Peer("fastema.idle", idle)])
    assert [row["entry"] for row in outcome.failed] == ["fastema.idle"]
    assert "differ from the float64 reference" in outcome.failed[0]["reason"]
    assert outcome.rows == []


def test_a_case_that_is_too_large_is_skipped_by_name() -> None:
    outcome, case = gpu_race.Outcome(), gpu_cases.FULL[0]
    gpu_race.race(case, FakeClock(room=1_000_000_000), outcome, gpu_clock.Budget(60))
    (row,) = outcome.skipped
    assert row["reason"] == "needs 6 GB, 1 GB are free"
    assert row["case"] == case.name


def test_entries_without_time_are_skipped_by_name() -> None:
    outcome, case = gpu_race.Outcome(), gpu_cases.SMALL[0]
    gpu_race.race(case, gpu_clock.HostClock(CPU), outcome, gpu_clock.Budget(0))
    assert outcome.rows == outcome.failed == []
    assert "no time was left" in {row["reason"] for row in outcome.skipped}


def test_jobs_are_timed_in_turn_on_fresh_weights() -> None:
    order: list[str] = []
    jobs = {name: lambda name=name: order.append(name) for name in "AB"}
    durations = gpu_race.timed(
        jobs, dict.fromkeys("AB", 0.0), lambda: order.append("-"), 2, FakeClock(1), 60.0
    )
    assert "".join(order) == 3 * "-AB"  # the first round is not counted
    assert {name: len(times) for name, times in durations.items()} == {"A": 2, "B": 2}


@pytest.mark.slow
def test_entries_average_at_constant_decay() -> None:
    """Those that only the GPU check has."""
    case = gpu_cases.SMALL[1]
    model = gpu_cases.build(case, CPU)
    for entry in gpu_peers.DEVICE_PEERS:
        if entry.name in (gpu_peers.SAMPLED, gpu_peers.COMPILED, "fastema.EMA, bf16+16"):
            clock = gpu_clock.HostClock(CPU)
            assert gpu_race.start(entry, model, case, clock, seed=1).name == entry.name
    assert DTYPES[case.average_dtype] == torch.float32


# -- the report -----------------------------------------------------------------------------------


def row(case: str, entry: str, ms: float, host: float = 1.0, **others: Any) -> dict[str, Any]:
    return {
        "case": case,
        "entry": entry,
        "device_ms": ms,
        "host_us": host,
        "share_of_copy": others.get("share", 0.5),
        "allocations": others.get("allocations", 0),
    }


def rows() -> list[dict[str, Any]]:
    flat, small = "update:flat-1B", "update:small-1000:f32/f32"
    return [
        row(f"{flat}:f32/f32", OURS, 3.0, share=0.93),
        row(f"{flat}:f32/f32", "torch._foreach_lerp_", 3.03),
        row(f"{flat}:bf16/f32", OURS, 2.5, share=0.91),
        row(f"{flat}:bf16/f32", "torch._foreach_lerp_, casts", 5.0, allocations=9),
        row(f"{flat}:bf16/f32", "timm ModelEmaV3", 1.0),  # no path of torch's own
        row(f"{flat}:bf16/f32", gpu_peers.COMPILED, 3.0),
        row(f"{flat}:bf16/bf16", OURS, 1.5),
        row(f"{flat}:bf16/bf16", "timm ModelEmaV3, stochastic", 15.0),
        row(small, OURS, 0.010, 50.0),
        row(small, gpu_peers.SAMPLED, 0.010, 16.0),
        row(small, "AveragedModel avg_fn", 9.0, 9_000.0),
        row(small, "AveragedModel multi_avg_fn", 2.0, 2_000.0),
        row(small, gpu_peers.PLAN, 0.010),
        row(small, gpu_peers.CAPTURED, 0.0135),
    ]


def test_targets() -> None:
    found = {one["target"]: one for one in gpu_report.targets(rows())}
    values = {name: (one["value"], one["met"]) for name, one in found.items()}
    expected = [
        ("f32 -> f32, 1B", 0.93, True),
        ("bf16 -> f32, 1B elements, of", 0.91, False),
        ("bf16 -> f32, 1B elements, against the best of torch, not", 2.0, True),
        ("bf16 -> f32, 1B elements, against the best of torch, torch", 1.2, False),
        ("bf16 at random", 10.0, True),
        ("1,000 small tensors, host time against", 40.0, True),
        ("1,000 small tensors, host time of an update", 50.0, True),
        ("1,000 small tensors, host time of an update, watch", 16.0, False),
        ("device time of a replay beyond that of the bare kernel, 1,000", 3.5, True),
        ("the same, GPT-2", None, None),
        ("memory requests", 0.0, True),
    ]
    assert len(values) == len(expected)
    for (start, value, met), (name, (got, verdict)) in zip(expected, values.items(), strict=True):
        assert name.startswith(start)
        assert got == (None if value is None else pytest.approx(value))
        assert verdict is met


def test_an_allocation_of_ours_is_a_missed_target() -> None:
    *_, last = gpu_report.targets([row("update:x:f32/f32", gpu_peers.PLAN, 1.0, allocations=2)])
    assert (last["value"], last["met"]) == (2.0, False)


def test_verdicts_in_the_table() -> None:
    result = {"dry_run": False, "targets": gpu_report.targets(rows()), "rows": rows()}
    text = gpu_report._targets_table(result)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    lines = {line[0]: line[1:] for line in cells if line}
    assert lines["f32 -> f32, 1B elements, of the copy"] == ["≥ 92.0%", "93.0%", "met"]
    assert lines["bf16 -> f32, 1B elements, of the copy"] == ["≥ 92.0%", "91.0%", "missed"]
    assert lines["the same, GPT-2 small, bf16 -> f32"] == ["≤ 5.00 µs", "–", "not measured"]
    assert "it took 1.01 times as long" in text
    assert "dry run" in gpu_report._targets_table({**result, "dry_run": True})


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ({}, True),
        ({"tests": None}, True),
        ({"failed": [{"entry": "torch_ema"}]}, True),
        ({"failed": [{"entry": "fastema.EMA, captured"}]}, False),
        ({"failed": [{"entry": "all"}]}, False),
        ({"warnings": ["slow"]}, False),
        ({"build": [{"error": "no compiler"}]}, False),
        ({"tests": {"failed": 1, "timed_out": False, "status": 1}}, False),
        ({"tests": {"failed": 0, "timed_out": True, "status": 2}}, False),
    ],
)
def test_what_makes_the_check_fail(change: dict[str, Any], fine: bool) -> None:
    result = {
        "warnings": [],
        "build": [{"error": None}],
        "tests": {"failed": 0, "timed_out": False, "status": 0},
        "failed": [],
    }
    assert gpu.succeeded({**result, **change}) is fine


def test_the_report_needs_no_torch() -> None:
    code = "import sys, bench.gpu_report; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_host_time_of_an_update(tmp_path: Path) -> None:
    """Against a driver that does nothing: one launch, and the question which context is current."""
    require_packages("cuda.bindings.driver")
    require(shutil.which("cc") is not None, "a C compiler")
    command = [sys.executable, "-m", "bench.launch", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads((tmp_path / "launch-quick.json").read_text())["rows"]
    assert {row["tensors"] for row in rows} == {10, 100, 1_000}
    for row in rows:
        assert row["us"] > 0
        assert row["driver_calls"] == (4 if "capturable" in row["entry"] else 2)
