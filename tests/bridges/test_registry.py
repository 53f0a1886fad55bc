"""Containers of arrays of any framework, and what is refused in them."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import fastema
from fastema.bridges.names import plain_names
from fastema.bridges.registry import bridge_of, describe, leaves_of, write_listeners
from fastema.errors import BridgeError, DTypeError

ONE, TWO, THREE = np.ones(2), np.ones(3, np.float32), np.array(2.5)


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (ONE, ["array"]),
        ((ONE, [TWO, THREE]), ["0", "1.0", "1.1"]),
        ({"a": ONE, "b": {"c": TWO}}, ["a", "b.c"]),
        (OrderedDict(z=ONE, a=TWO), ["z", "a"]),
        (UserDict(a=ONE), ["a"]),
        (MappingProxyType({"a": [ONE]}), ["a.0"]),
        ({1: ONE, ("x", 2): TWO}, ["1", "('x', 2)"]),
        ({"a": {}, "b": []}, []),
    ],
)
def test_containers_are_walked_in_order(container: Any, names: list[str]) -> None:
    assert leaves_of(container).names == names


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["_orig_mod.fc.weight", "_orig_mod.b"], ["fc.weight", "b"]),
        (["module.module.a", "module.module.b"], ["a", "b"]),
        (["_orig_mod.module.a.b"], ["a.b"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["layers._fsdp_wrapped_module.w"], ["layers.w"]),
        (["layers._checkpoint_wrapped_module.0._orig_mod.w"], ["layers.0.w"]),
        # A real submodule of that name, beside others; the parameter itself is called so.
        (["module.a", "head"], ["module.a", "head"]),
        (["module", "module"], ["module", "module"]),
        (["module.module", "module.a"], ["module", "a"]),
        # Two wrapped ones that would become equal.
        (["a._orig_mod.w", "a.w"], ["a._orig_mod.w", "a.w"]),
    ],
)
def test_wrappers_do_not_show_in_names(names: list[str], plain: list[str]) -> None:
    assert plain_names(names) == plain


@pytest.mark.parametrize(
    ("array", "error"),
    [
        *((3, BridgeError), (None, BridgeError), (np.array(["a"]), DTypeError)),
        (np.ones(5, [("a", "f4"), ("b", "u1")])["a"], BridgeError),
    ],
    ids=["number", "none", "text", "record"],
)
def test_what_cannot_be_used_is_named(array: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"inner\.bad\.1"):
        leaves_of({"good": ONE, "inner": {"bad": (TWO, array)}})


def test_no_framework_is_imported_for_another_ones_arrays(python: Callable[..., str]) -> None:
    python(
        """
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
    )


@pytest.mark.torch
def test_frameworks_may_be_mixed_and_each_is_told_of_writes() -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.ones(2), torch.ones(3)]
    leaves = leaves_of({"n": ONE, "t": tensors[0]})
    assert [leaf.spec.address for leaf in leaves.items] == [ONE.ctypes.data, tensors[0].data_ptr()]
    assert leaves.items[0].spec.exchange == 0
    assert leaves.items[1].spec.exchange == describe(torch.nn.Parameter(tensors[0])).exchange
    # NumPy keeps no record of writes.
    ((notify, found),) = write_listeners([tensors[0], ONE, tensors[1]])
    assert list(map(id, found)) == list(map(id, tensors))
    notify(found)
    assert [one._version for one in tensors] == [1, 1]


@pytest.mark.parametrize("framework", ["numpy", "jax"])
@pytest.mark.parametrize(
    ("holding", "place"),
    [
        (lambda a: a, "b"),
        (lambda a: [TWO, a], "b.1"),
        (lambda a: (a,), "b.0"),
        (lambda a: {"c": MappingProxyType(a)}, "b.c.b"),
    ],
)
def test_a_container_that_holds_itself_is_refused_naming_where(
    holding: Callable[[Any], Any], place: str, framework: str
) -> None:
    pytest.importorskip(framework)
    a: dict[str, Any] = {"w": ONE}
    a["b"] = holding(a)
    with pytest.raises(BridgeError, match=rf"'{place}' is a \w+ that holds itself"):
        leaves_of(a)
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


@pytest.mark.torch
def test_what_only_lacks_a_call_is_told_so() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    for pairs in (model.named_parameters(), list(model.named_parameters()),
                  {"inner": model.state_dict().items()}):  # fmt: skip
        with pytest.raises(BridgeError, match=r"named_parameters\(\), go into dict\(\.\.\.\)"):
            fastema.EMA(pairs)
    with pytest.raises(BridgeError, match=r"list\(\.\.\.\)"):
        bridge_of(iter([ONE]))
    with pytest.raises(BridgeError, match="call it first"):
        bridge_of(model.parameters)
