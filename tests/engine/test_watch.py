"""Every way in which a tensor can move is noticed, and nothing else is taken for one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastema.bridges.registry import leaves_of
from fastema.engine.watch import SHARES, _ByAttributes, _ByExchange, watch
from fastema.errors import FastemaError

nn = torch.nn

pytestmark = pytest.mark.torch


def model() -> Any:
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net = nn.Sequential(nn.Conv2d(2, 4, 3), inner, nn.Linear(4, 4, bias=False))
    net[0].register_buffer("halves", torch.full((3,), 0.5, dtype=torch.float16))
    return net


def replace_data(net: Any) -> None:
    net[2].weight.data = net[2].weight.data.clone()


def convert(net: Any) -> None:
    net.to(torch.float64)


def assign(net: Any) -> None:
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


def replace_module(net: Any) -> None:
    net[2] = nn.Linear(4, 4, bias=False)


def replace_inner_module(net: Any) -> None:
    net[1][0] = nn.Linear(3, 4)


def replace_parameter(net: Any) -> None:
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())


def remove_parameter(net: Any) -> None:
    net[1][0].bias = None


def add_parameter(net: Any) -> None:
    net[2].register_parameter("bias", nn.Parameter(torch.ones(4)))


def register_buffer(net: Any) -> None:
    net[0].register_buffer("extra", torch.ones(2))


def replace_buffer(net: Any) -> None:
    net[1][1].running_mean = torch.ones(4)


def append_module(net: Any) -> None:
    net.append(nn.Linear(4, 2))


def remove_module(net: Any) -> None:
    del net[2]


def tie(net: Any) -> None:
    net[2].weight = nn.Parameter(torch.ones(4, 4))
    net[0].tied = net[2].weight


def reuse_memory_for_another_dtype(net: Any) -> None:
    net[1][1].running_mean.data = net[1][1].running_mean.data.view(torch.int32)


def reinterpret_half(net: Any) -> None:
    net[0].halves.data = net[0].halves.data.view(torch.bfloat16)


def transpose_in_place(net: Any) -> None:
    net[2].weight.data = net[2].weight.data.t()


def reshape_in_place(net: Any) -> None:
    net[2].weight.data = net[2].weight.data.view(2, 8)


def resize(net: Any) -> None:
    net[1][1].running_var.resize_(64, 64)


def free_storage(net: Any) -> None:
    net[2].weight.untyped_storage().resize_(0)


def move_within_storage(net: Any) -> None:
    weight = net[1][0].weight
    weight.data = torch.cat([weight.data, weight.data])[1:5]


def set_storage(net: Any) -> None:
    with torch.no_grad():
        net[2].weight.set_(torch.ones(16).view(4, 4))


def conjugate(net: Any) -> None:
    net[2].weight.data = net[2].weight.data.conj()


def other() -> Any:
    """The same with other tensors."""
    made = model()
    return made.load_state_dict({k: v + 1 for k, v in made.state_dict().items()}) and made


def replace_dict_of_parameters(net: Any) -> None:
    net[1][0]._parameters = dict(other()[1][0]._parameters)


def replace_dict_of_buffers(net: Any) -> None:
    net[1][1]._buffers = dict(other()[1][1]._buffers)


def replace_dict_of_modules(net: Any) -> None:
    net[1]._modules = dict(other()[1]._modules)


def replace_an_empty_dict(net: Any) -> None:
    net[2]._modules = {"inner": nn.Linear(2, 2)}


def replace_dict_of_the_root(net: Any) -> None:
    net._modules = dict(other()._modules)


def set_state(net: Any) -> None:
    net[1][0].__setstate__(vars(other()[1][0]))


def update_attributes(net: Any) -> None:
    vars(net).update(vars(other()))


def replace_attributes_of_the_root(net: Any) -> None:
    net.__dict__ = vars(other())


MOVES = [
    *(replace_dict_of_parameters, replace_dict_of_buffers, replace_dict_of_modules),
    *(replace_an_empty_dict, replace_dict_of_the_root, set_state, update_attributes),
    replace_attributes_of_the_root,
    *(replace_data, convert, assign, replace_module, replace_inner_module, replace_parameter),
    *(remove_parameter, add_parameter, register_buffer, replace_buffer, append_module),
    *(remove_module, tie, reuse_memory_for_another_dtype, reinterpret_half, transpose_in_place),
    *(reshape_in_place, resize, free_storage, move_within_storage, set_storage),
]


def noticed(one: Any) -> bool:
    """Whether a change is seen; an error that says what is wrong now will do."""
    try:
        return bool(one.changed())
    except FastemaError:
        return True


def watches(leaves: Any) -> dict[str, Any]:
    """The kind of watch that is chosen, and the one that works for everything."""
    chosen = watch(leaves)
    return {"attributes": _ByAttributes(leaves), type(chosen).__name__: chosen}


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_modules_that_change_are_noticed(move: Callable[[Any], None]) -> None:
    net = model()
    watching = watches(leaves_of(net))
    for kind, one in watching.items():
        assert not one.changed(), kind
    move(net)
    assert {kind: noticed(one) for kind, one in watching.items()} == dict.fromkeys(watching, True)


def test_a_conjugated_view_is_noticed() -> None:
    # Same memory, same shape, another meaning.
    net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(2, 2, dtype=torch.complex64))
    one = watch(leaves_of(net))
    assert not one.changed()
    conjugate(net)
    assert noticed(one)


def test_torch_tensors_are_watched_through_the_exchange_function() -> None:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no DLPack exchange functions")
    assert isinstance(watch(leaves_of(model())), _ByExchange)
    assert isinstance(watch(leaves_of([np.ones(3)])), _ByAttributes)
    assert isinstance(watch(leaves_of([np.ones(3), torch.ones(3)])), _ByAttributes)
    assert isinstance(watch(leaves_of([])), _ByAttributes)


def test_training_is_no_change() -> None:
    net = model()
    watching = watches(leaves_of(net))
    net[2].note = "an attribute more"
    del net[2].note
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    net[2].weight.grad = torch.ones(4, 4)
    net.zero_grad()
    net.eval()
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()})
    net.to("cpu")
    for kind, one in watching.items():
        assert not one.changed(), kind


def test_moving_back_is_no_change() -> None:
    net = model()
    watching = watches(leaves_of(net))
    before, parameter = net[2].weight.data, net[2].weight
    replace_data(net)
    net[2].weight.data = before
    net[2].weight = None
    net[2].weight = parameter
    for kind, one in watching.items():
        assert not one.changed(), kind


DICT_CHANGES: dict[str, Callable[[dict[str, Any], Callable[[int], Any]], Any]] = {
    "replaced": lambda held, make: held.update(a=make(3)),
    "removed": lambda held, make: held.pop("a"),
    "added": lambda held, make: held.update(c=make(3)),
    "renamed": lambda held, make: held.update(c=held.pop("a")),
    "inner replaced": lambda held, make: held["inner"].update(b=make(2)),
    "inner dict replaced": lambda held, make: held.update(inner={"b": make(2)}),
    "list replaced": lambda held, make: held.update(list=[make(4)]),
    "list element replaced": lambda held, make: held["list"].__setitem__(0, make(4)),
    "list longer": lambda held, make: held["list"].append(make(4)),
    "list emptied": lambda held, make: held["list"].clear(),
    "other order": lambda held, make: held.update(a=held.pop("a")),
}


@pytest.mark.parametrize("change", DICT_CHANGES)
@pytest.mark.parametrize("make", [np.ones, torch.ones], ids=["numpy", "torch"])
def test_dicts_that_change_are_noticed(make: Callable[[int], Any], change: str) -> None:
    held = {"a": make(3), "inner": {"b": make(2)}, "list": [make(4)]}
    watching = watches(leaves_of(held))
    assert not any(one.changed() for one in watching.values())
    DICT_CHANGES[change](held, make)
    assert {kind: noticed(one) for kind, one in watching.items()} == dict.fromkeys(watching, True)


def test_numpy_arrays_that_change_in_place_are_noticed() -> None:
    def resized(array: np.ndarray) -> None:
        array.resize((4000, 50), refcheck=False)

    def reshaped(array: np.ndarray) -> None:
        array.resize((2, 6), refcheck=False)

    def frozen(array: np.ndarray) -> None:
        array.flags.writeable = False

    for change in (resized, reshaped, frozen):
        array = np.ones((3, 4))
        one = watch(leaves_of([array]))
        assert not one.changed()
        change(array)
        assert one.changed(), change.__name__


@pytest.mark.parametrize("place", [0, 7])
def test_attributes_are_found_wherever_a_module_has_them(place: int) -> None:
    """Modules made in other ways have their dicts in another order, among other attributes."""
    net = model()
    inner = net[1][0]
    attributes = dict(vars(inner))
    vars(inner).clear()
    vars(inner).update({f"attribute {i}": i for i in range(place)})
    for name in (*reversed(attributes),):
        vars(inner)["".join(name)] = attributes[name]
    for i in range(place // 2):
        del vars(inner)[f"attribute {i}"]
    watching = watches(leaves_of(net))
    assert not any(one.changed() for one in watching.values())
    replace_dict_of_parameters(net)
    assert {kind: noticed(one) for kind, one in watching.items()} == dict.fromkeys(watching, True)


TRANSIENT: dict[str, Callable[[Any], None]] = {
    "grows": lambda net: setattr(net[2], "cache", torch.ones(40)),
    "goes": lambda net: setattr(net[2], "cache", None),
    "comes": lambda net: setattr(net[2], "mask", torch.ones(3)),
}


@pytest.mark.parametrize("change", TRANSIENT)
def test_what_a_state_leaves_out_may_change_unless_it_counts(change: str) -> None:
    net = model()
    net[2].register_buffer("cache", torch.ones(3), persistent=False)
    net[2].register_buffer("mask", None, persistent=False)
    net[2].register_buffer("table", torch.ones(3))
    leaves = leaves_of(net)
    kept = leaves.only({leaf.name for leaf in leaves.items if leaf.persistent})
    counts = [watch(leaves), _ByAttributes(leaves)]
    does_not = [watch(kept, transient=False), _ByAttributes(kept, transient=False)]
    TRANSIENT[change](net)
    assert all(noticed(one) for one in counts)
    assert not any(one.changed() for one in does_not)
    net[2].table = torch.ones(3)  # beside it, in one dict
    assert all(one.changed() for one in does_not)


def test_what_may_change_is_not_kept_alive() -> None:
    net = model()
    net.register_buffer("cache", torch.ones(3), persistent=False)
    leaves = leaves_of(net)
    one = watch(
        leaves.only({leaf.name for leaf in leaves.items if leaf.persistent}), transient=False
    )
    del leaves
    old = weakref.ref(net.cache)
    net.cache = torch.ones(30)
    gc.collect()
    assert old() is None
    assert not one.changed()


def test_a_module_is_not_kept_alive_by_what_it_has() -> None:
    net = model()
    vars(net)["itself"] = [net]
    one = watch(leaves_of(net))
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert one.changed()


def test_what_is_watched_is_kept_alive() -> None:
    net = model()
    one = watch(leaves_of(net))
    old = weakref.ref(net[2].weight)
    replace_parameter(net)
    gc.collect()
    # Its address cannot be given to another tensor while it is compared with.
    assert old() is not None
    assert one.changed()
    del one
    gc.collect()
    assert old() is None


def test_a_share_at_a_time_sees_everything_in_turn() -> None:
    """Each change is seen in one share, and in all of them together nothing is looked at twice."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 2) for _ in range(40)))
    for leaves in (leaves_of(model), leaves_of([p.detach().numpy() for p in model.parameters()])):
        watching = watch(leaves)
        assert not any(watching.changed_in(share) for share in range(SHARES))
    watching = watch(leaves_of(model))
    for k in (0, 17, 39):
        before = model[k].weight.data
        model[k].weight.data = before.clone()
        assert sum(watching.changed_in(share) for share in range(SHARES)) == 1
        model[k].weight.data = before
        before = model[k].bias
        model[k].bias = torch.nn.Parameter(before.detach().clone())
        assert 1 <= sum(watching.changed_in(share) for share in range(SHARES)) <= 2
        model[k].bias = before
    assert not any(watching.changed_in(share) for share in range(SHARES))
    model.to(torch.float64)
    assert all(watching.changed_in(share) for share in range(SHARES))


@pytest.mark.parametrize("make", [np.ones, torch.ones], ids=["numpy", "torch"])
def test_lists_are_looked_at_in_the_first_share_alone(make: Callable[[int], Any]) -> None:
    held = [make(3) for _ in range(40)]
    watching = watch(leaves_of(held))
    held.append(make(3))
    assert [watching.changed_in(share) for share in range(SHARES)] == [True] + [False] * 15
