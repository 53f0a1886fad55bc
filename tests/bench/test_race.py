"""The benchmarks compare like with like: right results, right byte counts, tables that render."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import (
    cases,
    clock,
    jobs,
    memory,
    models,
    peers,
    races,
    report,
    swaps,
    verify,
)
from bench.flatmodule import DTYPES, build, randomise_

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.torch

DECAY = 0.9


def tiny() -> models.Inventory:
    return [
        *models.gpt2(layers=1, width=16, vocab=50, context=8),
        ("one", (1,)),
        ("odd", (3, 5, 7)),
        ("big", (70_001,)),  # above the 32,768 elements at which torch starts threads
    ]


def entries(table: tuple[peers.Peer, ...]) -> list[object]:
    return [
        pytest.param(peer, mix, id=f"{peer.name}-{mix}") for peer in table for mix in cases.MIXES
    ]


def skip_unless_running(peer: peers.Peer, mix: str) -> None:
    if reason := peer.missing():
        pytest.skip(reason)
    if mix in peer.refusals and peer.refusals[mix].error is None:
        pytest.skip(peer.refusals[mix].reason)


@pytest.mark.parametrize(("peer", "mix"), entries(peers.PEERS))
def test_peer_averages_at_constant_decay(peer: peers.Peer[peers.Running], mix: str) -> None:
    skip_unless_running(peer, mix)
    weights, average = mix.split("/")
    model = build(tiny(), weights)

    def three_updates() -> None:
        running = peer.setup(model, DECAY, DTYPES[average])
        before = [verify.sample(p) for p in model.parameters()]
        for seed in (1, 2, 3):
            randomise_(model, seed)
            running.update()
            assert all(a.dtype == DTYPES[average] for a in running.average())
            verify.assert_averaged(
                running.average(),
                before,
                list(model.parameters()),
                DECAY,
                rounds_weights=peer.rounds_weights,
                stochastic=peer.stochastic,
            )
            before = [verify.sample(a) for a in running.average()]

    refused = peer.refusals.get(mix)
    if refused is None:
        three_updates()
    else:
        with pytest.raises(RuntimeError, match=refused.error):
            three_updates()


@pytest.mark.parametrize(("peer", "mix"), entries(swaps.SWAPS))
def test_swap_peer_goes_there_and_back(peer: peers.Peer[swaps.Swapping], mix: str) -> None:
    skip_unless_running(peer, mix)
    jobs.prepare(cases.Case("tiny", mix, tiny, 1, question="swap"), only=peer.name)


def test_unbiased_stochastic_rounding_is_told_from_a_stalled_average() -> None:
    before = [torch.full((1000,), 1.0).double()]
    weights = [torch.full((1000,), 2.0, dtype=torch.bfloat16)]
    stalled = [torch.full((1000,), 1.0, dtype=torch.bfloat16)]
    with pytest.raises(AssertionError, match="1000 of 1000 elements differ"):
        verify.assert_averaged(stalled, before, weights, DECAY, stochastic=True)


@pytest.mark.parametrize("wrong", [0, 149_999, 75_000])
def test_a_peer_that_leaves_out_a_chunk_is_caught(wrong: int) -> None:
    before, weight = torch.randn(150_000), torch.randn(150_000)
    got = torch.lerp(before, weight, 1 - DECAY)
    verify.assert_averaged([got], [before.double()], [weight], DECAY)
    got[wrong] = before[wrong]
    with pytest.raises(AssertionError, match="tensor 0: 1 of 150000"):
        verify.assert_averaged([got], [before.double()], [weight], DECAY)


def test_a_failed_check_names_case_and_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(model: torch.nn.Module, decay: float, dtype: torch.dtype) -> peers.Running:
        averages = peers.copies(model, dtype)
        return peers.Running(lambda: None, lambda: averages)

    monkeypatch.setattr(jobs, "PEERS", (peers.Peer("idle", idle),))
    with pytest.raises(AssertionError, match="update:tiny:f32/f32, idle: tensor 0"):
        jobs.prepare(cases.Case("tiny", "f32/f32", tiny, 1))


@pytest.mark.parametrize(
    ("question", "mix", "expected"),
    [
        ("update", "f32/f32", 12),
        ("update", "bf16/f32", 10),
        ("update", "bf16/bf16", 6),
        ("swap", "f32/f32", 2 * 16),
        ("swap", "bf16/f32", 2 * 12),
    ],
)
def test_bytes_per_element(question: str, mix: str, expected: int) -> None:
    case = cases.Case("tiny", mix, tiny, 1, question=question)  # type: ignore[arg-type]
    assert case.bytes_per_element == expected


def test_bytes_agree_with_torch() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == cases.BYTES


@pytest.mark.parametrize(
    ("inventory", "tensors", "elements"),
    [
        (models.gpt2(), 148, 124_439_808),
        (models.resnet50(), 161, 25_557_032),
        (models.resnet50_buffers(), 3 * 53, 2 * 26_560 + 53),
        (models.many_small(), 1_000, 1_346_818),
        (models.equal(), 400, 20_000_000),
        (models.flat(), 1, 100_000_000),
        (models.scalars(7), 7, 7),
    ],
)
def test_inventories(inventory: models.Inventory, tensors: int, elements: int) -> None:
    assert len(inventory) == len({name for name, _ in inventory}) == tensors
    assert models.total_elements(inventory) == elements


def test_sides_of_small_matrices() -> None:
    sides = [side for _, shape in models.many_small() for side in shape]
    assert (min(sides), max(sides)) == (8, 64)


def test_case_names_are_unique_and_selectable() -> None:
    for quick in (False, True):
        everything = cases.select(quick)
        assert len({case.name for case in everything}) == len(everything)
        assert cases.select(quick, [everything[-1].name]) == [everything[-1]]
        assert {c.question for c in cases.select(quick, ["swap"])} == {"swap"}
    with pytest.raises(ValueError, match="no case is called 'gpt3'"):
        cases.select(False, ["gpt3"])


def test_jobs_run_in_turn() -> None:
    order: list[str] = []
    durations = clock.interleave(
        {name: lambda name=name: order.append(name) for name in "ABC"}, rounds=2, settle_s=0.0
    )
    assert "".join(order) == "ABC" + 2 * "ABC"  # the first is the warm-up round
    assert {name: len(times) for name, times in durations.items()} == {"A": 2, "B": 2, "C": 2}


def test_a_spent_budget_leaves_the_fewest_rounds() -> None:
    durations = clock.interleave({"A": lambda: None}, rounds=9, budget_s=0.0, settle_s=0.001)
    assert len(durations["A"]) == clock.MIN_ROUNDS


def test_hot_jobs_run_once_more_before_they_are_timed() -> None:
    order: list[str] = []
    clock.interleave(
        {name: lambda name=name: order.append(name) for name in "AB"},
        rounds=1,
        hot=True,
        settle_s=0.0,
    )
    assert "".join(order) == "AB" + "AABB"


def test_a_failed_race_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def race(case: cases.Case, peaks: dict[str, int | None]) -> races.Outcome:
        if case.model == "bad":
            raise AssertionError("it differs")
        return races.Outcome({name: [0.25, 0.5, 4.0] for name in jobs.names(case)}, {}, peaks)

    monkeypatch.setattr(races, "race", race)
    both = [cases.Case(name, "f32/f32", tiny, 3, memory=False) for name in ("bad", "tiny")]
    rows, failed = races.run(both, quick=True)
    assert failed == ["update:bad:f32/f32"]
    assert "it differs" in capsys.readouterr().err
    assert {(row["case"], row["median_ms"]) for row in rows} == {("update:tiny:f32/f32", 500.0)}
    assert [row["peer"] for row in rows] == [
        name for name in jobs.names(both[1]) if name not in jobs.refusals(both[1])
    ]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_counts_memory_that_is_freed_again() -> None:
    peak = memory.peak_extra_bytes(lambda: bytearray(64 * 2**20))
    assert 63 * 2**20 < peak < 80 * 2**20


def test_cases_and_report_need_no_torch() -> None:
    code = "import sys, bench.cases, bench.report; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def result() -> report.Result:
    def row(case: str, peer: str, ms: float) -> report.Row:
        question, _, mix = case.split(":")
        return {
            "case": case,
            "question": question,
            "mix": mix,
            "peer": peer,
            "n_tensors": 148,
            "n_elements": 124_439_808,
            "bytes_per_element": 12,
            "rounds": 5,
            "median_ms": ms,
            "p20_ms": ms,
            "p80_ms": 1.5 * ms,
            "gbps": 50.0,
            "share_of_limit": 0.954,
            "ratio_to_fastema": ms / 30.0,
            "peak_extra_bytes": None if peer.startswith("limit") else 1_500_000,
            "host_us": None if peer.startswith("limit") else 12.5,
        }

    update, mixed = "update:gpt2-small:f32/f32", "update:gpt2-small:bf16/f32"
    return {
        "header": {
            "mode": "cpu",
            "command": "python -m bench",
            "date_utc": "2026-01-02T03:04:05+00:00",
            "commit": "0123456789ab",
            "machine": "x86_64",
            "system": "Linux",
            "cpu": "A CPU",
            "cores": 2,
            "threads": {"torch": 2, "fastema": 2},
            "versions": {"python": "3.11.7"},
        },
        "rows": [
            row(update, peers.OURS, 30.0),
            row(update, "torch_ema", 123.4),
            row(update, jobs.LIMITS[0], 28.6),
            row(mixed, peers.OURS, 30.0),
        ],
        "skipped": [
            {"case": mixed, "mix": "bf16/f32", "peer": "torch_ema", "reason": "raises: no reason"}
        ],
        "startup": [{"what": "import fastema", "cache": None, "median_ms": 1.5, "rounds": 3}],
    }


def test_stored_result_renders(result: report.Result) -> None:
    text = report.markdown(json.loads(json.dumps(result)))
    assert "### Update: gpt2-small, f32 model, f32 average" in text
    line = next(line for line in text.splitlines() if line.startswith("| torch_ema"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["torch_ema", "123", "123–185", "50.0", "95%", "4.11", "1.50", "12.5"]
    assert "- torch_ema: raises: no reason." in text
    assert "quick mode" not in text
    assert "quick mode" in report.markdown(
        {**result, "header": result["header"] | {"mode": "quick"}}
    )


def test_readme_table_is_generated_and_checked(result: report.Result, tmp_path: Path) -> None:
    stored, readme = tmp_path / "cpu.json", tmp_path / "README.md"
    stored.write_text(json.dumps(result), encoding="utf-8")
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n", encoding="utf-8")
    arguments = ["--result", str(stored), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{report.START}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "123 (4.11×)" in text
    assert "raises" in text
    assert "old" not in text


def test_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the markers"):
        report.put_between_markers("no table here", "section")
