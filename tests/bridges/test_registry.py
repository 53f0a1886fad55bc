from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from fastema.bridges import numpy as numpy_bridge
from fastema.bridges.registry import (
    bridge_of,
    describe,
    dtype_code,
    leaves_of,
    materialised,
    written,
)
from fastema.errors import ArgumentError, BridgeError, DTypeError, FastemaError

ONE, TWO, THREE = np.ones(2), np.ones(3, np.float32), np.array(2.5)


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (ONE, [""]),
        ([ONE, TWO], ["0", "1"]),
        ((ONE, [TWO, THREE]), ["0", "1.0", "1.1"]),
        ({"a": ONE, "b": {"c": TWO}}, ["a", "b.c"]),
        (OrderedDict(z=ONE, a=TWO), ["z", "a"]),
        (UserDict(a=ONE), ["a"]),
        (MappingProxyType({"a": [ONE]}), ["a.0"]),
        ({1: ONE, ("x", 2): TWO}, ["1", "('x', 2)"]),
        ([], []),
        ({"a": {}, "b": []}, []),
    ],
)
def test_containers_are_walked_in_order(container: Any, names: list[str]) -> None:
    assert leaves_of(container).names == names


def test_leaves_describe_their_arrays() -> None:
    leaves = leaves_of({"a": ONE, "b": [TWO]})
    assert [leaf.spec for leaf in leaves.items] == [describe(ONE), describe(TWO)]
    assert all(
        leaf.spec.owner is array for leaf, array in zip(leaves.items, (ONE, TWO), strict=True)
    )
    assert {leaf.role for leaf in leaves.items} == {"weight"}


def test_entries_of_one_name_are_refused() -> None:
    with pytest.raises(BridgeError, match=r"'1'"):
        leaves_of({1: ONE, "1": TWO})
    with pytest.raises(BridgeError, match=r"'a\.b'"):
        leaves_of({"a": {"b": ONE}, "a.b": TWO})


@pytest.mark.parametrize("wrong", [3.5, "text", None, object(), {1.0}, np.float32(1)])
def test_what_belongs_to_no_framework(wrong: Any) -> None:
    with pytest.raises(BridgeError, match=type(wrong).__name__):
        bridge_of(wrong)


UNUSABLE: dict[str, tuple[Callable[[], Any], type[FastemaError]]] = {
    "number": (lambda: 3, BridgeError),
    "none": (lambda: None, BridgeError),
    "text": (lambda: np.array(["a"]), DTypeError),
    "foreign byte order": (lambda: np.ones(3, ">f4"), DTypeError),
    "record": (lambda: np.ones(5, [("a", "f4"), ("b", "u1")])["a"], BridgeError),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda array: {"good": ONE, "inner": {"bad": array}}, r"inner\.bad"),
        (lambda array: [ONE, (TWO, array)], r"1\.1"),
    ],
    ids=["dict", "list"],
)
def test_what_cannot_be_used_is_named(case: str, wrap: Callable[[Any], Any], name: str) -> None:
    make, error = UNUSABLE[case]
    with pytest.raises(error, match=name):
        leaves_of(wrap(make()))


def test_dtypes_of_any_framework() -> None:
    assert dtype_code(np.float16) == "f16"
    assert dtype_code(np.dtype("c16")) == "c128"
    for wrong in (3, "no such dtype", object(), np.dtype("O")):
        with pytest.raises(ArgumentError, match="dtype="):
            dtype_code(wrong)


def test_iterators_are_kept_as_lists() -> None:
    kept = materialised(iter([ONE, TWO]))
    assert isinstance(kept, list)
    assert all(one is other for one, other in zip(kept, (ONE, TWO), strict=True))
    assert materialised(kept) is kept


def test_arrays_by_the_function_to_call_after_a_write() -> None:
    ((tell, arrays),) = written([ONE, TWO])
    assert tell is numpy_bridge.written
    assert all(one is other for one, other in zip(arrays, (ONE, TWO), strict=True))
    tell(arrays)


def test_no_framework_is_imported_for_another_ones_arrays(python: Callable[..., str]) -> None:
    script = """
        import sys
        from fastema.bridges.registry import leaves_of
        from fastema.errors import BridgeError
        try:
            leaves_of([1])
        except BridgeError:
            pass
        import numpy
        leaves_of([numpy.ones(3)])
        assert "torch" not in sys.modules
    """
    python(script)


@pytest.mark.torch
def test_frameworks_may_be_mixed() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.ones(3)
    leaves = leaves_of({"n": ONE, "t": tensor})
    assert [leaf.spec.address for leaf in leaves.items] == [ONE.ctypes.data, tensor.data_ptr()]
    assert leaves.items[0].spec.exchange == 0
    assert leaves.items[1].spec.exchange == describe(torch.nn.Parameter(tensor)).exchange
