"""Models of any structure: containers, ties, and tensors that are added or removed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import LayoutError

from ..support.states import nested
from .kinds import (
    KINDS,
    PARTS,
    VARIED,
    assert_unchanged,
    build_trained,
    full_state,
    last_shadow,
    which,
)
from .weights import Net, assert_bits, bits, net, refresh_, snapshot

pytestmark = pytest.mark.torch

Change = Callable[[Any], object]


class Shared(nn.Module):
    """Two parameters that share memory, and a frozen one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 5))
        self.head = nn.Parameter(self.table.data)
        self.still = nn.Parameter(torch.randn(3), requires_grad=False)
        self.own = nn.Parameter(torch.randn(4))


def add_parameter(model: Net) -> None:
    model.extra = nn.Parameter(torch.randn(3))


def add_buffer(model: Net) -> None:
    model.register_buffer("mean", torch.randn(3))


def rename_scale(model: Net) -> None:
    model.gain = model.scale
    del model.scale


def share_memory(model: Net) -> None:
    memory = torch.randn(72)
    model.hidden.weight.data = memory.view(12, 6)
    model.head.weight.data = memory[:60].view(5, 12)


def replace_attribute(path: str, value: Callable[[Any], Any]) -> Change:
    """Return a change that replaces an attribute by ``value(attribute)``."""
    module, _, name = path.rpartition(".")

    def change(model: Net) -> None:
        owner = model.get_submodule(module)
        setattr(owner, name, value(getattr(owner, name)))

    return change


