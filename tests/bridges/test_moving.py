"""Locating the tensors of a container again, for all frameworks."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fastema.bridges.moving import Locator
from fastema.bridges.registry import leaves_of
from fastema.errors import ArgumentError

Point = namedtuple("Point", ["x", "y"])

MAKE: dict[str, Callable[[Any], Any]] = {
    "numpy": np.array,
    "torch": torch.tensor,
    "jax": jnp.asarray,
}


def array(seed: int, kind: str = "jax") -> Any:
    return MAKE[kind](np.random.default_rng(seed).normal(size=7).astype(np.float32))


def address(array: Any) -> int:
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.unsafe_buffer_pointer()


def locator(container: Any) -> Locator:
    return Locator(leaves_of(container), container)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_replaced_mutable_array_is_not_located(kind: str) -> None:
    container = {"a": array(0, kind), "b": array(1)}
    find = locator(container)
    assert find.locate({**container, "b": array(2)}) is not None
    for other in (array(2, kind), array(2), container["a"][:-1], "text", np.array(["text"])):
        assert find.locate({**container, "a": other}) is None
    assert find.locate({**container, "b": array(2, kind)}) is None
    assert find.locate(container) is not None


STRUCTURES: dict[str, Callable[..., Any]] = {
    "list": lambda a, b, c: [a, b, c],
    "tuple": lambda a, b, c: (a, (b, c)),
    "named": lambda a, b, c: {"p": Point(a, [b]), "q": c},
    "nested": lambda a, b, c: {"m": {"x": a, "y": [b, {"z": c}]}},
    "unsorted": lambda a, b, c: {"z": a, "a": {"k": b}, "m": c},
    "keys of two kinds": lambda a, b, c: {1: a, "a": b, None: [c]},
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kinds", [("jax",) * 3, ("jax", "numpy", "torch")])
def test_container_is_located_only_by_structure(structure: str, kinds: tuple[str, ...]) -> None:
    arrays = [array(i, kind) for i, kind in enumerate(kinds)]
    container = STRUCTURES[structure](*arrays)
    leaves = leaves_of(container)
    find = Locator(leaves, container)
    found = find.locate(container)
    assert found is not None
    assert leaves.structure is not None
    assert found.addresses == {leaf.name: address(leaf.spec.owner) for leaf in leaves.items}
    for other, build in STRUCTURES.items():
        assert (find.locate(build(*arrays)) is not None) == (other == structure), other
    rebuilt = leaves.structure.rebuild([leaf.spec.owner for leaf in leaves.items])
    assert leaves_of(rebuilt).names == leaves.names
    assert find.locate(rebuilt) is not None


def test_immutable_arrays_are_refused_a_second_time() -> None:
    weights = [array(1), array(2)]
    where = locator(weights)
    located = where.locate(weights)
    assert located is not None
    where.refuse_used(located, "here")
    where.record_used(located)
    with pytest.raises(ArgumentError, match=r"no new arrays.*here"):
        where.refuse_used(located, "here")
    weights[1] = array(3)
    changed = where.locate(weights)
    assert changed is not None
    where.refuse_used(changed, "here")
