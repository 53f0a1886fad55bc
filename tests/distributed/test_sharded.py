"""Averages of models that are divided among ranks, on gloo."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from . import cases
from .layouts import LAYOUTS
from .ranks import Ranks

NEEDS = ("torch",)


Run = Callable[..., list[Any]]


@pytest.mark.each_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", cases.MAKE)
def test_an_update_gives_the_bits_of_one_process(run: Run, layout: str, kind: str) -> None:
    run(cases.bits, layout, kind)


@pytest.mark.each_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", cases.MAKE)
def test_a_swap_reaches_the_forward_pass_and_comes_back(run: Run, layout: str, kind: str) -> None:
    run(cases.swap, layout, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_of_a_run_are_those_of_one_process(run: Run, layout: str) -> None:
    run(cases.training, layout)


def test_an_update_of_gathered_parameters_is_refused(run: Run) -> None:
    run(cases.gathered)


def test_ranks_that_differ_are_named_on_every_rank(run: Run) -> None:
    for messages in run(cases.differing):
        options, nonfinite, policy, steps, pair = messages
        assert "rank 2: on_nonfinite is skip, expected propagate as on rank 0" in nonfinite
        assert "rank 2: schedule is" in options
        assert "0.99" in options
        assert "rank 1: 'lone.weight' is missing, expected averaged" in policy
        assert "rank 3: num_updates is 3, expected 2 as on rank 0" in steps
        assert not pair or "rank 3: seed is 1, expected 0 as on rank 1" in pair


@pytest.mark.parametrize("layout", ["fsdp 4", "fsdp 3", "fsdp on tp", "hsdp", "tp 4"])
def test_a_nan_on_one_rank_counts_on_all(run: Run, layout: str) -> None:
    messages = [one[0] for one in run(cases.not_finite, layout) if one]
    assert any("'down.weight' holds a NaN" in one for one in messages)
    if layout.startswith("fsdp"):
        assert any("another rank" in one for one in messages)


def test_meshes_of_several_sizes_and_stages_in_a_list(run: Run) -> None:
    run(cases.experts)


def test_what_cannot_be_averaged_is_refused(run: Run, tmp_path: Path) -> None:
    for pending, blocks, drift, other, snapshot in run(cases.refused, str(tmp_path)):
        assert "fastema.distributed.consolidate" in snapshot
        assert "still pending" in pending
        assert "several blocks" in blocks
        assert "drift=True" in drift
        assert "'scale' is S(0) over (4,), its average whole on this rank" in other


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused", "local"])
def test_writes_in_a_block_are_noticed(run: Run, kind: str) -> None:
    run(cases.steps_in_a_block, kind)


def test_offloaded_parts_stay_where_they_are(run: Run) -> None:
    run(cases.offloaded)


def test_data_parallel_averages_are_the_same_everywhere(run: Run) -> None:
    run(cases.data_parallel)


@pytest.mark.slow
def test_a_rank_that_is_gone_is_an_error_within_the_timeout() -> None:
    ranks = Ranks(2, timeout=timedelta(seconds=5))
    try:
        results, errors = ranks.tried(cases.without_one, seconds=60.0)
    finally:
        ranks.close()
    assert errors == ["rank 1: the process died"]
    state, built, updates = results[0]
    assert updates == "1"  # an update asks nobody
    for one in (state, built):
        assert float(one.partition(" ")[0]) < 20


def test_a_step_that_one_rank_leaves_out_all_do(run: Run) -> None:
    assert run(cases.followed_together) == [[4, 4]] * 4


@pytest.mark.each_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", cases.OFFLOADED)
def test_an_average_on_the_host_gives_the_same_bits(run: Run, layout: str, kind: str) -> None:
    run(cases.on_host, layout, kind)


def test_an_update_that_one_rank_has_no_time_for_all_leave_out(run: Run) -> None:
    assert run(cases.skipped_together) == [[(6, 2), (6, 2)]] * 4
