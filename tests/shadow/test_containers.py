"""What weights may come in: wrapped modules, lists, dicts, iterators, and any layout in memory."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastema

from .kinds import KINDS, PARTS, VARIED, all_of, unchanged, which
from .weights import (
    Net,
    assert_bits,
    bits,
    net,
    refresh_,
    snapshot,
    values,
)

pytestmark = pytest.mark.torch

Pair = namedtuple("Pair", "left right")


class Wrapper(nn.Module):
    """What ``DataParallel`` and its kind do to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_inside(model: nn.Module) -> nn.Module:
    model.hidden = torch.compile(model.hidden, backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "parallel": Wrapper,
    "DataParallel": lambda model: nn.DataParallel(model),
    "compiled": compiled,
    "compiled parallel": lambda model: compiled(Wrapper(model)),
    "parallel compiled": lambda model: Wrapper(compiled(model)),
    "parallel twice": lambda model: Wrapper(Wrapper(model)),
    "compiled inside": compiled_inside,
}


@pytest.mark.parametrize("kind", VARIED)
@pytest.mark.parametrize("wrapper", ["parallel", "compiled"])
def test_wrappers_do_not_matter_to_any_kind(wrapper: str, kind: str) -> None:
    """Neither does random rounding, which asks for the names of tensors, see them."""
    model, other = net(), net()
    average, twin = KINDS[kind](WRAPPERS[wrapper](model)), KINDS[kind](other)
    for n in range(1, 7):
        refresh_(model, n)
        refresh_(other, n)
        average.update()
        twin.update(WRAPPERS[wrapper](other) if n % 2 else None)
    assert all_of(average) == all_of(twin)
    resumed = KINDS[kind](WRAPPERS[wrapper](net(5)))
    resumed.load_state_dict(twin.state_dict())
    assert all_of(resumed) == all_of(twin)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


CONTAINERS = {
    "tensor": (lambda: numbers(5), ["array"]),
    "list": (lambda: [numbers(2), numbers(3)], ["0", "1"]),
    "tuple": (lambda: (numbers(2), numbers(3)), ["0", "1"]),
    "namedtuple": (lambda: Pair(numbers(2), numbers(3)), ["0", "1"]),
    "dict": (lambda: {"a": numbers(2), "b": numbers(3)}, ["a", "b"]),
    "ordered": (lambda: OrderedDict(b=numbers(2), a=numbers(3)), ["b", "a"]),
    "mapping": (lambda: UserDict(b=numbers(2), a=numbers(3)), ["b", "a"]),
    "nested": (
        lambda: {"a": [numbers(2), {"b": numbers(3)}], "c": (numbers(1), [])},
        ["a.0", "a.1.b", "c.0"],
    ),
    "generator": (lambda: net().parameters(), [str(i) for i in range(8)]),
    "map": (lambda: map(numbers, [2, 3]), ["0", "1"]),
    "state_dict": (lambda: net().state_dict(), list(values(Net()))),
    "ParameterList": (lambda: nn.ParameterList([numbers(2), numbers(3)]), ["0", "1"]),
    "ParameterDict": (lambda: nn.ParameterDict({"a": numbers(2)}), ["a"]),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container: str) -> None:
    made, names = CONTAINERS[container]
    weights = made()
    ema = fastema.EMA(weights, 0.5)
    assert sorted(ema.shadow) == sorted(names)
    for tensor in ema.shadow.values():
        assert tensor.is_floating_point() or tensor.dtype == torch.int64
    ema.update()
    with ema.swapped():
        pass


# -- layouts --------------------------------------------------------------------------------------

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


def laid_out(layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, the memory that they lie in, and where in it they do not."""
    weights = LAYOUTS[layout](dtype)
    whole = weights if weights._base is None else weights._base
    inside = torch.zeros(whole.shape, dtype=torch.bool)
    inside.as_strided(weights.shape, weights.stride(), weights.storage_offset()).fill_(True)
    refresh_([whole], 0)
    return weights, whole, ~inside


@pytest.mark.parametrize("kind", VARIED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_kind(layout: str, kind: str) -> None:
    """As of weights that lie one after the other; nothing around them is touched."""
    weights, whole, outside = laid_out(layout, torch.float32)
    plain = weights.clone(memory_format=torch.contiguous_format)
    # Random bits belong to places in memory.
    options = {"rounding": "nearest"} if kind == "random" else {}
    average, twin = KINDS[kind]({"w": weights}, **options), KINDS[kind]({"w": plain}, **options)
    for n in range(1, 8):
        refresh_([whole], n)
        plain.copy_(weights)
        with unchanged([whole]):
            average.update()
        twin.update()
        around = bits(whole[outside])
        both = average.swapped(**which(average)), twin.swapped(**which(twin))
        with unchanged([whole], average), both[0], both[1]:
            # When a mean is computed afresh depends on the layout: it may be off by a last place.
            torch.testing.assert_close(weights, plain, rtol=2.0**-23, atol=2.0**-24)
            if kind != "SMA":
                assert torch.equal(weights, plain)
            assert torch.equal(bits(whole[outside]), around)
    found, want = average.state_dict(), twin.state_dict()
    for part in PARTS if kind != "SMA" else ["ring"]:
        for one, other in zip(found.get(part, ()), want.get(part, ()), strict=True):
            assert_bits(one, snapshot(other))
