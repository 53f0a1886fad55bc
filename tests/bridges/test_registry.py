from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.bridges.registry import (
    bridge_of,
    describe,
    leaves_of,
    write_listeners,
)
from fastema.errors import BridgeError, DTypeError, FastemaError

ONE, TWO, THREE = np.ones(2), np.ones(3, np.float32), np.array(2.5)


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (ONE, ["array"]),
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


@pytest.mark.torch
def test_tensors_are_grouped_by_the_function_to_call_after_a_write() -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.ones(2), torch.ones(3)]
    # NumPy keeps no record of writes.
    ((notify, found),) = write_listeners([tensors[0], ONE, tensors[1]])
    assert all(one is other for one, other in zip(found, tensors, strict=True))
    notify(found)
    assert [one._version for one in tensors] == [1, 1]


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


def itself(kind: str) -> Any:
    a: dict[str, Any] = {"w": ONE}
    if kind == "dict":
        a["a"] = a
    elif kind == "list":
        a["b"] = [TWO, a]
    elif kind == "tuple":
        a["b"] = (a,)
    else:
        a["b"] = {"c": MappingProxyType(a)}
    return a


@pytest.mark.parametrize(
    ("kind", "place"), [("dict", "a"), ("list", "b.1"), ("tuple", "b.0"), ("mapping", "b.c.b")]
)
@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_a_container_that_holds_itself_is_refused_naming_where(
    kind: str, place: str, framework: str
) -> None:
    pytest.importorskip(framework)
    with pytest.raises(BridgeError, match=rf"'{place}' is a \w+ that holds itself"):
        leaves_of(itself(kind))
    assert leaves_of({"a": ONE, "b": [ONE, TWO]}).names == ["a", "b.0", "b.1"]  # all is well after


@pytest.mark.parametrize("framework", ["numpy", "jax"])
@pytest.mark.parametrize("around", [lambda one: [one], lambda one: {"a": one}, lambda one: (one,)])
def test_what_is_nested_too_deeply_is_refused(around: Callable[[Any], Any], framework: str) -> None:
    pytest.importorskip(framework)
    tree: Any = ONE
    for _ in range(200):
        tree = around(tree)
    assert len(leaves_of(tree).names) == 1
    for more in (1, 5000):
        for _ in range(more):
            tree = around(tree)
        with pytest.raises(BridgeError, match="nested more than 200 deep"):
            leaves_of(tree)


@pytest.mark.parametrize(
    "pairs",
    [
        lambda model: model.named_parameters(),
        lambda model: list(model.named_parameters()),
        lambda model: model.state_dict().items(),
        lambda model: {"inner": model.state_dict().items()},
    ],
)
@pytest.mark.torch
def test_pairs_of_names_and_tensors_are_told_of_a_dict(pairs: Callable[[Any], Any]) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(BridgeError, match=r"named_parameters\(\), go into dict\(\.\.\.\)"):
        fastema.EMA(pairs(model))
    assert set(fastema.EMA(dict(model.named_parameters())).shadow) == {"weight", "bias"}


class Holder:
    def values(self) -> list[Any]:
        return [ONE]


@pytest.mark.parametrize(
    ("meant", "text"),
    [(iter([ONE]), r"list\(\.\.\.\)"), (Holder().values, "call it first")],
    ids=["iterator", "method"],
)
def test_what_only_lacks_a_call_is_told_so(meant: Any, text: str) -> None:
    with pytest.raises(BridgeError, match=text):
        bridge_of(meant)
