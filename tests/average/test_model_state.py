"""Copies of the average: copy_to() and model_state_dict()."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import fastema
from fastema.errors import LayoutError, StateError

from .kinds import KINDS, assert_unchanged, build_trained, which
from .weights import BUFFERS, Net, assert_bits, bits, net, refresh_, snapshot, values

pytestmark = pytest.mark.torch


def ties_away(x: torch.Tensor) -> torch.Tensor:
    """Round finite float32 numbers to the nearest bfloat16, ties away from zero."""
    bits = x.float().view(torch.int32) + 0x8000
    return (bits & ~0xFFFF).view(torch.float32).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_copy_to_and_model_state_dict_round_the_average_once(kind: str, dtype: torch.dtype) -> None:
    """As a swap rounds, and otherwise to nearest even; a split average counts as float32."""
    model = net(0, dtype)
    average = build_trained(kind, model)
    refresh_(model, 9)
    with assert_unchanged(model, average):
        for i, shadow in enumerate(average.shadows):
            wide = net(5, torch.float64)
            average.copy_to(wide, which=i)
            exact = values(wide)
            for name, held in shadow.items():
                if "split" in kind and name not in BUFFERS:
                    assert torch.equal(exact[name], exact[name].float().double())
                    torch.testing.assert_close(held.double(), exact[name], rtol=2.0**-8, atol=0)
                else:
                    assert torch.equal(exact[name], held.to(exact[name].dtype))
            for other_dtype in (torch.float32, torch.bfloat16, dtype):
                other = net(5, other_dtype)
                average.copy_to(other, which=i)
                for name, tensor in values(other).items():
                    is_float32 = "split" in kind or shadow[name].dtype == torch.float32
                    away = is_float32 and name not in BUFFERS and other_dtype == torch.bfloat16
                    want = ties_away(exact[name]) if away else exact[name].to(tensor.dtype)
                    assert torch.equal(tensor, want), name
        state = average.model_state_dict(**which(average))
    assert list(state) == list(other.state_dict())
    assert_bits(other, {name: bits(tensor) for name, tensor in state.items()})
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert not any(tensor.requires_grad for tensor in state.values())
    net(4, dtype).load_state_dict(state)


class Tied(nn.Module):
    """Tied weights, a frozen layer, a non-persistent buffer, and state that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 3}


def test_model_state_dict_has_tied_frozen_and_extra_state() -> None:
    model = Tied()
    ema = fastema.EMA(model, 0.5)
    refresh_(model, 1)
    ema.update()
    state = ema.model_state_dict()
    assert list(state) == list(model.state_dict())
    assert state["embed.weight"] is state["head.weight"]
    assert torch.equal(state["embed.weight"], ema.shadow["embed.weight"])
    assert torch.equal(state["frozen.weight"], model.frozen.weight)
    other = Tied()
    other.load_state_dict(state)
    assert torch.equal(other.head.weight, ema.shadow["head.weight"])


def test_model_state_dict_is_refused_while_applied_or_for_other_shapes() -> None:
    ema = build_trained("EMA")
    with ema.swapped(), pytest.raises(StateError, match="model_state_dict"):
        ema.model_state_dict()
    with pytest.raises(LayoutError, match=r"head\.weight: shapes differ"):
        ema.model_state_dict(Net(width=7))


def remove_tensors(model: nn.Module) -> None:
    del model.scale
    model.conv.bias = None


UNFIT: dict[str, tuple[Callable[[Any], object], list[str]]] = {
    "lacking": (remove_tensors, ["'scale'", "'conv.bias'"]),
    "reshaped": (
        lambda model: setattr(model.hidden.bias, "data", torch.randn(13)),
        ["hidden.bias"],
    ),
    "training more": (  # it would stay raw among averaged weights
        lambda model: setattr(model, "extra", nn.Parameter(torch.randn(3))),
        ["extra"],
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_copy_to_refuses_a_model_that_does_not_fit(what: str) -> None:
    change, names = UNFIT[what]
    ema = fastema.EMA(net(), 0.5)
    target = net(1)
    change(target)
    before = snapshot(target)
    with pytest.raises(LayoutError) as caught:
        ema.copy_to(target)
    assert all(name in str(caught.value) for name in names)
    assert_bits(target, before)


class Scaled(nn.Linear):
    """A layer with state that is not a tensor."""

    def get_extra_state(self) -> Any:
        return {"scale": 3}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"scale": 3}


def layered() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(Scaled(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def wrap_inside(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        model[0], model[2] = make(model[0]), make(model[2])
        return model

    return wrap


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled": torch.compile,
    "ddp of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "compiled ddp": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    "checkpointed inside": wrap_inside(checkpoint_wrapper),
    "compiled inside": wrap_inside(torch.compile),
    "ddp inside": wrap_inside(nn.parallel.DistributedDataParallel),
}


@pytest.fixture
def lone_rank() -> Iterator[None]:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.compile
@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_model_state_dict_has_the_names_of_the_unwrapped_model(wrapper: str, offload: bool) -> None:
    wrapped = WRAPPERS[wrapper](layered())
    ema = fastema.EMA(wrapped, 0.5, offload=offload)
    refresh_(wrapped, 1)
    ema.update()
    state = ema.model_state_dict()
    assert list(state) == list(layered().state_dict())
    assert state.keys() == get_model_state_dict(wrapped).keys()  # in another order
    assert set(ema.shadow) <= set(state)
    bare = layered()
    bare.load_state_dict(state)
    for name, tensor in bare.state_dict().items():
        assert name not in ema.shadow or torch.equal(tensor, ema.shadow[name]), name
    # A state goes from the wrapped model to the unwrapped one and back.
    one, two = fastema.EMA(layered(), 0.5), fastema.EMA(WRAPPERS[wrapper](layered()), 0.5)
    one.load_state_dict(ema.state_dict())
    two.load_state_dict(one.state_dict())
    for other in (one, two):
        assert_bits(dict(other.shadow), snapshot(dict(ema.shadow)))
        assert list(other.model_state_dict()) == list(state)


def test_model_state_dict_keeps_the_name_of_a_child_called_module() -> None:
    model = nn.ModuleDict({"module": layered()})
    ema = fastema.EMA(model, 0.5)
    nn.ModuleDict({"module": layered()}).load_state_dict(ema.model_state_dict())
