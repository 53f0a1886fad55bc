"""A dry run of the GPU check: the same code on the CPU, with tiny tensors and a host clock."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench.gpu import cases, check, clock, extras, peers, preflight, race, smi, targets
from bench.race import gpu_figures, machine, readme
from bench.race.peers import OURS, Peer, PeerCalls
from bench.race.question import Settings
from bench.race.report import RESULTS, ROOT, Row, load, store, table
from fastema.engine import cuda as engine
from fastema.engine import shipped
from fastema.kernels.stamp import source_stamp
from fastema.kernels.variants import cpu_variants, gpu_variants

from ..support.stub_gpu import StubGpu, gpu, raise_unavailable

__all__ = ["gpu"]
pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
DRY = Settings(quick=True, device="cpu", minutes=15, select="bf16-f32 or nothing_waits")


DOCUMENTS = {
    "README.md": gpu_figures.README_WITHOUT,
    "docs/gpu.md": gpu_figures.GPU_WITHOUT,
    "docs/offload.md": gpu_figures.OFFLOAD_WITHOUT,
}
"""File -> the sentence that stands in it as long as no GPU has been measured."""


def write_documents(folder: Path, results: Path) -> dict[str, str]:
    """Write what is generated of the project's documents, and return their texts."""
    (folder / "docs").mkdir(exist_ok=True)
    for name in readme.SECTIONS:
        shutil.copy(ROOT / name, folder / name)
    assert readme.main(check=False, root=folder, results=results) == 0
    assert readme.main(check=True, root=folder, results=results) == 0
    return {name: (folder / name).read_text(encoding="utf-8") for name in DOCUMENTS}


def assert_taken_into_documents(
    header: Mapping[str, Any], rows: Sequence[Row], folder: Path
) -> dict[str, str]:
    """Assert that these rows get into the documents if they are of a GPU, and else do not.

    Returns the documents with the rows of two cards.
    """
    results = folder / "stored"
    real = {**header, "dry_run": False, "quick": False, "kernels": "shipped", "card": "H100 80GB"}
    refused = (
        {**real, "dry_run": True},
        {**real, "quick": True},
        {**real, "kernels": "torch's functions"},
        {name: value for name, value in real.items() if name != "dry_run"},
    )
    for name in ("cpu", "loop"):
        store(results, name, *load(RESULTS / f"{name}.json"), "")
    store(results, "gpu-dry-run", {**real, "dry_run": True}, rows, "")
    store(results, "gpu-h100-80gb-part", real, rows, "")
    for wrong in refused:
        store(results, "gpu-h100-80gb", wrong, rows, "")
        texts = write_documents(folder, results)
        assert all(sentence in texts[name] for name, sentence in DOCUMENTS.items())
        assert not any("H100" in text for text in texts.values())
    store(results, "gpu-h100-80gb", real, rows, "")
    store(results, "gpu-h200", {**real, "card": "H200"}, rows, "")
    texts = write_documents(folder, results)
    for name, sentence in DOCUMENTS.items():
        assert sentence not in texts[name], name
        assert "| H100 80GB |" in texts[name], name
        assert "`bench/results/gpu-h200.md`" in texts[name], name
    shutil.rmtree(results)
    return texts


