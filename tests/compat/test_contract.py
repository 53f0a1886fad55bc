"""Checks for every drop-in class: numbers, states, moved tensors and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastema.compat.signatures import compare_interfaces
from fastema.errors import FastemaError, LayoutError

from ..support.peers import PEERS, Peer, named_tensors
from .network import Network, bits, move_parameters, save_and_load
from .runs import Run, first_schedule

NEEDS = ("diffusers", "ema_pytorch", "timm", "torch_ema")

pytestmark = pytest.mark.torch

DTYPES = {
    "mixed": None,
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
NARROW = [torch.bfloat16, torch.float16]

SCHEDULES = [
    pytest.param(name, one, id=f"{name}-{one}")
    for name, peer in PEERS.items()
    for one in peer.schedules
]


def for_peers(wanted: Callable[[Peer], bool] = lambda peer: True) -> pytest.MarkDecorator:
    names = [name for name, peer in PEERS.items() if wanted(peer)]
    return pytest.mark.parametrize("peer", names)


CLASSES = {
    "torch_ema": ["ExponentialMovingAverage"],
    "diffusers": ["EMAModel"],
    "swa_utils default": [
        "AveragedModel",
        "get_ema_multi_avg_fn",
        "get_ema_avg_fn",
        "get_swa_multi_avg_fn",
        "get_swa_avg_fn",
        "update_bn",
        "SWALR",
    ],
    "timm ModelEma": ["ModelEma", "ModelEmaV2", "ModelEmaV3"],
    "ema_pytorch EMA": ["EMA", "EMAPytree", "KarrasEMA", "PostHocEMA"],
}


@pytest.mark.parametrize("peer", CLASSES)
def test_signatures_match_the_peers(peer: str) -> None:
    ours, theirs = (PEERS[peer].module(which) for which in ("ours", "theirs"))
    for name in CLASSES[peer]:
        assert compare_interfaces(getattr(theirs, name), getattr(ours, name)) == []
    assert peer != "swa_utils default" or sorted(CLASSES[peer]) == sorted(theirs.__all__)


@for_peers(lambda peer: peer.installed)
def test_attributes_and_state_match_the_peers(peer: str) -> None:
    case, model = PEERS[peer], Network(1, integers=False, tied=False)
    options = first_schedule(case)
    one, other = (case.make(case.module(which), model, **options) for which in ("ours", "theirs"))
    assert isinstance(one, nn.Module) is isinstance(other, nn.Module)
    for name, value in vars(other).items():
        if name.startswith("_") or name == "sync_count":
            continue
        mine = getattr(one, name)
        if callable(value) and callable(mine):  # a function may be a method here
            continue
        assert type(mine) is type(value), name
        if isinstance(value, bool | int | float | str | set | tuple):
            assert mine == value, name
    mine, theirs = case.state(one), case.state(other)
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        assert type(mine[name]) is type(value), name
        if torch.is_tensor(value):
            assert (mine[name].dtype, mine[name].shape) == (value.dtype, value.shape), name
    for name, tensor in case.averages(one, model).items():
        yours = case.averages(other, model)[name]
        assert (tensor.dtype, tensor.stride()) == (yours.dtype, yours.stride())
        assert tensor.requires_grad is yours.requires_grad
        assert tensor.data_ptr() != named_tensors(model)[name].data_ptr() or not tensor.numel()
    for ours, yours in zip(modules(case, one), modules(case, other), strict=True):
        assert ours.training is yours.training


def modules(peer: Peer, average: Any) -> list[nn.Module]:
    return list(peer.averaged_module(average).modules()) if peer.inside else []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("peer", "schedule"), SCHEDULES)
def test_averages_match_the_reference_and_the_rest_is_copied(
    peer: str, schedule: str, dtype: str
) -> None:
    """Tied weights count once; integers, frozen weights and buffers follow the peer."""
    run = Run(peer, Network(3, DTYPES[dtype]), PEERS[peer].schedules[schedule])
    run.train(16)
    run.check()
    if run.peer.inside:
        inside = run.peer.averaged_module(run.average)
        assert inside.head.weight is inside.embed.weight


@pytest.mark.parametrize("narrow", NARROW)
@for_peers(lambda peer: peer.own)
def test_float32_average_of_16_bit_weights_matches_the_reference(
    peer: str, narrow: torch.dtype
) -> None:
    run = Run(peer, Network(7, narrow))
    run.peer.convert(run.average, torch.float32)
    run.restart_reference()
    run.train(12)
    run.check()
    assert run.averages()["wide"].dtype == torch.float32


@pytest.mark.parametrize("narrow", NARROW)
@for_peers(lambda peer: peer.slow is not None)
def test_16_bit_average_moves_where_nearest_rounding_stalls(peer: str, narrow: torch.dtype) -> None:
    """Each step from 1 towards 1.5 is less than half a unit in the last place."""
    size, steps, decay = 4096, 60, 0.9998
    case, model = PEERS[peer], nn.Module()
    model.weight = nn.Parameter(torch.ones(size, dtype=narrow))
    kinds = ("ours", "theirs") if case.installed else ("ours",)
    assert case.slow is not None
    averages = [case.make(case.module(kind), model, **case.slow) for kind in kinds]
    for average in averages:
        case.update(average, model, 0)
    with torch.no_grad():
        model.weight.fill_(1.5)
    for n in range(1, steps + 1):
        for average in averages:
            case.update(average, model, n)
    ours, *theirs = (case.averages(average, model)["weight"] for average in averages)
    rounds_at_random = peer == "timm ModelEmaV3" and narrow == torch.bfloat16
    assert all(torch.all(one == 1).item() is not rounds_at_random for one in theirs)
    # Unbiased rounding keeps the mean within five standard deviations of the exact value: half
    # a unit in the last place for each of `steps` times `size` roundings.
    bound = 5 * torch.finfo(narrow).eps / 2 * (steps / size) ** 0.5
    expected = 1.5 - 0.5 * decay**steps
    assert abs(ours.double().mean().item() - expected) < bound < expected - 1


@pytest.mark.parametrize("dtype", ["mixed", "f32", "f64"])
@pytest.mark.parametrize(
    ("first", "second"), [("ours", "theirs"), ("theirs", "ours"), ("ours", "ours")]
)
@for_peers(lambda peer: peer.installed and peer.exact)
def test_interrupted_run_resumes_in_the_other_library(
    peer: str, first: str, second: str, dtype: str
) -> None:
    run = Run(peer, Network(13, DTYPES[dtype], integers=False, tied=False), side=first)
    run.train(7)
    state = save_and_load(run.peer.state(run.average))
    run.average = run.build(second)
    run.peer.load(run.average, state)
    run.train(7)
    run.check()


@pytest.mark.parametrize("narrow", NARROW)
@for_peers(lambda peer: peer.resumes)
def test_resumed_16_bit_average_is_bit_identical(peer: str, narrow: torch.dtype) -> None:
    found = []
    for stop in (None, 1, 7):
        run = Run(peer, Network(15, narrow))
        run.train(stop or 0)
        if stop:
            state = save_and_load(run.peer.state(run.average))
            run.average = run.build()
            run.peer.load(run.average, state)
        run.train(11 - (stop or 0))
        averages = {name: one for name, one in run.averages().items() if name != "cache"}
        found.append(bits(averages))
    assert all(one == found[0] for one in found)


def fingerprint(average: Any, run: Run) -> Any:
    """Return the bits of all averages, and the counts."""
    names = ("num_updates", "optimization_step", "n_averaged", "steps", "updates")
    counts = [getattr(average, name, None) for name in names]
    averages = bits(run.peer.averages(average, run.model))
    return averages, [None if one is None else int(one) for one in counts]


def assign_clones(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model.head.weight = model.embed.weight


def make_contiguous(model: nn.Module) -> None:
    model.transposed.data = model.transposed.data.contiguous()


def to_float64(model: nn.Module) -> None:
    model.to(torch.float64)


@pytest.mark.parametrize("change", [move_parameters, assign_clones, make_contiguous, to_float64])
@for_peers()
def test_moved_model_tensors_are_located_again(
    peer: str, change: Callable[[nn.Module], None]
) -> None:
    run = Run(peer, Network(19, torch.float32))
    run.train(4)
    change(run.model)
    run.train(4)
    run.check()


def compile_eagerly(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = pytest.mark.parametrize("wrap", [nn.DataParallel, compile_eagerly])


@WRAPPERS
@for_peers(lambda peer: peer.follows and peer.ours not in ("torch_ema", "diffusers"))
def test_wrapped_model_is_averaged_like_the_bare_model(
    peer: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    run = Run(peer, Network(23))
    run.train(2)
    run.train(2, wrapped=wrap(run.model))
    run.train(2)
    run.check()


def drop_bias(model: Any) -> None:
    model.head.bias = None


def add_weight(model: Any) -> None:
    model.register_parameter("further", nn.Parameter(torch.zeros(3)))


def reshape(model: Any) -> None:
    model.wide = nn.Parameter(torch.zeros(3))


def drop_buffer(model: Any) -> None:
    del model.places


CHANGES = {drop_bias: r"head\.bias", add_weight: "further", reshape: "wide", drop_buffer: "places"}
REFUSALS = [
    pytest.param(name, change, named, id=f"{name}-{change.__name__}")
    for name, peer in PEERS.items()
    for change, named in CHANGES.items()
    # Parameter lists and LitEma have no averages of buffers.
    if peer.follows and peer.own and (change is not drop_buffer or peer.inside)
]


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize(("peer", "change", "named"), REFUSALS)
def test_mismatched_model_is_refused_by_name_before_any_write(
    peer: str, change: Callable[[Any], None], named: str, updates: int
) -> None:
    run = Run(peer, Network(31))
    run.train(updates)
    before = fingerprint(run.average, run)
    other = Network(33)
    change(other)
    listed = run.peer.ours in ("torch_ema", "diffusers")
    words = r"parameters were given|4.* \[257\]" if listed else named
    with pytest.raises(LayoutError, match=words) as caught:
        run.peer.update(run.average, other, run.n)
    assert isinstance(caught.value, FastemaError)
    assert fingerprint(run.average, run) == before
    run.train(2)
    run.check()
