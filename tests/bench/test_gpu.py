"""A dry run of the GPU check: the same code on the CPU, with tiny tensors and a host clock."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench.gpu import cases, check, clock, peers, race, targets
from bench.race.peers import OURS, Peer, PeerCalls
from bench.race.question import Settings
from bench.race.report import Row, load

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
DRY = Settings(quick=True, device="cpu", minutes=15, select="bf16-f32 or nothing_waits")


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
    everyone = {peer.name for peer in peers.DEVICE_PEERS}
    for case in cases.SMALL:
        rows = {row.entry: row for row in dry if row.table == case.title}
        assert set(rows) == {*everyone, peers.COPY}, case.name
        assert next(iter(rows)) == OURS
        assert rows[OURS]["ratio"] == 1
        assert rows[peers.COPY]["share_of_copy"] == pytest.approx(1)
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


def row(table: str, entry: str, ms: float, host: float = 1.0, share: float = 0.5) -> Row:
    allocations = 9 if entry.endswith("casts") else 0
    figures = {"device_ms": ms, "host_us": host, "share_of_copy": share}
    return Row(table, entry, {**figures, "allocations": allocations})


def test_targets_are_judged_from_the_measured_rows() -> None:
    same, mixed, small = targets.SAME, targets.MIXED, targets.SMALL
    measured = [
        row(same, OURS, 3.0, share=0.93),
        row(same, "torch._foreach_lerp_", 3.03),
        row(mixed, OURS, 2.5, share=0.91),
        row(mixed, "torch._foreach_lerp_, casts", 5.0),
        row(mixed, "timm ModelEmaV3", 1.0),  # not one of torch's own
        row(mixed, targets.COMPILED, 3.0),
        row(targets.NARROW, OURS, 1.5),
        row(targets.NARROW, "timm ModelEmaV3, stochastic", 15.0),
        row(small, OURS, 0.010, 50.0),
        row(small, targets.SAMPLED, 0.010, 16.0),
        row(small, "AveragedModel multi_avg_fn", 2.0, 2_000.0),
        row(small, targets.PLAN, 0.010),
        row(small, targets.CAPTURED, 0.0135),
    ]
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
        ("f32 -> f32, 1B elements, against torch._foreach_lerp_", 1.01, None),
    ]
    for (start, value, met), found in zip(expected, targets.targets(measured), strict=True):
        assert found.entry.startswith(start)
        assert found["value"] == (None if value is None else pytest.approx(value))
        assert found["met"] is met
    titles = {case.title for case in cases.FULL}
    assert {targets.SAME, targets.MIXED, targets.NARROW, targets.SMALL, targets.GPT2} <= titles
    everyone = {peer.name for peer in peers.DEVICE_PEERS}
    assert {OURS, targets.PLAN, targets.CAPTURED, targets.SAMPLED, targets.COMPILED} <= everyone
