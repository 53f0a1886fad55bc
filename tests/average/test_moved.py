"""Weights that moved are found again; the memory they left is neither read nor kept.

Abandoned memory is filled with NaN, so that a stale read shows.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastema
from fastema.errors import LayoutError

from ..support.states import nested
from .kinds import KINDS, VARIED, assert_unchanged, full_state, which
from .weights import Net, assert_bits, net, poison_, snapshot, tensors_of, train_, values

pytestmark = pytest.mark.torch


@pytest.fixture(params=["exchange", "attributes"], autouse=True)
def watch_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch torch tensors through DLPack, or by attributes as in frameworks without it."""
    if request.param == "attributes":
        monkeypatch.setattr("fastema.bridges.torch.exchange_address", lambda tensor: 0)


Move = Callable[[Net], object]


def move_and_poison(model: Net, move: str) -> None:
    """Move a model's tensors, and poison all memory that the model no longer uses."""
    before = [tensor.data for _, tensor in tensors_of(model)]
    returned = MOVES[move](model)
    before += returned if isinstance(returned, list) else []
    used = {tensor.untyped_storage().data_ptr() for _, tensor in tensors_of(model)}
    poison_(one for one in before if one.untyped_storage().data_ptr() not in used)


def assign_data(model: Net) -> None:
    for _, tensor in tensors_of(model):
        tensor.data = tensor.data.clone()


