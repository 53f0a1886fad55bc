"""Every way in which a tensor can move is noticed, and nothing else is taken for one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastema.bridges.registry import leaves_of
from fastema.engine.watch import SHARES, _ByAttributes, _ByExchange, watch
from fastema.errors import FastemaError

torch = pytest.importorskip("torch")
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


MOVES = [
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
        assert sum(watching.changed_in(share) for share in range(SHARES)) == 1
        model[k].bias = before
    assert not any(watching.changed_in(share) for share in range(SHARES))
    model.to(torch.float64)
    assert all(watching.changed_in(share) for share in range(SHARES))
