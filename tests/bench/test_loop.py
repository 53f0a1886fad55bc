"""The training loop of the benchmarks: verified contestants, rows, least speeds, and picture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from bench.loop import cases, picture
from bench.loop import race as racing
from bench.loop.cases import Case
from bench.loop.race import CONTESTANTS, FOREACH, TrainingLoop, absences, contestants, race
from bench.loop.replay import Replay
from bench.questions import loop
from bench.race import baseline
from bench.race.cases import MIXES
from bench.race.peers import OURS, Peer, PeerCalls, copy_parameters
from bench.race.question import Settings
from bench.race.report import Row

pytestmark = pytest.mark.torch


def tiny(mix: str, threads: int = 1) -> Case:
    return Case(width=8, depth=2, mix=mix, threads=threads, rounds=3, budget_s=0.0)


@pytest.mark.parametrize("mix", MIXES)
def test_race_times_every_contestant_and_restores_threads(mix: str) -> None:
    before = torch.get_num_threads()
    timings = race(tiny(mix, before + 1))
    assert torch.get_num_threads() == before
    assert list(timings) == list(contestants(mix))
    assert {OURS, FOREACH} <= timings.keys()
    assert timings.keys() | absences(mix).keys() == CONTESTANTS.keys()
    for one in timings.values():
        assert (len(one.loop), len(one.hot)) == (3, racing.HOT_ROUNDS)
        assert min(one.loop + one.hot) > 0


def test_update_with_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stalled(model: Any, decay: float, dtype: torch.dtype) -> PeerCalls:
        averages = copy_parameters(model, dtype)
        return PeerCalls(lambda: None, lambda: averages)

    monkeypatch.setattr(racing, "contestants", lambda mix: {"stalled": Peer("stalled", stalled)})
    with pytest.raises(AssertionError, match=r"f32/f32:1-thread:0\.00 M, stalled: tensor 0"):
        race(tiny("f32/f32"))


def test_training_step_changes_weights_and_leaves_no_gradients() -> None:
    training = TrainingLoop(tiny("f32/f32"))
    before = copy_parameters(training.model, torch.float32)
    training.step()
    after = list(training.model.parameters())
    assert not any(map(torch.equal, before, after))
    assert all(parameter.grad is None for parameter in after)


def test_cases_have_the_sizes_of_their_networks_and_are_selected_by_parts_of_names() -> None:
    case = tiny("f32/f32")
    parameters = list(TrainingLoop(case).model.parameters())
    assert (case.n_tensors, case.n_elements) == (
        len(parameters),
        sum(parameter.numel() for parameter in parameters),
    )
    names = [case.name for case in cases.FULL]
    assert len(set(names)) == len(names) == 42
    assert {case.name for case in cases.QUICK} < set(names)
    assert [case.name for case in cases.select(True, ["1.07 M"])] == [
        "f32/f32:1-thread:1.07 M",
        "f32/f32:2-threads:1.07 M",
        "bf16/bf16:1-thread:1.07 M",
        "bf16/bf16:2-threads:1.07 M",
    ]
    assert cases.select(True, names[:1]) == cases.QUICK[:1]


def test_replayed_timer_reads_pairs_that_lie_the_durations_apart() -> None:
    replay = Replay()
    replay.load([0.25, 3e-7])
    readings = [replay.read() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.25, 3e-7]


def measured(size: str, n_elements: int, contestant: str, loop_us: float, hot_us: float) -> Any:
    info = {"table": "f32 model, f32 average, 1 thread", "size": size, "n_elements": n_elements}
    info |= {"n_tensors": 6, "contestant": contestant, "hot_us": hot_us}
    stats = {"median": loop_us / 1e6, "data": [loop_us / 1e6] * 3}
    return {"group": size, "extra_info": info, "stats": stats}


BENCHMARKS = [
    measured("0.08 M", 80_000, OURS, 50.0, 10.0),
    measured("0.08 M", 80_000, FOREACH, 20.0, 20.0),
    measured("3.00 M", 3_000_000, OURS, 500.0, 100.0),
    measured("3.00 M", 3_000_000, FOREACH, 200.0, 200.0),
]


def test_rows_have_shares_of_foreach_in_the_loop_and_hot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = loop.make_rows(BENCHMARKS)
    assert [(row.entry, row.column, row["us"], row["speed"]) for row in rows] == [
        ("0.08 M", OURS, pytest.approx(50), pytest.approx(0.4)),
        ("0.08 M", FOREACH, pytest.approx(20), 1.0),
        ("3.00 M", OURS, pytest.approx(500), pytest.approx(0.4)),
        ("3.00 M", FOREACH, pytest.approx(200), 1.0),
        ("0.08 M", f"hot: {OURS}", 10.0, 2.0),
        ("0.08 M", f"hot: {FOREACH}", 20.0, 1.0),
        ("3.00 M", f"hot: {OURS}", 100.0, 2.0),
        ("3.00 M", f"hot: {FOREACH}", 200.0, 1.0),
    ]
    # Only large models in the loop have a least speed.
    assert not baseline.check("loop", rows, tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "3.00 M | fastema.EMA: 0.40 of the peer's speed, 0.5 is the least" in line
    assert baseline.check("loop", loop.make_rows(BENCHMARKS[:2]), tmp_path)


def test_picture_is_drawn_on_a_transparent_ground(tmp_path: Path) -> None:
    header = {"command": "python -m bench loop", "date_utc": "2026-01-01T00", "cpu": "a CPU"}
    absent = Row("bf16 model, f32 average, 1 thread", "AveragedModel", missing="raises")
    picture.draw([*loop.make_rows(BENCHMARKS), absent], header, tmp_path / "loop.png")
    alpha = imread(tmp_path / "loop.png")[..., 3]
    assert 0.5 < (alpha == 0).mean() < 1.0


def test_one_case_runs_in_pytest_and_yields_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # disables pytest-benchmark
    rows = list(loop.rows(Settings(quick=True, cases=("f32/f32:1-thread:0.08 M",))))
    assert {row.column for row in rows if not row.missing} >= {OURS, FOREACH}
    assert not any(row.failed for row in rows)
    assert all(row["us"] > 0 for row in rows if not row.missing)


def test_failed_case_is_a_failed_row() -> None:
    rows = list(loop.rows(Settings(cases=("no such case",))))
    assert [(row.missing != "", row.failed) for row in rows] == [(True, True)]
