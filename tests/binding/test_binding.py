"""A binding finds both sides wherever they lie, and a call that fails leaves it as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastema.binding.binding import Binding, Match
from fastema.errors import LayoutError
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair
from fastema.layout.spec import Leaves

LERP = {"all": "lerp"}


def by_name(average: Leaves, model: Leaves) -> Match:
    found = {leaf.name: leaf.spec for leaf in model.items}
    pairs = [Pair(leaf.name, leaf.spec, found[leaf.name]) for leaf in average.items]
    return Match({"all": pairs}, average, model)


def run(binding: Binding, model: Any = None) -> None:
    with binding.current(model) as program:
        program.run(LERP, LaunchArgs((0.5,)))


@pytest.fixture
def sides(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    return tuple({name: rng.standard_normal(7) for name in "ab"} for _ in range(2))  # type: ignore[return-value]


def replaced(x: dict[str, Any], rng: np.random.Generator) -> None:
    x["b"] = rng.standard_normal(7)


def resized(x: dict[str, Any], rng: np.random.Generator) -> None:
    x["a"].resize(7, refcheck=False)
    x["a"] = np.concatenate([x["a"], rng.standard_normal(64)])[:7].copy()


def test_a_block_that_raises_leaves_the_binding_with_the_model_before(
    sides: tuple[dict[str, Any], dict[str, Any]], rng: np.random.Generator
) -> None:
    avg, x = sides
    binding = Binding(avg, x, by_name)
    other = {name: rng.standard_normal(7) for name in x}
    with pytest.raises(ZeroDivisionError), binding.current(other):
        raise ZeroDivisionError
    assert binding.container is x
    run(binding, other)
    assert binding.container is other


def test_a_model_that_does_not_match_changes_nothing(
    sides: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    avg, x = sides
    binding = Binding(avg, x, by_name)
    raw = {name: one.copy() for name, one in avg.items()}
    with pytest.raises(KeyError):
        run(binding, {"a": x["a"]})
    for name, one in raw.items():
        np.testing.assert_array_equal(avg[name], one)
    run(binding)


def test_what_is_made_for_the_pairs_is_made_again_when_they_are_others(
    sides: tuple[dict[str, Any], dict[str, Any]], rng: np.random.Generator
) -> None:
    avg, x = sides
    binding, cached = Binding(avg, x, by_name), []
    for _ in range(3):
        with binding.current():
            binding.cached("one", lambda: cached.append(1))
    assert len(cached) == 1
    replaced(x, rng)
    with binding.current():
        binding.cached("one", lambda: cached.append(1))
    assert len(cached) == 2


def test_written_memory_that_overlaps_is_refused() -> None:
    memory = np.arange(12.0)
    with pytest.raises(LayoutError, match=r"average of a .* overlap"):
        Binding({"a": memory[:8]}, {"a": memory[4:]}, by_name)


def test_arrays_that_move_are_found_at_every_call_and_not_kept() -> None:
    jnp = pytest.importorskip("jax.numpy")
    avg = {"a": np.zeros(5)}
    binding = Binding(avg, {"a": jnp.ones(5)}, by_name)
    run(binding)
    run(binding, {"a": jnp.full(5, 3.0)})
    np.testing.assert_allclose(avg["a"], 0.5 * 0.5 + 1.5)
    assert all(pair.src.owner is None for pair in binding.pairs)
    assert binding.addresses == {}
