"""The low-level interface, on the containers that users have."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import ArgumentError, DTypeError, FastemaError, LayoutError

nn = torch.nn

pytestmark = pytest.mark.torch


def network(seed: int) -> Any:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Linear(7, 4), nn.LayerNorm(4, bias=False))
    net[2].weight.data.uniform_(0.5, 1.5)
    return net.to(memory_format=torch.channels_last)


def averages(net: Any) -> dict[str, Any]:
    return {name: torch.randn_like(p) for name, p in net.named_parameters()}


def snapshot(container: Any) -> dict[str, Any]:
    items = container.named_parameters() if isinstance(container, nn.Module) else container.items()
    return {name: tensor.detach().clone() for name, tensor in items}


def assert_equal(got: Any, want: dict[str, Any]) -> None:
    now = snapshot(got)
    assert list(now) == list(want)
    for name, tensor in want.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor), name


def test_swap_and_copy_exchange_values_and_tied_tensors_count_once() -> None:
    net = network(2)
    avg = averages(net)
    old, weights = snapshot(avg), snapshot(net)
    plan = fastema.Plan(avg, net)
    told = [[one._version for one in side] for side in (avg.values(), net.parameters())]
    plan.swap_()
    assert_equal(avg, weights)
    assert_equal(net, old)
    for side, versions in zip((avg.values(), net.parameters()), told, strict=True):
        assert all(one._version > was for one, was in zip(side, versions, strict=True))
    plan.swap_()
    assert_equal(avg, old)
    plan.copy_()
    assert_equal(avg, weights)
    assert_equal(net, weights)
    one, x = torch.full((5,), 4.0), torch.full((5,), 8.0)
    fastema.Plan({"a": one, "b": one}, {"a": x, "b": x}).lerp_(0.5)
    assert torch.equal(one, torch.full((5,), 6.0))  # tied tensors are averaged once


def set_data(net: Any, one: Callable[[Any], Any]) -> None:
    net[1].weight.data = one(net[1].weight.data)


def assign(net: Any) -> None:
    state = {name: 3 - 2 * value for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


MOVES: dict[str, Callable[[Any], object]] = {
    "data": lambda net: set_data(net, lambda w: w * 2 + 1),
    "bfloat16": lambda net: net.to(torch.bfloat16),
    "assign": assign,
    "module": lambda net: net.__setitem__(1, nn.Linear(7, 4)),
    "parameter": lambda net: setattr(net[1], "weight", nn.Parameter(torch.randn(4, 7))),
    "memory format": lambda net: net.to(memory_format=torch.contiguous_format),
    "same storage": lambda net: set_data(net, lambda w: w.view(-1).view(7, 4).t()),
    "within storage": lambda net: set_data(net, lambda w: torch.cat([torch.randn(3, 7), w])[2:6]),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_plan_follows_tensors_that_move_on_either_side(move: Callable[[Any], None]) -> None:
    net = network(5)
    avg, reversed_avg = averages(net), averages(net)
    plan, reversed_plan = fastema.Plan(avg, net), fastema.Plan(net, reversed_avg)
    plan.lerp_(0.5)
    reversed_plan.lerp_(0.5)
    left = [parameter.data for parameter in net.parameters()]
    move(net)
    gc.collect()
    kept, copies = [tensor.clone() for tensor in left], snapshot(avg)
    fastema.Plan(copies, snapshot(net)).lerp_(0.25)
    plan.lerp_(0.25)
    assert_equal(avg, copies)
    reversed_plan.copy_()
    assert_equal(
        net, {name: reversed_avg[name].to(one.dtype) for name, one in snapshot(net).items()}
    )
    # Abandoned memory must not be written.
    now = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    for tensor, before in zip(left, kept, strict=True):
        assert tensor.untyped_storage().data_ptr() in now or torch.equal(tensor, before)


def test_mismatched_container_is_refused_until_it_fits_again() -> None:
    avg, x = {"a": np.full(4, 2.0)}, {"a": np.full(4, 4.0)}
    plan = fastema.Plan(avg, x)
    good = x["a"]
    for bad in (np.full(5, 4.0), np.full(4, 4), np.full(4, "b")):
        x["a"] = bad
        for _ in range(2):
            with pytest.raises(FastemaError, match="a"):
                plan.lerp_(0.5)
    np.testing.assert_array_equal(avg["a"], np.full(4, 2.0))
    x["a"] = good
    plan.lerp_(0.5)
    np.testing.assert_array_equal(avg["a"], np.full(4, 3.0))


def test_target_that_cannot_be_written_is_refused_by_name_before_any_write() -> None:
    read_only = np.full(3, 2.0)
    read_only.flags.writeable = False
    x = {"a": np.full(3, 4.0), "b": np.full(3, 4.0)}
    for target, message in (
        (read_only, "^b: .*is read-only"),
        (np.lib.stride_tricks.as_strided(np.full(1, 2.0), (3,), (0,)), "^b: several indices"),
    ):
        avg = {"a": np.full(3, 2.0), "b": target}
        with pytest.raises(LayoutError, match=message):
            fastema.lerp_(avg, x, 0.5)
        assert all(tensor.tolist() == [2.0] * 3 for tensor in avg.values())


def test_error_about_a_missing_tensor_names_its_memory_only_if_it_has_some() -> None:
    for shared, hint in (
        (torch.ones(2), "the second, where it is 'a'"),
        (torch.ones(0), "the second$"),
    ):
        with pytest.raises(LayoutError, match=f"'b' is only in {hint}"):
            fastema.Plan({"a": torch.ones_like(shared)}, {"a": shared, "b": shared})


def test_written_tensors_that_overlap_are_refused_by_name() -> None:
    whole = np.arange(4.0)
    views = {"a": whole[:3], "b": whole[1:]}
    apart = {"a": np.zeros(3), "b": np.zeros(3)}
    with pytest.raises(LayoutError, match=r"avg a.*avg b"):
        fastema.Plan(views, apart)
    plan = fastema.Plan(apart, views)
    plan.lerp_(1.0)  # only reads them
    assert [one.tolist() for one in apart.values()] == [[0, 1, 2], [1, 2, 3]]
    with pytest.raises(LayoutError, match=r"x a.*x b"):
        plan.swap_()
    assert whole.tolist() == [0, 1, 2, 3]


def test_new_source_stays_the_source_also_if_it_holds_the_same_tensors() -> None:
    avg, x = [np.zeros(2)], [np.ones(2)]
    plan, new = fastema.Plan(avg, x), list(x)
    plan.lerp_(1.0, new)
    new[0] = np.full(2, 5.0)
    plan.lerp_(1.0)
    np.testing.assert_array_equal(avg[0], new[0])


def test_policy_averages_copies_and_skips_by_pattern() -> None:
    avg = {"w": np.array([1.0, 2.0]), "copied": np.array([3.0]), "n": np.array([4]), "old": {}}
    x = {"w": np.array([3.0, 2.0]), "copied": np.array([5.0]), "n": np.array([6])}
    x["skipped.w"] = np.array([7.0])
    plan = fastema.Plan(avg, x, policy={"skipped.*": "skip", "cop*": "copy", "*": "average"})
    plan.lerp_(0.25)
    assert (avg["w"].tolist(), avg["copied"].tolist(), avg["n"].tolist()) == ([1.5, 2], [5], [6])
    x["n"], x["w"] = np.array([9]), np.array([1.5, 6.0])
    del x["skipped.w"]  # skipped tensors may come and go
    plan.lerp_(0.5)
    assert (avg["w"].tolist(), avg["n"].tolist()) == ([1.5, 4], [9])
    plan.swap_()
    assert (avg["n"].tolist(), x["w"].tolist()) == ([9], [1.5, 4])
    assert plan.calls == 3


def batch_norm_network(seed: int) -> Any:
    """Return a network with BatchNorm, random statistics, and a buffer outside its state dict."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net.register_buffer("mask", torch.randn(2), persistent=False)
    for name, tensor in net.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape) if "num" not in name else torch.tensor(seed))
    return net


