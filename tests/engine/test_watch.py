"""Watches report tensors that move, and nothing else."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastema.bridges.registry import leaves_of
from fastema.engine.watch import _DescribingWatch, watch
from fastema.errors import FastemaError

pytestmark = pytest.mark.torch

Change = Callable[[Any], object]


def build_net() -> Any:
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net = nn.Sequential(nn.Conv2d(2, 4, 3), inner, nn.Linear(4, 4, bias=False))
    net[0].register_buffer("halves", torch.full((3,), 0.5, dtype=torch.float16))
    return net


def new_net() -> Any:
    """Build an equal network with other tensors and values."""
    made = build_net()
    made.load_state_dict({k: v + 1 for k, v in made.state_dict().items()})
    return made


def set_data(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def move(net: Any) -> None:
        net[2].weight.data = change(net[2].weight.data)

    return move


def view_as(buffer: Callable[[Any], torch.Tensor], dtype: torch.dtype) -> Change:
    def move(net: Any) -> None:
        buffer(net).data = buffer(net).data.view(dtype)

    return move


def assign(net: Any) -> None:
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


def tie(net: Any) -> None:
    net[2].weight = nn.Parameter(torch.ones(4, 4))
    net[0].tied = net[2].weight


def move_within_storage(net: Any) -> None:
    weight = net[1][0].weight
    weight.data = torch.cat([weight.data, weight.data])[1:5]


def set_storage(net: Any) -> None:
    with torch.no_grad():
        net[2].weight.set_(torch.ones(16).view(4, 4))


MOVES: dict[str, Change] = {
    # dicts of modules are replaced
    "parameters": lambda net: setattr(net[1][0], "_parameters", dict(new_net()[1][0]._parameters)),
    "buffers": lambda net: setattr(net[1][1], "_buffers", dict(new_net()[1][1]._buffers)),
    "modules": lambda net: setattr(net[1], "_modules", dict(new_net()[1]._modules)),
    "an empty dict": lambda net: setattr(net[2], "_modules", {"inner": nn.Linear(2, 2)}),
    "modules of the root": lambda net: setattr(net, "_modules", dict(new_net()._modules)),
    "state set": lambda net: net[1][0].__setstate__(vars(new_net()[1][0])),
    "attributes updated": lambda net: vars(net).update(vars(new_net())),
    "attributes replaced": lambda net: setattr(net, "__dict__", vars(new_net())),
    # entries of these dicts change
    "module": lambda net: net.__setitem__(2, nn.Linear(4, 4, bias=False)),
    "inner module": lambda net: net[1].__setitem__(0, nn.Linear(3, 4)),
    "module appended": lambda net: net.append(nn.Linear(4, 2)),
    "module removed": lambda net: net.__delitem__(2),
    "parameter": lambda net: setattr(net[2], "weight", nn.Parameter(net[2].weight.detach() + 0)),
    "parameter removed": lambda net: setattr(net[1][0], "bias", None),
    "parameter added": lambda net: net[2].register_parameter("bias", nn.Parameter(torch.ones(4))),
    "buffer": lambda net: setattr(net[1][1], "running_mean", torch.ones(4)),
    "buffer added": lambda net: net[0].register_buffer("extra", torch.ones(2)),
    "tied": tie,
    "assigned": assign,
    # tensors themselves change
    "converted": lambda net: net.to(torch.float64),
    "data": set_data(lambda data: data.clone()),
    "transposed": set_data(lambda data: data.t()),
    "reshaped": set_data(lambda data: data.view(2, 8)),
    "other dtype": view_as(lambda net: net[1][1].running_mean, torch.int32),
    "other halves": view_as(lambda net: net[0].halves, torch.bfloat16),
    "resized": lambda net: net[1][1].running_var.resize_(64, 64),
    "storage freed": lambda net: net[2].weight.untyped_storage().resize_(0),
    "storage set": set_storage,
    "within a storage": move_within_storage,
}


def notices_change(one: Any) -> bool:
    """Return whether a watch reports a change or raises an error that explains it."""
    try:
        return bool(one.changed())
    except FastemaError:
        return True


def watches(leaves: Any) -> list[Any]:
    """Return the watch chosen for these leaves, and the one that works for all leaves."""
    found = [watch(leaves), _DescribingWatch(leaves)]
    assert not any(one.changed() for one in found)
    return found


def test_training_and_moving_back_are_not_reported() -> None:
    net = build_net()
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
    before, parameter = net[2].weight.data, net[2].weight
    MOVES["data"](net)
    net[2].weight.data = before
    net[2].weight = None
    net[2].weight = parameter
    assert not any(one.changed() for one in watching)


def persistent_of(leaves: Any) -> Any:
    return leaves.select_names({leaf.name for leaf in leaves.items if leaf.persistent})


def test_a_watch_keeps_persistent_tensors_alive_but_no_modules_or_caches() -> None:
    net = build_net()
    net.register_buffer("cache", torch.ones(3), persistent=False)
    vars(net)["itself"] = [net]
    one = watch(persistent_of(leaves_of(net)), transient=False)
    cache, weight, module = map(weakref.ref, (net.cache, net[2].weight, net))
    net.cache = torch.ones(30)
    gc.collect()
    assert cache() is None
    assert not one.changed()
    MOVES["parameter"](net)
    gc.collect()
    # While a watch compares its address, no other tensor may be allocated there.
    assert weight() is not None
    assert one.changed()
    del net
    gc.collect()
    assert module() is None
    assert one.changed()
    del one
    gc.collect()
    assert weight() is None


def test_replaced_cache_is_noticed_by_the_watches_that_include_it() -> None:
    net = build_net()
    net.register_buffer("cache", torch.ones(3), persistent=False)
    leaves = leaves_of(net)
    watching = watches(leaves)
    others = [make(persistent_of(leaves), transient=False) for make in (watch, _DescribingWatch)]
    net.cache = torch.ones(30)
    assert all(one.changed() for one in watching)
    assert not any(one.changed() for one in others)


@pytest.mark.parametrize("move", MOVES)
def test_every_move_and_change_of_structure_is_noticed(move: str) -> None:
    net = new_net()
    watching = watches(leaves_of(net))
    MOVES[move](net)
    assert all(notices_change(one) for one in watching)