@pytest.mark.slow
def test_dry_run_has_all_stages_and_rows(tmp_path: Path) -> None:
    settings = replace(DRY, out=tmp_path)
    assert command.answer_question("gpu", check.QUESTION, settings, "python -m bench gpu")
    names = ["gpu-dry-run.json", "gpu-dry-run.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    header, dry = load(tmp_path / names[0])
    assert "no number here says anything" in header["device"]
    assert not any(row.failed for row in dry)
    assert [row.entry for row in dry if row.table == "Time taken"] == list(Settings.stages)
    # To run all of them: ``FASTEMA_GPU_TESTS_ON=cpu python -m pytest tests/gpu``.
    tests, *skips = (row for row in dry if row.table == "Tests")
    assert (tests["failed"], tests["passed"] > 0) == (0, True)
    assert "needs a GPU" in {row.missing for row in skips}
    assert header["dry_run"] is True
    assert header["kernels"] in ("shipped", "compiled here")
    assert not [row for row in dry if row.table == "Targets" and row.figures.get("met")]
    everyone = {peer.name for peer in peers.DEVICE_PEERS}
    assert_taken_into_documents(header, dry, tmp_path)
    for extra in extras.extras(quick=True):
        rows = {row.entry: row for row in dry if row.table == extra.title}
        assert any(entry.startswith("fastema") or "offload" in entry for entry in rows), extra.name
        assert all(row.figures or row.missing for row in rows.values())
    states = [row.entry for row in dry if row.table == smi.TITLE]
    assert states == ["before", "after"]
    for case in cases.SMALL:
        rows = {row.entry: row for row in dry if row.table == case.title}
        assert set(rows) == {*everyone, targets.COPY}, case.name
        assert next(iter(rows)) == OURS
        assert rows[OURS]["ratio"] == 1
        assert rows[targets.COPY]["share_of_copy"] == pytest.approx(1)
        for row in rows.values():
            if not row.missing:
                assert {row[name] for name in ("allocations", "peak_mb", "driver_bytes")} == {None}
                low, high = row["device_spread_ms"]
                assert 0 < low <= row["device_ms"] <= high
                assert row["host_us"] > 0


def test_wrong_results_fail_the_race() -> None:
    def idle(model: torch.nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
        averages = [p.detach().to(dtype, copy=True) for p in model.parameters()]
        return PeerCalls(lambda: None, lambda: averages)

    budget, wrong = clock.Budget(60), [Peer("fastema.idle", idle)]
    rows = race.race(cases.SMALL[0], clock.HostClock(CPU), budget, wrong)
    (failed,) = (row for row in rows if row.failed)
    assert failed.entry == "fastema.idle"
    assert "differ from the float64 reference" in failed.missing
    assert all(row.missing for row in rows)


class HostClocks(clock.HostClock):
    """A clock that says for each call whether the device waited for the host in it."""

    def __init__(self, *waited: bool) -> None:
        super().__init__(CPU)
        self._waited = list(waited)

    def device_time(self, job: race.Job, ahead_s: float) -> float:
        job()
        self.waited = self._waited.pop(0)
        return 1e-3


@pytest.mark.parametrize(("waited", "timed_at"), [((1, 1, 0), "host"), ((1, 0, 0), "device")])
def test_a_call_that_is_not_queued_in_time_is_marked(
    waited: tuple[int, ...], timed_at: str
) -> None:
    calls = [flag for one in waited for flag in (bool(one), False)]  # the job's, the copy's
    rows = race.time_beside_copy(
        "A table",
        {"a loop": lambda: None},
        4_096,
        race.Copy(4_096, CPU),
        HostClocks(*calls),
        rounds=3,
        budget_s=60,
    )
    loop, copy = rows
    assert (loop.entry, loop["timed_at"]) == ("a loop", timed_at)
    assert (copy.entry, copy["timed_at"]) == (targets.COPY, "device")
    assert loop["share_of_copy"] == pytest.approx(1)


def test_torchs_functions_are_never_timed_as_ours(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "cubin", raise_unavailable)
    ours = [peer for peer in peers.DEVICE_PEERS if peer.name in (OURS, targets.PLAN)]
    rows = race.race(cases.SMALL[0], clock.HostClock(CPU), clock.Budget(60), ours)
    failed = {row.entry: row.missing for row in rows if row.failed}
    assert failed.keys() == {OURS, targets.PLAN}
    assert all("SlowWarning" in text for text in failed.values())
    assert not any(row.figures for row in rows if row.entry in failed)
    assert not any(row["met"] for row in targets.targets(rows))


def test_the_check_stops_after_build_where_torchs_functions_run(
    gpu: StubGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "cubin", raise_unavailable)
    settings = replace(DRY, out=tmp_path)
    assert check.QUESTION.header(settings)["kernels"] == "torch's functions"
    rows = list(check.rows(settings))
    assert {row.table for row in rows} == {"Kernels", "Stopped", "Time taken"}
    stopped, warned = (
        next(row for row in rows if (row.table, row.entry) == key)
        for key in (("Stopped", "everything after build"), ("Kernels", check.WARNING))
    )
    assert stopped.failed
    assert warned.failed
    assert "no compiler" in stopped.missing
    assert [row.entry for row in rows if row.table == "Time taken"] == ["build"]


@pytest.mark.slow
def test_a_stub_of_a_gpu_meets_no_target(gpu: StubGpu) -> None:
    ours = [peer for peer in peers.DEVICE_PEERS if peer.name in (OURS, targets.PLAN)]
    rows = list(race.race(cases.SMALL[0], clock.HostClock(CPU), clock.Budget(60), ours))
    assert {row.entry for row in rows if row.figures} == {OURS, targets.PLAN, targets.COPY}
    judged = list(targets.targets(rows, dry_run=True))
    assert not any(row.figures.get("met") for row in judged)
    assert judged[-1].missing == "not judged: a dry run says nothing of a GPU"


def row(table: str, entry: str, ms: float, host: float = 1.0, share: float = 0.5) -> Row:
    allocations = 9 if entry.endswith("casts") else 0
    figures = {"device_ms": ms, "host_us": host, "share_of_copy": share}
    return Row(table, entry, {**figures, "allocations": allocations})


def test_targets_are_judged_from_the_measured_rows() -> None:
    same, mixed, small = targets.SAME, targets.MIXED, targets.SMALL
    measured = [
        row(same, OURS, 3.0, share=0.95),
        row(same, "torch._foreach_lerp_", 3.03),
        row(mixed, OURS, 2.5, share=0.94),
        row(mixed, "torch._foreach_lerp_, casts", 5.0),
        row(mixed, "timm ModelEmaV3", 1.0),  # not one of torch's own
        row(mixed, targets.COMPILED, 2.425),
        row(targets.NARROW, OURS, 1.5, share=0.96),
        row(targets.NARROW, "timm ModelEmaV3, stochastic", 15.0),
        row(small, OURS, 0.010, 50.0),
        row(small, "AveragedModel multi_avg_fn", 2.0, 2_000.0),
        row(small, targets.PLAN, 0.010),
        row(small, targets.CAPTURED, 0.0135),
        row(targets.TINY, OURS, 0.0049),
        row(targets.TINY, targets.FOREACH, 0.004),
        Row(targets.WINDOW, "fastema.SMA", {"device_ms": 1.0}),
    ]
    expected = [
        ("f32 -> f32, 1B", 0.95, True),
        ("bf16 -> f32, 1B elements, of", 0.94, False),
        ("bf16 -> bf16, 1B elements, of", 0.96, True),
        ("bf16 -> f32, 1B elements, against the best of torch, not", 2.0, True),
        ("bf16 -> f32, 1B elements, against torch.compile", 0.97, True),
        ("bf16 at random", 10.0, True),
        ("1,000 small tensors, host time against", 40.0, True),
        ("1,000 small tensors, host time of an update", 50.0, True),
        ("device time of a replay beyond that of the bare kernel, 1,000", 3.5, False),
        ("the same, GPT-2", None, None),
        ("64 tiny tensors, device time beyond that of torch._foreach_lerp_", 0.9, True),
        ("memory requests", 0.0, True),
        ("f32 -> f32, 1B elements, against torch._foreach_lerp_", 1.01, None),
    ]
    for (start, value, met), found in zip(expected, targets.targets(measured), strict=True):
        assert found.entry.startswith(start)
        assert found["value"] == (None if value is None else pytest.approx(value))
        assert found["met"] is met
    dry = list(targets.targets(measured, dry_run=True))
    assert [one["met"] for one in dry[:-1]] == [None] * len(expected)
    assert dry[-1].missing == "not judged: a dry run says nothing of a GPU"
    titles = {case.title for case in cases.FULL}
    assert {targets.SAME, targets.MIXED, targets.NARROW, targets.SMALL} <= titles
    assert {targets.GPT2, targets.TINY} <= titles
    everyone = {peer.name for peer in peers.DEVICE_PEERS}
    assert {OURS, targets.PLAN, targets.CAPTURED, targets.COMPILED} <= everyone


def test_documents_take_their_figures_of_gpus_from_stored_results(tmp_path: Path) -> None:
    header = {"quick": False, "command": "python -m bench gpu", "date_utc": "now", "commit": "0"}
    link = Row(targets.LINK, "fastema, weights to the host", {"link_gbps": 51.5})
    looped = row(targets.SMALL, "torch mul_/add_ loop", 2.5)
    measured = [
        row(targets.SAME, OURS, 4.0, share=0.972),
        row(targets.SAME, targets.FOREACH, 4.44),
        row(targets.MIXED, OURS, 3.0),
        row(targets.SMALL, OURS, 0.0075),
        replace(looped, figures={**looped.figures, "timed_at": "host"}),
        link,
        Row(targets.STEP, "offload=True", {"stall_ms": 0.0625, "longer_ms": -0.5}),
    ]
    texts = assert_taken_into_documents(header, measured, tmp_path)
    for name in ("README.md", "docs/gpu.md"):
        for label, value in (
            ("1 billion float32 weights: of the copy's TB/s", "97%"),
            ("1 billion float32 weights: `_foreach_lerp_` takes", "1.11×"),
            ("1,000 small float32 tensors: on the device, µs", "7.50"),
            ("1 billion bfloat16 weights, float32 average: a compiled loop takes", "–"),
        ):
            (line,) = (line for line in texts[name].splitlines() if line.startswith(f"| {label}"))
            assert [cell.strip() for cell in line.split("|")[2:4]] == [value] * 2
    assert "2.5 (333×) *" in texts["docs/gpu.md"]
    assert "51.5" in texts["docs/offload.md"]
    assert "-0.50" in texts["docs/offload.md"]


def test_clocks_and_power_are_those_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho \"$@\" > $0.log\necho '1980, 1980, 2619, 412.50, [N/A], 41'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    properties = type("Properties", (), {"uuid": "0a1b"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = smi.state(torch.device("cuda:1"), "before")
    assert found.figures == {
        **{"sm_mhz": 1980.0, "most_sm_mhz": 1980.0, "memory_mhz": 2619.0},
        **{"watts": 412.5, "most_watts": None, "celsius": 41.0},
    }
    asked = (tmp_path / "nvidia-smi.log").read_text()
    assert "--id=GPU-0a1b" in asked
    assert "power.draw" in asked
    assert "412" in table(smi.TITLE, [found], check.QUESTION.figures)
    assert smi.state(CPU, "before").missing
    program.write_text("#!/bin/sh\nexit 9\n")
    assert smi.state(torch.device("cuda:1"), "after").missing


def test_results_are_named_by_card_and_whole_if_all_cases_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    whole = "gpu-h100-80gb-hbm3"
    assert check.result_name(Settings()) == whole
    assert check.result_name(Settings(stages=("benchmark",), minutes=9.0)) == whole
    for part in ({"stages": ("build", "test")}, {"cases": ("tiny-64",)}, {"quick": True}):
        assert check.result_name(replace(Settings(), **part)) == f"{whole}-part"
    assert check.result_name(Settings(device="cpu")) == "gpu-dry-run"


def test_a_copy_without_git_takes_its_commit_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv(machine.COMMIT, raising=False)
    assert machine.commit() == ""
    monkeypatch.setenv(machine.COMMIT, "0123456789ab")
    assert machine.commit() == "0123456789ab"


# -- before the machine is taken -------------------------------------------------------------------


def fill_compiled(folder: Path, stamp: str) -> None:
    """Write a folder of kernels as `make compiled` does, without their code."""
    for device, target, variants in (
        ("cpu", "x86-64-v3", cpu_variants()),
        ("gpu", "sm_90", gpu_variants()),
    ):
        (folder / device / target).mkdir(parents=True)
        for one in variants:
            (folder / device / target / f"{one.operation}.xz").touch()
        (folder / device / "stamp").write_text(stamp)


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Make everything that the check needs seem to be there, but for a GPU."""
    fill_compiled(tmp_path / "compiled", source_stamp())
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "compiled")
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.setattr(preflight, "commit", lambda: "0123456789ab")
    monkeypatch.setattr(preflight.platform, "machine", lambda: "x86_64")
    return Settings(device="cpu", out=tmp_path / "out")


def test_preflight_passes_where_everything_is_there(ready: Settings) -> None:
    assert [one for one in preflight.findings(ready) if one.lost] == []
    assert preflight.main(ready) == 0


@pytest.mark.parametrize(
    "gone", ["stamp", "operation", "folder", "package", "device", "results", "commit"]
)
def test_preflight_names_what_would_be_lost(
    gone: str, ready: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, settings = tmp_path / "compiled" / "gpu", ready
    if gone == "stamp":
        (kernels / "stamp").unlink()
        expected = ("compiled kernels, gpu", "missing")
    elif gone == "operation":
        (kernels / "sm_90" / "window.xz").unlink()
        expected = ("compiled kernels, gpu", "sm_90: window.xz")
    elif gone == "folder":
        (kernels / "sm_90").rename(tmp_path / "elsewhere")
        expected = ("compiled kernels, gpu", "incomplete")
    elif gone == "package":
        monkeypatch.setattr(preflight, "find_spec", lambda name: name != "triton" or None)
        expected = ("package triton", "torch.compile")
    elif gone == "device":
        monkeypatch.setattr(preflight, "version", lambda name: "2.11.0+cpu")
        settings = replace(ready, device="cuda")
        expected = ("device cuda:0", "has no CUDA")
    elif gone == "results":
        (tmp_path / "a file").touch()
        settings = replace(ready, out=tmp_path / "a file" / "out")
        expected = ("results", "--out DIR")
    else:
        monkeypatch.setattr(preflight, "commit", lambda: "")
        expected = ("commit", machine.COMMIT)
    (lost,) = (one for one in preflight.findings(settings) if one.lost)
    assert lost.subject == expected[0]
    assert expected[1] in lost.found
    assert preflight.main(settings) == 1


def test_preflight_fails_after_an_edited_comment_of_a_kernel(
    tmp_path: Path,
) -> None:
    """Compiled kernels of a copy of the project are stale by any edit; no compiler is started."""
    for name in ("fastema", "kernels", "bench", "tests/support"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("compiled", "results", "__pycache__"),
        )
    fill_compiled(tmp_path / "fastema" / "compiled", source_stamp())
    script = """if True:
        import sys
        from bench import __main__ as command
        status = command.main(["gpu", "--preflight", "--device", "cpu", "--out", "out"])
        assert not {"torch", "numba"} & sys.modules.keys()
        print("status", status)
    """

    def said() -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()

    assert [line[:4] for line in said() if "compiled kernels, gpu" in line] == ["fine"]
    edited = tmp_path / "kernels" / "scalar.py"
    edited.write_text(edited.read_text() + "# a comment\n")
    lines = said()
    assert [line[:4] for line in lines if "compiled kernels, gpu" in line] == ["LOST"]
    assert lines[-1] == "status 1"