@pytest.mark.parametrize("source", ["module", "state_dict"])
def test_plan_without_options_updates_a_target_network_with_batch_norm(source: str) -> None:
    online, target = batch_norm_network(5), batch_norm_network(6).requires_grad_(False)
    mask, before = target.mask.clone(), {n: t.clone() for n, t in target.state_dict().items()}
    x = online if source == "module" else online.state_dict()
    plan = fastema.Plan(target, x)
    plan.lerp_(0.25)
    for name, now in target.state_dict().items():
        want = online.state_dict()[name]
        if name.endswith(("weight", "bias")):
            want = (before[name].double() + 0.25 * (want.double() - before[name].double())).float()
        torch.testing.assert_close(now, want, rtol=1e-6, atol=1e-7)
    assert torch.equal(target.mask, mask)
    fastema.copy_(target, x)
    assert_equal(target.state_dict(), snapshot(online.state_dict()))


def test_frozen_and_buffers_options_of_a_plan_mean_what_they_mean_for_ema() -> None:
    for options in (
        {"buffers": "average"},
        {"buffers": "skip", "frozen": "copy"},
        {"frozen": "skip", "policy": {"*running_var": "average", "1.bias": "skip"}},
    ):
        net = batch_norm_network(7)
        net[0].bias.requires_grad_(False)
        own = {"frozen": "average", **options}  # the default of a plan
        ema = fastema.EMA(net, 0.75, **own)
        avg = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
        plan = fastema.Plan(avg, net, **options)
        for name, tensor in net.state_dict().items():
            tensor.add_(torch.randn(tensor.shape) if "num" not in name else 3)
        before = snapshot(avg)
        ema.update()
        plan.lerp_(0.25)
        for name, tensor in avg.items():
            assert torch.equal(tensor, ema.shadow[name] if name in ema.shadow else before[name])


