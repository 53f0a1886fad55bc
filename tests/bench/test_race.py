"""The benchmarks: correct results and byte counts, baselines, and rendered pages."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench.questions import counts, cpu
from bench.race import baseline, cases, checks, contest, jobs, machines, peers, report, shapes
from bench.race.flat_module import DTYPES, build, randomise_
from bench.race.question import Question, Settings
from bench.race.report import Row

pytestmark = pytest.mark.torch

DECAY = 0.9


def tiny() -> shapes.Inventory:
    # The last exceeds the 32,768 elements at which torch starts threads.
    odd = [("one", (1,)), ("odd", (3, 5, 7)), ("big", (70_001,))]
    return [*shapes.gpt2(layers=1, width=16, vocab=50, context=8), *odd]


def pair_with_mixes(table: tuple[peers.Peer, ...]) -> list[object]:
    return [
        pytest.param(peer, mix, id=f"{peer.name}-{mix}") for peer in table for mix in cases.MIXES
    ]


def skip_unless_running(peer: peers.Peer, mix: str) -> None:
    refusal = peer.refusals.get(mix)
    if reason := peer.missing() or (refusal and not refusal.error and refusal.reason):
        pytest.skip(reason)


@pytest.mark.parametrize(("peer", "mix"), pair_with_mixes(peers.PEERS))
def test_peer_averages_correctly_or_raises_as_recorded(peer: peers.Peer, mix: str) -> None:
    skip_unless_running(peer, mix)
    weights, average = mix.split("/")
    model = build(tiny(), weights)

    def three_updates() -> None:
        running = peer.setup(model, DECAY, DTYPES[average])
        before = [checks.sample(p) for p in model.parameters()]
        for seed in (1, 2, 3):
            randomise_(model, seed)
            running.update()
            assert all(a.dtype == DTYPES[average] for a in running.average())
            how = {"rounds_weights": peer.rounds_weights, "stochastic": peer.stochastic}
            new = list(model.parameters())
            checks.assert_averaged(running.average(), before, new, DECAY, **how)
            before = [checks.sample(a) for a in running.average()]

    refused = peer.refusals.get(mix)
    with pytest.raises(RuntimeError, match=refused.error) if refused else nullcontext():
        three_updates()


@pytest.mark.parametrize(("peer", "mix"), pair_with_mixes(peers.SWAPS))
def test_swap_peer_restores_the_weights(peer: peers.Peer, mix: str) -> None:
    skip_unless_running(peer, mix)
    jobs.prepare(cases.Case("tiny", mix, tiny, 1, question="swap"), only=peer.name)


@pytest.mark.parametrize("wrong", [0, 149_999, 75_000])
def test_one_wrong_element_or_a_stalled_average_is_caught(wrong: int) -> None:
    before, weight = torch.randn(150_000), torch.randn(150_000)
    got = torch.lerp(before, weight, 1 - DECAY)
    checks.assert_averaged([got], [before.double()], [weight], DECAY)
    got[wrong] = before[wrong]
    with pytest.raises(AssertionError, match="tensor 0: 1 of 150000"):
        checks.assert_averaged([got], [before.double()], [weight], DECAY)
    one = torch.ones(1000, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="1000 of 1000 elements differ"):
        checks.assert_averaged([one], [one.double()], [2 * one], DECAY, stochastic=True)


def test_share_of_limit_uses_the_bytes_of_each_entry(monkeypatch: Any) -> None:
    seconds = {"A": 2.0, "B": 8.0, contest.LIMITS[0]: 1.0, contest.LIMITS[1]: 4.0}
    timed = {name: [one] * 3 for name, one in seconds.items()}
    monkeypatch.setattr(contest, "interleave", lambda jobs, *_, **__: {n: timed[n] for n in jobs})
    idle = dict.fromkeys("AB", lambda: None)
    rows = contest.contest("t", idle, rounds=3, n_elements=100, bytes_per_element={"A": 4, "B": 8})
    found = {row.entry: row for row in rows}
    assert [found[n]["share_of_limit"] for n in seconds] == [0.5, 0.25, 1.0, 0.25]
    assert [found[n]["gbps"] * 1e9 for n in seconds] == [200, 100, 400, 100]
    assert [found[n]["ratio"] for n in seconds] == [1, 4, 0.5, 2]
    assert found["B"]["ms"] == 8_000


def test_race_measures_every_figure() -> None:
    case = cases.Case("tiny", "bf16/f32", tiny, 3, budget_s=0.0)
    ours, *_, one, other = cpu.race(case, {peers.OURS: 1_500_000})
    assert (ours.entry, one.entry, other.entry) == (peers.OURS, *contest.LIMITS)
    assert (ours["peak_extra_mb"], ours["bytes_per_element"], ours["ratio"]) == (1.5, 10, 1)
    assert all(ours[name] > 0 for name in ("ms", "gbps", "share_of_limit", "host_us"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.tensorflow] * name.startswith("tensorflow"))
        for name in command.QUESTIONS
        if (report.RESULTS / f"{name}.json").exists()
    ],
)
def test_stored_pages_match_the_stored_rows(name: str) -> None:
    try:
        question = command.load(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    header, rows = report.load(report.RESULTS / f"{name}.json")
    text = command.render_page(question, header, rows)
    assert text == (report.RESULTS / f"{name}.md").read_text(encoding="utf-8")


def test_failed_run_is_not_stored_but_one_below_the_baseline_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(quick=True, out=tmp_path)

    def answered(name: str, rows: list[Row], **options: Any) -> bool:
        question = Question("Title", "How.", lambda settings: rows)
        return command.answer_question(
            name, question, replace(settings, **options), "python -m bench"
        )

    for failed in (True, False):
        assert answered("cpu", [Row("t", "one", missing="differs", failed=failed)]) is not failed
        assert (tmp_path / "cpu-quick.json").exists() is not failed
    assert not answered("counts", [], baseline="check")
    assert (tmp_path / "counts-quick.json").exists()
    assert "is not measured any more" in capsys.readouterr().err
    assert answered("counts", [], baseline="check", cases=("one",))


def test_pages_built_from_stored_results_are_up_to_date() -> None:
    stored = (report.RESULTS / machines.PAGE).read_text(encoding="utf-8")
    assert stored == machines.render_page()
    assert command.main(["--readme", "check"]) == 0


INVENTORIES = {
    "gpt2": (shapes.gpt2(), 148, 124_439_808),
    "resnet50": (shapes.resnet50(), 161, 25_557_032),
    "buffers": (shapes.resnet50_buffers(), 3 * 53, 2 * 26_560 + 53),
    "many small": (shapes.many_small(), 1_000, 1_346_818),
    "equal": (shapes.equal(), 400, 20_000_000),
    "flat": (shapes.flat(), 1, 100_000_000),
    "llama": (shapes.llama(), 291, 6_738_415_616),
    "vit": (shapes.vit(), 152, 86_567_656),
    "two": (shapes.vit_with_resnet50(), 152 + 161, 86_567_656 + 25_557_032),
}


def test_inventories_have_their_models_tensors_and_elements() -> None:
    for inventory, tensors, elements in INVENTORIES.values():
        assert len(inventory) == len({name for name, _ in inventory}) == tensors
        assert shapes.total_elements(inventory) == elements


FIGURES = {"operations": 0, "python_kb": 4, "ratio": 1.0, "ms": 3.0}
UPDATE = "An update"
OURS = Row(UPDATE, "fastema.EMA", FIGURES)
GONE = Row(UPDATE, "a peer", missing="is not installed")
ROWS = [OURS, Row(UPDATE, "a peer", {"ratio": 4.0}), Row(UPDATE, "another", missing="is missing")]
SLOWER = Row(UPDATE, "a peer", {"ratio": 2.0})


def replace_ours(**figures: object) -> list[Row]:
    return [Row(UPDATE, "fastema.EMA", {**FIGURES, **figures}), *ROWS[1:]]


@pytest.mark.parametrize(
    ("rows", "good", "said"),
    [
        (replace_ours(python_kb=8, ms=30.0), True, ""),
        (replace_ours(operations=1), False, "An update | fastema.EMA: operations is 1, was 0"),
        (ROWS[1:], False, "An update | fastema.EMA: is not measured any more"),
        ([*ROWS, Row("New", "x", {"ratio": 1.0})], False, "New | x: is new"),
        ([OURS, GONE], True, ""),
        ([OURS, SLOWER, ROWS[2]], True, "a peer: 2.00 times fastema's time, was 4.00"),
    ],
)
def test_baseline_fails_on_counts_and_rows_and_warns_on_ratios(
    rows: list[Row], good: bool, said: str, tmp_path: Path, capsys: Any
) -> None:
    baseline.write("cpu", ROWS, tmp_path)
    assert baseline.check("unknown", rows, tmp_path)
    assert baseline.check("cpu", rows, tmp_path) is good
    err = capsys.readouterr().err
    assert said in err
    assert bool(said) == bool(err)
    baseline.write("cpu", [OURS, GONE], tmp_path)
    assert baseline.read(tmp_path)["cpu"]["An update | a peer"] == {"ratio": 4.0}


def test_update_runs_no_torch_operations() -> None:
    found = {
        (row.table, row.entry): row for row in (*counts._count_modules(), *counts._count_calls())
    }
    for (table, entry), row in found.items():
        if "update" in table:
            assert (row["operations"], row["python_kb"]) == (0, 4), entry
    imported = found["Modules of fastema that are imported", "import fastema"]
    assert (imported["modules"], imported["heavy"]) == (2, "none")
    bits = found["100 tensors: an update", "bfloat16, average float32"]["bytes_per_element"]
    assert bits == 10
