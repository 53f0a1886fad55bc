"""Averages of models that are sharded over ranks, on gloo."""

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
def test_sharded_updates_equal_one_process(run: Run, layout: str, kind: str) -> None:
    run(cases.check_updates, layout, kind)


@pytest.mark.each_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", cases.MAKE)
def test_swap_changes_the_forward_pass_and_is_undone(run: Run, layout: str, kind: str) -> None:
    run(cases.check_swap, layout, kind)


@pytest.mark.parametrize(
    ("layout", "where", "offload"),
    [
        ("fsdp 4", "down", False),
        ("fsdp 4", "lone", True),
        ("unsharded after", "lone", False),
        ("hsdp", "up", True),
        ("fsdp on tp", "lone", False),
        ("tp 4", "down", False),
    ],
)
def test_forward_pass_that_raises_leaves_its_error_and_the_raw_weights(
    run: Run, layout: str, where: str, offload: bool
) -> None:
    run(cases.check_raise_in_forward, layout, where, offload)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_of_a_training_run_equal_one_process(run: Run, layout: str) -> None:
    run(cases.check_training, layout)


def test_update_of_gathered_parameters_is_refused(run: Run) -> None:
    run(cases.check_gathered)


def test_classes_of_parameter_lists_refuse_shards(run: Run) -> None:
    for messages in run(cases.catch_list_refusals):
        assert all("fastema.EMA(model)" in message for message in messages)


def test_differing_ranks_are_named_on_every_rank(run: Run) -> None:
    for messages in run(cases.catch_differing_ranks):
        options, nonfinite, policy, steps, pair = messages
        assert "rank 2: on_nonfinite is skip, expected propagate as on rank 0" in nonfinite
        assert "rank 2: schedule is" in options
        assert "0.99" in options
        assert "rank 1: 'lone.weight' is missing, expected averaged" in policy
        assert "rank 3: num_updates is 3, expected 2 as on rank 0" in steps
        assert not pair or "rank 3: seed is 1, expected 0 as on rank 1" in pair


@pytest.mark.parametrize("layout", ["fsdp 4", "fsdp 3", "fsdp on tp", "hsdp", "tp 4"])
def test_nan_on_one_rank_skips_the_update_on_all(run: Run, layout: str) -> None:
    messages = [one[0] for one in run(cases.check_nonfinite, layout) if one]
    assert any("'down.weight' holds a NaN" in one for one in messages)
    if layout.startswith("fsdp"):
        assert any("another rank" in one for one in messages)


def test_meshes_of_several_sizes_in_a_list_of_stages(run: Run) -> None:
    run(cases.check_experts)


def test_unsupported_tensors_and_calls_are_refused(run: Run, tmp_path: Path) -> None:
    for pending, blocks, drift, other, snapshot in run(cases.catch_refusals, str(tmp_path)):
        assert "fastema.distributed.consolidate" in snapshot
        assert "still pending" in pending
        assert "several blocks" in blocks
        assert "drift()" in drift
        assert "'scale' is S(0) over (4,), its average whole on this rank" in other


@pytest.mark.parametrize("layout", ["fsdp 2", "fsdp on tp"])
def test_given_averages_equal_owned_ones(run: Run, layout: str) -> None:
    run(cases.check_given, layout)


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused", "local"])
def test_writes_to_swapped_weights_are_detected(run: Run, kind: str) -> None:
    run(cases.check_writes, kind)


def test_offloaded_shards_stay_on_the_cpu(run: Run) -> None:
    run(cases.check_cpu_offload)


def test_data_parallel_averages_are_equal_on_all_ranks(run: Run) -> None:
    run(cases.check_data_parallel)


@pytest.mark.slow
def test_dead_rank_is_an_error_within_the_timeout() -> None:
    ranks = Ranks(2, timeout=timedelta(seconds=5))
    try:
        results, errors = ranks.try_run(cases.lose_rank, seconds=60.0)
    finally:
        ranks.close()
    assert errors == ["rank 1: the process died"]
    state, built, updates = results[0]
    assert updates == "1"  # an update needs no other rank
    for one in (state, built):
        assert float(one.partition(" ")[0]) < 20


def test_step_skipped_by_one_rank_is_skipped_by_all(run: Run) -> None:
    assert run(cases.count_followed_updates) == [[4, 4]] * 4


@pytest.mark.each_value
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", cases.OFFLOADED)
def test_offloaded_average_equals_device_average(run: Run, layout: str, kind: str) -> None:
    run(cases.check_offload, layout, kind)


def test_update_skipped_by_a_busy_rank_is_skipped_by_all(run: Run) -> None:
    assert run(cases.count_skipped_updates) == [[(6, 2), (6, 2)]] * 4