def test_parameters_of_the_source_are_averaged_into_buffers_of_the_same_name() -> None:
    net, avg = nn.Linear(2, 1), nn.Module()
    for name, tensor in net.named_parameters():
        avg.register_buffer(name, torch.zeros_like(tensor))
    fastema.lerp_(avg, net, 0.25)
    assert torch.equal(avg.weight, net.weight * 0.25)


def test_plan_follows_parameters_that_are_frozen_later() -> None:
    net = batch_norm_network(8)
    avg = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    plan = fastema.Plan(avg, net, frozen="skip")
    plan.lerp_(0.5)
    net[0].requires_grad_(False)
    with torch.no_grad():
        net[0].weight.add_(1)
    before = avg["0.weight"].clone()
    plan.lerp_(0.5)
    assert torch.equal(avg["0.weight"], before)


def test_integers_alone_are_not_averaged() -> None:
    avg, x = np.array([1, 2]), np.array([3, 4])
    with pytest.raises(DTypeError, match=r"'array' is i64[\s\S]*copy_\(\)"):
        fastema.lerp_(avg, x, 0.5)
    assert avg.tolist() == [1, 2]
    fastema.swap_(avg, x)
    assert avg.tolist() == [3, 4]


def test_random_rounding_moves_a_bfloat16_average_by_the_exact_mean() -> None:
    size, steps, weight = 20_000, 200, 1e-3
    x = torch.full((size,), 1.0625)

    def run(**options: Any) -> torch.Tensor:
        avg = torch.ones(size, dtype=torch.bfloat16)
        plan = fastema.Plan({"w": avg}, {"w": x}, **options)
        for _ in range(steps):
            plan.lerp_(weight)
        return avg

    nearest, random = run(), run(rounding="stochastic", seed=3)
    assert torch.all(nearest == 1)
    exact = 1 + 0.0625 * (1 - (1 - weight) ** steps)
    # Each update adds a variance of at most a quarter of the last place squared.
    bound = 6 * (steps / size) ** 0.5 * 2.0**-8
    assert abs(random.double().mean().item() - exact) < bound < (exact - 1) / 2
    assert torch.equal(run(rounding="stochastic", seed=3), random)
    assert not torch.equal(run(rounding="stochastic", seed=4), random)


def test_invalid_options_are_refused() -> None:
    for options, message in (
        ({"rounding": "up"}, "rounding"),
        ({"seed": -1}, "seed"),
        ({"rounding": ["up"]}, "rounding"),
        ({"policy": lambda name, role: "skip"}, "expected a mapping of name patterns to policies"),
        ({"policy": {1: "skip"}}, "expected a mapping of name patterns to policies"),
        ({"policy": {"0": "Skip"}}, r"policy\['0'\]='Skip': expected one of average, copy, skip"),
        ({"policy": {"1": "skip"}}, "no name matches\n.*'1'\nThe model has '0'"),
        ({"frozen": np.array([1, 2])}, "frozen=.*expected one of average, copy, skip"),
        ({"buffers": "none"}, "buffers='none': expected one of average, copy, skip"),
    ):
        with pytest.raises(ArgumentError, match=message):
            fastema.Plan([np.ones(2)], [np.ones(2)], **options)
    for weight in (float("nan"), "0.5", None, torch.ones(2)):
        with pytest.raises(ArgumentError, match=r"weight=.*expected a finite number, 1 - decay"):
            fastema.lerp_([np.ones(2)], [np.ones(2)], weight)  # type: ignore[arg-type]
