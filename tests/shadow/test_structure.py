"""A model whose tensors are no longer the same: an error that names each, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import LayoutError, StateError

from .kinds import VARIED, all_of, trained_kind, unchanged, which
from .weights import Net, assert_bits, net, refresh_, snapshot

pytestmark = pytest.mark.torch

Change = Callable[[Any], object]


class Shared(nn.Module):
    """Two parameters in one memory, and one of its own that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 5))
        self.head = nn.Parameter(self.table.data)
        self.still = nn.Parameter(torch.randn(3), requires_grad=False)
        self.own = nn.Parameter(torch.randn(4))


def added(model: Net) -> None:
    model.extra = nn.Parameter(torch.randn(3))


def added_buffer(model: Net) -> None:
    model.register_buffer("mean", torch.randn(3))


def renamed(model: Net) -> None:
    model.gain = model.scale
    del model.scale


def tied(model: Net) -> None:
    memory = torch.randn(72)
    model.hidden.weight.data = memory.view(12, 6)
    model.head.weight.data = memory[:60].view(5, 12)


def given(path: str, value: Callable[[Any], Any]) -> Change:
    """Give a model something made of what it has in that place."""
    module, _, name = path.rpartition(".")

    def change(model: Net) -> None:
        owner = model.get_submodule(module)
        setattr(owner, name, value(getattr(owner, name)))

    return change


def data(path: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Give a parameter of a model other memory."""

    def change(model: Net) -> None:
        parameter = model.get_parameter(path)
        parameter.data = value(parameter.data)

    return change


# What the error has to say of each.
CHANGES: dict[str, tuple[Change, list[str]]] = {
    "added": (added, ["'extra'"]),
    "added module": (
        lambda model: model.add_module("more", nn.Linear(2, 2)),
        ["'more.weight'", "'more.bias'"],
    ),
    "added buffer": (added_buffer, ["'mean'"]),
    "removed": (lambda model: delattr(model, "scale"), ["'scale'"]),
    "removed module": (
        lambda model: delattr(model, "hidden"),
        ["'hidden.weight'", "'hidden.bias'"],
    ),
    "none": (given("conv.bias", lambda bias: None), ["'conv.bias'"]),
    "renamed": (renamed, ["'scale'", "'gain'"]),
    "reshaped": (data("hidden.bias", lambda x: torch.randn(13)), ["'hidden.bias'", "[13]", "[12]"]),
    "flattened": (data("hidden.weight", torch.ravel), ["'hidden.weight'", "[72]", "[12, 6]"]),
    "grown axis": (data("scale", lambda x: x[None]), ["'scale'", "[1]", "[]"]),
    "emptied": (data("hidden.bias", lambda x: torch.empty(0)), ["'hidden.bias'", "[0]"]),
    "another shape": (
        given("head", lambda head: nn.Linear(12, 6, bias=False)),
        ["'head.weight'", "[6, 12]", "[5, 12]"],
    ),
    "parametrised": (
        lambda model: nn.utils.parametrizations.weight_norm(model.head),
        ["'head.weight'", "'head.parametrizations.weight.original0'"],
    ),
    "tied": (tied, ["hidden.weight", "head.weight"]),
    "counter as int32": (
        given("norm.num_batches_tracked", torch.Tensor.int),
        ["norm.num_batches_tracked", "i32", "i64"],
    ),
}

CALLS = {
    "update": lambda average, model: average.update(),
    "update model": lambda average, model: average.update(model),
    "apply": lambda average, model: average.apply_shadow(**which(average)),
    "swapped": lambda average, model: average.swapped(**which(average)).__enter__(),
}


@pytest.mark.parametrize("kind", ["EMA", *VARIED])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_model_is_refused_by_name(change: str, call: str, kind: str) -> None:
    model = net()
    average = trained_kind(kind, model)
    make, parts = CHANGES[change]
    make(model)
    with unchanged(model, average), pytest.raises((LayoutError, TypeError)) as caught:
        CALLS[call](average, model)
    assert isinstance(caught.value, fastema.errors.FastemaError)
    assert [part for part in parts if part not in str(caught.value)] == []


def ready_kind(model: nn.Module, kind: str) -> Any:
    average = trained_kind(kind, model)
    refresh_(model, 7)
    return average


@pytest.mark.parametrize("kind", ["EMA", *VARIED])
def test_tensor_removed_while_applied(kind: str) -> None:
    """Its raw value has nowhere to go; nothing is lost once it is there again."""
    model = net()
    average = ready_kind(model, kind)
    raw, held, scale = snapshot(model), all_of(average), model.scale
    with pytest.raises(LayoutError, match="'scale'"), average.swapped(**which(average)):
        del model.scale
    assert average.applied
    with pytest.raises(LayoutError, match="'scale'"):
        average.restore()
    with pytest.raises(StateError):
        average.update()
    model.scale = scale
    assert all_of(average) == held
    average.restore()
    assert_bits(model, raw)
    assert all_of(average) == held


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("frozen", ["skip", "copy"])
def test_unfrozen_weights(call: str, frozen: str) -> None:
    """A weight that trains must not be left out, or be copied raw, without a word."""
    model = Shared()
    ema = fastema.EMA(model, 0.5, frozen=frozen)
    model.still.requires_grad_(True)
    refresh_(model, 1)
    with unchanged(model, ema), pytest.raises(LayoutError, match="'still'"):
        CALLS[call](ema, model)
    model.still.requires_grad_(False)
    ema.update()


def test_a_model_without_memory_is_refused_not_read(python: Callable[..., str]) -> None:
    """Sharding frees the storage under a parameter, or most of it, and leaves its shape."""
    out = python("""
        import torch, fastema
        for left in (0, 64):
            model = torch.nn.Linear(300, 400)
            ema = fastema.EMA(model, 0.5)
            before = ema.shadow["weight"].clone()
            model.weight.data.untyped_storage().resize_(left)
            for call in (ema.update, ema.apply_shadow, lambda: ema.copy_to(model),
                         lambda: fastema.EMA(model)):
                try:
                    call()
                    print("read or written")
                    break
                except fastema.errors.FastemaError as error:
                    print("weight" in str(error), torch.equal(ema.shadow["weight"], before))
    """)
    assert out.split() == ["True", "True"] * 8