def change_data(path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Move:
    """Return a move that gives one parameter ``change(data)`` as its data."""
    return lambda model: setattr(
        model.get_parameter(path), "data", change(model.get_parameter(path).data)
    )


def set_storages(model: Net) -> None:
    with torch.no_grad():
        for _, tensor in tensors_of(model):
            tensor.set_(tensor.detach().clone())


def convert_with(setting: str) -> Move:
    def move(model: Net) -> None:
        switch = getattr(torch.__future__, f"set_{setting}_module_params_on_conversion")
        switch(True)
        try:
            model._apply(torch.clone)
        finally:
            switch(False)

    return move


def renew(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone())


def replace_tensors(model: Net) -> None:
    model.head.weight = renew(model.head.weight)
    model.scale = renew(model.scale)
    model.norm.running_mean = model.norm.running_mean.clone()
    model.norm.num_batches_tracked = model.norm.num_batches_tracked + 0


def join_storages(model: Net) -> None:
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = piece.view(p.shape)


def slice_within_nan(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((12, 20), float("nan"))
    wide[:, 3:9] = tensor
    return wide[:, 3:9]


def call_functionally(model: Net) -> list[torch.Tensor]:
    model.eval()  # BatchNorm would write the buffers
    swapped = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.func.functional_call(model, swapped, torch.randn(2, 3, 6, 6))
    return list(swapped.values())


def replace_dicts(model: Net) -> None:
    for module in model.modules():
        module._parameters = {
            name: None if one is None else renew(one) for name, one in module._parameters.items()
        }
        module._buffers = {name: one.clone() for name, one in module._buffers.items()}


MOVES: dict[str, Move] = {
    "data assigned": assign_data,
    "data of one": change_data("hidden.bias", torch.clone),
    "storage set": set_storages,
    "applied to each": lambda model: model._apply(torch.clone),
    "overwriting conversion": convert_with("overwrite"),
    "swapping conversion": convert_with("swap"),
    "state dict assigned": lambda model: model.load_state_dict(
        copy.deepcopy(model.state_dict()), assign=True
    ),
    "module replaced": lambda model: setattr(model, "hidden", copy.deepcopy(model.hidden)),
    "tensors replaced": replace_tensors,
    "tensors swapped": lambda model: torch.utils.swap_tensors(
        model.conv.weight, renew(model.conv.weight)
    ),
    "same storage, other memory": lambda model: model.share_memory(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "transposed": change_data("hidden.weight", lambda weight: weight.t().contiguous().t()),
    "a slice": change_data("hidden.weight", slice_within_nan),
    "one big storage": join_storages,
    "called functionally": call_functionally,
    "dicts replaced": replace_dicts,
    "dict of modules replaced": lambda model: setattr(
        model, "_modules", copy.deepcopy(model._modules)
    ),
    "state set": lambda model: model.hidden.__setstate__(vars(copy.deepcopy(model.hidden))),
    "attributes updated": lambda model: vars(model).update(vars(copy.deepcopy(model))),
}
OTHER_STRIDES = {"channels last", "transposed", "a slice"}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", ["EMA", *VARIED])
def test_averages_of_every_kind_follow_weights_that_move(kind: str, move: str) -> None:
    """Updates and swaps equal those of a model that stays in place, to the bit."""
    model, still = net(), net()
    average, twin = KINDS[kind](model), KINDS[kind](still)
    for n in range(1, 10):
        if n in (2, 5):
            move_and_poison(model, move)
        train_(model, [n], average)
        train_(still, [n], twin)
        if n in (3, 6):
            move_and_poison(model, move)
            both = average.swapped(**which(average)), twin.swapped(**which(twin))
            with assert_unchanged(model, average), both[0], both[1]:
                held, want = values(model), values(still)
            for name, tensor in held.items():
                torch.testing.assert_close(tensor, want[name], rtol=2.0**-23, atol=2.0**-24)
        if kind == "SMA" and move in OTHER_STRIDES:
            # Chunks decide when a part of the mean is recomputed: other rounding errors, all below
            # the last place, in means of the same weights.
            state, other = nested(average.state_dict()), nested(twin.state_dict())
            assert_bits(state["ring"][0], snapshot(other["ring"][0]))
        else:
            assert full_state(average) == full_state(twin)


WIDE = {"shadow_dtype": "float64"}
KEPT = [(kind, {}) for kind in ("EMA", *VARIED)] + [
    (kind, WIDE) for kind in ("EMA", "three", "SMA")
]


@pytest.mark.parametrize(("kind", "options"), KEPT, ids=str)
@pytest.mark.parametrize("move", MOVES)
def test_weights_may_move_while_applied(move: str, kind: str, options: dict[str, str]) -> None:
    """Weights and averages keep their values."""
    model = net()
    average = KINDS[kind](model, **options)
    train_(model, range(1, 6), average)
    train_(model, [7])
    held = full_state(average)
    with assert_unchanged(model, average), average.swapped(**which(average)):
        move_and_poison(model, move)
        assert full_state(average) == held
    average.update()


def test_parameter_added_while_applied_is_refused_afterwards() -> None:
    """The end of the block accepts it, to restore the weights; the next update does not."""
    model = net()
    ema = fastema.EMA(model, 0.5)
    raw = snapshot(dict(model.named_parameters()))
    with ema.swapped():
        model.head.weight.data = model.head.weight.data.clone()  # forces a new lookup
        model.head.scale = torch.nn.Parameter(torch.ones(3))
    assert_bits({name: x for name, x in model.named_parameters() if name in raw}, raw)
    for _ in range(2):
        with pytest.raises(LayoutError, match=r"'head.scale' is new in the model"):
            ema.update()
    del model.head.scale
    ema.update()


def exchange_attributes(module: nn.Module) -> None:
    """Give a module the attributes of another one, in another dict."""
    module.__dict__ = dict(vars(net(9)))


@pytest.mark.parametrize("updates", [0, 1, 4])
@pytest.mark.parametrize("kind", ["module", "list", "into"])
def test_exchanged_attributes_of_a_model_are_noticed(kind: str, updates: int) -> None:
    model = net(0)
    other = nn.Linear(3, 2)
    weights = [model, other] if kind == "list" else model
    options = {"into": net(1), "buffers": "copy"} if kind == "into" else {}
    ema = fastema.EMA(weights, decay=0.5, **options)
    train_(model, range(1, 1 + updates), ema)
    old = ema.shadow["scale"].clone()
    exchange_attributes(model)
    ema.update()
    torch.testing.assert_close(ema.shadow["scale"], (old + model.scale.detach()) / 2)
    old = ema.shadow["scale"].clone()
    ema.update()
    torch.testing.assert_close(ema.shadow["scale"], (old + model.scale.detach()) / 2)


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_exchanged_attributes_of_a_target_and_of_plans_are_noticed(calls: int) -> None:
    model, target = net(0), net(1)
    ema = fastema.EMA(model, decay=0.5, into=target, buffers="copy")
    plan = fastema.Plan(target, model)
    lerps: list[Callable[[], None]] = [ema.update, lambda: plan.lerp_(0.5)]
    for lerp in lerps:
        for _ in range(calls):
            lerp()
        for module in (target, model):
            exchange_attributes(module)
            train_(model, [7])
            old = target.scale.detach().clone()
            lerp()
            torch.testing.assert_close(target.scale.detach(), (old + model.scale.detach()) / 2)