def data(path: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Return a change that gives a parameter ``value(data)`` as its data."""

    def change(model: Net) -> None:
        parameter = model.get_parameter(path)
        parameter.data = value(parameter.data)

    return change


# Each change, and what its error must contain.
CHANGES: dict[str, tuple[Change, list[str]]] = {
    "added": (add_parameter, ["'extra'"]),
    "added module": (
        lambda model: model.add_module("more", nn.Linear(2, 2)),
        ["'more.weight'", "'more.bias'"],
    ),
    "added buffer": (add_buffer, ["'mean'"]),
    "removed": (lambda model: delattr(model, "scale"), ["'scale'"]),
    "removed module": (
        lambda model: delattr(model, "hidden"),
        ["'hidden.weight'", "'hidden.bias'"],
    ),
    "none": (replace_attribute("conv.bias", lambda bias: None), ["'conv.bias'"]),
    "renamed": (rename_scale, ["'scale'", "'gain'"]),
    "reshaped": (data("hidden.bias", lambda x: torch.randn(13)), ["'hidden.bias'", "[13]", "[12]"]),
    "flattened": (data("hidden.weight", torch.ravel), ["'hidden.weight'", "[72]", "[12, 6]"]),
    "grown axis": (data("scale", lambda x: x[None]), ["'scale'", "[1]", "[]"]),
    "emptied": (data("hidden.bias", lambda x: torch.empty(0)), ["'hidden.bias'", "[0]"]),
    "another shape": (
        replace_attribute("head", lambda head: nn.Linear(12, 6, bias=False)),
        ["'head.weight'", "[6, 12]", "[5, 12]"],
    ),
    "parametrised": (
        lambda model: nn.utils.parametrizations.weight_norm(model.head),
        ["'head.weight'", "'head.parametrizations.weight.original0'"],
    ),
    "tied": (share_memory, ["hidden.weight", "head.weight"]),
    "counter as int32": (
        replace_attribute("norm.num_batches_tracked", torch.Tensor.int),
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
    average = build_trained(kind, model)
    make, parts = CHANGES[change]
    make(model)
    with assert_unchanged(model, average), pytest.raises((LayoutError, TypeError)) as caught:
        CALLS[call](average, model)
    assert isinstance(caught.value, fastema.errors.FastemaError)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("frozen", ["skip", "copy"])
def test_unfrozen_weight_is_refused(call: str, frozen: str) -> None:
    """A weight that trains must not silently be left out or copied raw."""
    model = Shared()
    ema = fastema.EMA(model, 0.5, frozen=frozen)
    model.still.requires_grad_(True)
    refresh_(model, 1)
    with assert_unchanged(model, ema), pytest.raises(LayoutError, match="'still'"):
        CALLS[call](ema, model)
    model.still.requires_grad_(False)
    ema.update()


def test_model_without_storage_is_refused(python: Callable[..., str]) -> None:
    """Sharding frees a parameter's storage, or most of it, but keeps its shape."""
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


class Lang(nn.Module):
    """An embedding and an output projection, tied in one of three ways or not at all."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tie == "parameter":
            self.head.weight = self.embed.weight
        elif tie == "storage":
            self.head.weight.data = self.embed.weight.data
        elif tie == "module":
            self.again = self.embed


TIES = ["parameter", "storage", "module"]
OTHER_NAME = {"parameter": "head.weight", "storage": "head.weight", "module": "again.weight"}


def step_(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", TIES)
def test_tied_weights_are_swapped_once(tie: str, kind: str) -> None:
    model = Lang(tie)
    average = KINDS[kind](model)
    for n in range(1, 6):
        step_(model, n)
        average.update()
    step_(model, 6)
    held, whole = full_state(average), Lang("none")
    average.copy_to(whole, **which(average))
    with assert_unchanged(model, average), average.swapped(**which(average)):
        assert torch.equal(model.embed.weight, whole.embed.weight)
        if tie != "module":
            assert torch.equal(model.head.weight, whole.embed.weight)
        assert full_state(average) == held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", TIES)
def test_tied_weights_are_stored_once_and_found_under_both_names(tie: str, kind: str) -> None:
    average = KINDS[kind](Lang(tie))
    names = list(last_shadow(average))
    assert "embed.weight" in names
    assert OTHER_NAME[tie] not in names
    state = average.state_dict()
    for part in PARTS:
        assert all(list(tensors) == names for tensors in nested(state).get(part, ()))
    average.load_state_dict(state)
    for shadow in average.shadows:
        assert torch.equal(shadow["embed.weight"], shadow[OTHER_NAME[tie]])
        with average.swapped(**which(average)):
            assert torch.equal(shadow["embed.weight"], shadow[OTHER_NAME[tie]])


@pytest.mark.parametrize("frozen", ["skip", "copy", "average"])
@pytest.mark.parametrize("frozen_first", [True, False])
def test_trained_weight_in_the_memory_of_a_frozen_one_is_averaged(
    frozen: str, frozen_first: bool
) -> None:
    """Whichever name comes first."""
    memory = torch.randn(70)
    model = nn.ParameterDict()
    for name in ("still", "live") if frozen_first else ("live", "still"):
        model[name] = nn.Parameter(memory, requires_grad=name == "live")
    model["other"] = nn.Parameter(torch.randn(3))
    ema = fastema.EMA(model, 0.5, frozen=frozen)
    old = memory.clone()
    memory.add_(1)
    ema.update()
    torch.testing.assert_close(ema.shadow["live"], old + 0.5)


def test_partly_overlapping_weights_are_refused_by_name() -> None:
    memory, square = torch.randn(10), torch.randn(3, 3)
    with pytest.raises(LayoutError, match=r"'?first'?(.|\n)*'?second'?"):
        fastema.EMA({"first": memory[:6], "second": memory[4:]})
    for weights in (
        [memory.view(2, 5), memory],
        [square, square.t()],
        [memory[0:4].view(torch.complex64), memory[0:4]],
    ):
        with pytest.raises(LayoutError, match="overlap"):
            fastema.EMA(weights)


def test_weights_that_were_moved_into_the_average_are_refused() -> None:
    model = nn.Linear(3, 2)
    ema = fastema.EMA(model, 0.5)
    before = {name: average.clone() for name, average in ema.shadow.items()}
    model.weight.data = ema.shadow["weight"]
    with pytest.raises(LayoutError, match=r"average of weight .* and weight .* overlap"):
        ema.update()
    with pytest.raises(LayoutError, match="overlap"):
        fastema.Plan(ema.shadow, model)
    model.weight.data = before["weight"] + 1
    ema.update()
    torch.testing.assert_close(ema.shadow["weight"], before["weight"] + 0.5)


class Wrapper(nn.Module):
    """A wrapper that prefixes names like ``DataParallel``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compile_model(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compile_hidden(model: nn.Module) -> nn.Module:
    if not hasattr(model.hidden, "_orig_mod"):
        model.hidden = torch.compile(model.hidden, backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parallel": Wrapper,
    "compiled": compile_model,
    "compiled parallel": lambda model: compile_model(Wrapper(model)),
    "parallel compiled": lambda model: Wrapper(compile_model(model)),
    "compiled inside": compile_hidden,
}


@pytest.mark.parametrize("kind", VARIED)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_change_no_average(wrapper: str, kind: str) -> None:
    """Not even random rounding, which depends on the names of tensors."""
    model, other = net(), net()
    average, twin = KINDS[kind](WRAPPERS[wrapper](model)), KINDS[kind](other)
    for n in range(1, 7):
        refresh_(model, n)
        refresh_(other, n)
        average.update()
        twin.update(WRAPPERS[wrapper](other) if n % 2 else None)
    assert full_state(average) == full_state(twin)
    resumed = KINDS[kind](WRAPPERS[wrapper](net(5)))
    resumed.load_state_dict(twin.state_dict())
    assert full_state(resumed) == full_state(twin)


LAYOUTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "scalar": lambda d: torch.ones((), dtype=d),
    "one": lambda d: torch.ones(1, 1, 1, dtype=d),
    "empty": lambda d: torch.ones(0, 5, dtype=d),
    "channels_last": lambda d: torch.ones(4, 3, 5, 7, dtype=d).to(
        memory_format=torch.channels_last
    ),
    "transposed": lambda d: torch.ones(40, 30, dtype=d).t(),
    "permuted": lambda d: torch.ones(4, 5, 6, dtype=d).permute(2, 0, 1),
    "rows": lambda d: torch.ones(30, 8, dtype=d)[10:20],
    "columns": lambda d: torch.ones(30, 24, dtype=d)[:, 8:16],
    "every other": lambda d: torch.ones(301, dtype=d)[::2],
    "column": lambda d: torch.ones(300, 3, dtype=d)[:, 1],
    "grid": lambda d: torch.ones(9, 9, 9, dtype=d)[::2, 1::3, ::4],
    "offset": lambda d: torch.ones(131, dtype=d)[1:],
    "diagonal": lambda d: torch.ones(20, 20, dtype=d).diagonal(),
    "expanded by one": lambda d: torch.ones(1, 7, dtype=d).expand(1, 7),
    "sliding": lambda d: torch.ones(12, dtype=d).as_strided((3, 4), (4, 1)),
}


def lay_out(layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights, the memory that contains them, and a mask of the memory outside them."""
    weights = LAYOUTS[layout](dtype)
    whole = weights if weights._base is None else weights._base
    inside = torch.zeros(whole.shape, dtype=torch.bool)
    inside.as_strided(weights.shape, weights.stride(), weights.storage_offset()).fill_(True)
    refresh_([whole], 0)
    return weights, whole, ~inside


@pytest.mark.parametrize("kind", VARIED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_average_of_contiguous_weights(layout: str, kind: str) -> None:
    """Memory around the weights must stay unchanged."""
    weights, whole, outside = lay_out(layout, torch.float32)
    plain = weights.clone(memory_format=torch.contiguous_format)
    # Random bits depend on positions in memory.
    options = {"rounding": "nearest"} if kind == "random" else {}
    average, twin = KINDS[kind]({"w": weights}, **options), KINDS[kind]({"w": plain}, **options)
    for n in range(1, 8):
        refresh_([whole], n)
        plain.copy_(weights)
        with assert_unchanged([whole]):
            average.update()
        twin.update()
        around = bits(whole[outside])
        both = average.swapped(**which(average)), twin.swapped(**which(twin))
        with assert_unchanged([whole], average), both[0], both[1]:
            # The layout decides when a mean is recomputed: its last place may differ.
            torch.testing.assert_close(weights, plain, rtol=2.0**-23, atol=2.0**-24)
            if kind != "SMA":
                assert torch.equal(weights, plain)
            assert torch.equal(bits(whole[outside]), around)
    found, want = nested(average.state_dict()), nested(twin.state_dict())
    for part in PARTS if kind != "SMA" else ["ring"]:
        for one, other in zip(found.get(part, ()), want.get(part, ()), strict=True):
            assert_bits(one, snapshot(other))
