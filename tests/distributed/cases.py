"""Functions that the tests run on every rank."""

import copy
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastema
from fastema.bridges.torch import describe
from fastema.errors import ArgumentError, FastemaError, LayoutError, NonFiniteError, StateError

from ..support.states import nested
from .layouts import build, build_net, gather, is_member, meshes, set_weights, weights

MAKE: dict[str, Callable[[Any], Any]] = {
    "f32": lambda model: fastema.EMA(model, decay=0.9),
    "bf16": lambda model: fastema.EMA(model, decay=0.9, shadow_dtype="bfloat16", seed=3),
    "split": lambda model: fastema.EMA(model, decay=0.9, shadow_dtype="bf16+16"),
    "two": lambda model: fastema.EMA(model, decay=[0.9, 0.5], shadow_dtype="float16"),
    "window": lambda model: fastema.SMA(model, window=3, shadow_dtype="bfloat16"),
}


def gather_averages(ema: Any) -> list[dict[str, torch.Tensor]]:
    """Gather all averages; every rank must call this."""
    return [{name: gather(one[name]) for name in one} for one in ema.shadows]


def train_average(kind: str, model: Any, steps: int = 4) -> Any:
    """Return an average after ``steps`` updates."""
    ema = MAKE[kind](model)
    for step in range(steps):
        set_weights(model, weights(step))
        ema.update()
    return ema


def assert_equal(got: list[dict[str, torch.Tensor]], want: list[dict[str, torch.Tensor]]) -> None:
    """Assert that averages are bitwise equal, name by name."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name]), name


def check_updates(layout: str, kind: str) -> None:
    """Check that updates are local and give the bits of a single process."""
    if not is_member(layout):
        return
    model = build(layout)
    ema = MAKE[kind](model)
    with CommDebugMode() as counted:
        for step in range(4):
            set_weights(model, weights(step))
            before = counted.get_total_counts()
            ema.update()
            assert counted.get_total_counts() == before
    for name, tensor in model.named_parameters():
        shown = ema.shadows[0][name]
        assert isinstance(shown, DTensor) == isinstance(tensor, DTensor)
        if isinstance(tensor, DTensor):
            assert (shown.placements, shown.shape) == (tensor.placements, tensor.shape)
    assert_equal(gather_averages(ema), gather_averages(train_average(kind, build_net())))


def check_given(layout: str) -> None:
    """Check that averages in tensors of the user's own, sharded alike, are those in ours."""
    if not is_member(layout):
        return
    model = build(layout)
    named = [*model.named_parameters(), *model.named_buffers()]
    target = {name: one.detach().clone() for name, one in named}
    given = fastema.EMA(model, decay=0.9, seed=3, into=target, buffers="copy")
    owned = fastema.EMA(model, decay=0.9, seed=3)
    for step in range(4):
        set_weights(model, weights(step))
        given.update()
        owned.update()
    assert_equal([{name: gather(target[name]) for name in owned.shadow}], gather_averages(owned))
    assert_equal(gather_averages(given), gather_averages(owned))
    raw = {name: gather(one).clone() for name, one in model.named_parameters()}
    with given.swapped():
        held = gather_averages(owned)[0]
        for name, one in model.named_parameters():
            assert torch.equal(gather(one), held[name]), name
    for name, one in model.named_parameters():
        assert torch.equal(gather(one), raw[name]), name
    assert_equal([{name: gather(target[name]) for name in owned.shadow}], gather_averages(owned))


def check_swap(layout: str, kind: str) -> None:
    """Check that a swapped model computes like a single process and is restored to the bit."""
    if not is_member(layout):
        return
    model, one = build(layout), build_net()
    ema, reference = train_average(kind, model), train_average(kind, one)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    which = {"which": 1} if kind == "two" else {}
    with torch.no_grad():
        raw = gather(model(x))  # may leave gathered weights behind
        with ema.swapped(**which), reference.swapped(**which):
            assert_close(gather(model(x)), one(x), layout)
            state = ema.state_dict()
        torch.testing.assert_close(gather(model(x)), raw, rtol=0, atol=0)
        ema.apply_shadow(**which)
        model(x)
        ema.restore()
        torch.testing.assert_close(gather(model(x)), raw, rtol=0, atol=0)
    reshard(model)
    for name, tensor in one.named_parameters():
        assert torch.equal(gather(dict(model.named_parameters())[name]), tensor), name
    first, *others = nested(state)["shadow"]
    parts = [first, *({**first, **one} for one in others)]  # copied tensors are stored once
    saved = [{n: gather(t) for n, t in part.items()} for part in parts]
    assert_equal(saved, gather_averages(reference))
    assert_equal(gather_averages(ema), gather_averages(reference))
    other = build(layout)
    ema.copy_to(other, **which)
    reference.copy_to(one, **which)
    for name, tensor in other.named_parameters():
        assert torch.equal(gather(tensor), dict(one.named_parameters())[name]), name
    held = ema.model_state_dict(**which)
    for name, tensor in reference.model_state_dict(**which).items():
        assert torch.equal(gather(held[name]), tensor), name


class BadBatch(Exception):
    """Raised inside a forward pass."""


def _raise(*_: Any) -> None:
    raise BadBatch


def check_raise_in_forward(layout: str, where: str, offload: bool) -> None:
    """Check the error, the weights and further training after a forward pass that raises."""
    if not is_member(layout):
        return
    model, one = build(layout), build_net()
    ema = fastema.EMA(model, decay=0.5, offload=offload)
    reference = fastema.EMA(one, decay=0.5)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    pairs = [
        (m, e, torch.optim.SGD(m.parameters(), lr=0.1)) for m, e in ((model, ema), (one, reference))
    ]
    for step in range(3):
        for m, e, optimizer in pairs:
            loss = m(x).square().mean()
            (loss.full_tensor() if isinstance(loss, DTensor) else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            e.update()
        hook = model.get_submodule(where).register_forward_pre_hook(_raise)
        reshard(model)
        raw = {name: gather(t) for name, t in model.named_parameters()}
        with pytest.raises(BadBatch), ema.swapped(), torch.set_grad_enabled(step == 1):
            model(x)
        assert not ema.applied
        for name, tensor in model.named_parameters():  # sharded again
            assert torch.equal(gather(tensor), raw[name]), name
        ema.apply_shadow()
        with pytest.raises(BadBatch), torch.no_grad():
            model(x)
        ema.restore()
        for name, tensor in model.named_parameters():
            assert torch.equal(gather(tensor), raw[name]), name
        hook.remove()
        with ema.swapped(), reference.swapped(), torch.no_grad():
            assert_close(gather(model(x)), one(x), layout)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
    for name in reference.shadow:
        torch.testing.assert_close(
            gather(ema.shadow[name]), reference.shadow[name], rtol=2e-3, atol=2e-3
        )


def assert_close(got: torch.Tensor, want: torch.Tensor, layout: str) -> None:
    tolerance = 0.05 if layout == "mixed" else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, check_dtype=False)


def reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_training(layout: str) -> None:
    """Check an average over training steps: forward, backward, optimizer, update."""
    if not is_member(layout):
        return
    model, one = build(layout), build_net()
    ema, reference = fastema.EMA(model, decay=0.8), fastema.EMA(one, decay=0.8)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    for m, e in ((model, ema), (one, reference)):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.01, foreach=False)
        for step in range(3):
            full_loss = m(x).square().mean()
            if isinstance(full_loss, DTensor):
                full_loss = full_loss.full_tensor()
            full_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            e.update()
            if step == 1:
                with torch.no_grad(), e.swapped():
                    m(x)
    for name in reference.shadow:
        torch.testing.assert_close(
            gather(ema.shadow[name]), reference.shadow[name], rtol=2e-3, atol=2e-3
        )


def check_gathered() -> None:
    """Check that an update of gathered parameters is refused and the message has a remedy."""
    model = build("fsdp 4")
    ema = train_average("f32", model)
    before = gather_averages(ema)
    set_weights(model, weights(9))
    with torch.no_grad():
        model(torch.zeros(1, 6))
    assert not isinstance(model.scale, DTensor)
    message = expect_error(LayoutError, ema.update)
    assert "'scale' is whole on this rank" in message
    assert "reshard()" in message
    assert ema.num_updates == 4
    reshard(model)
    assert_equal(gather_averages(ema), before)
    ema.update()
    assert ema.num_updates == 5
    # An average that is built while parameters are gathered still averages the shards.
    with torch.no_grad():
        model(torch.zeros(1, 6))
    assert isinstance(fastema.EMA(model).shadow["scale"], DTensor)


def expect_error(kind: type[FastemaError], function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def catch_differing_ranks() -> list[str]:
    """Return the error messages for ranks that disagree."""
    rank = dist.get_rank()
    model = build("fsdp 4")
    messages = [
        expect_error(LayoutError, lambda: fastema.EMA(model, decay=0.9 if rank != 2 else 0.99)),
        expect_error(LayoutError, lambda: fastema.EMA(
            model, on_nonfinite="skip" if rank == 2 else "propagate")),
        expect_error(LayoutError, lambda: fastema.EMA(model, policy={"lone.*": "skip"} if rank == 1
                                                else None)),
    ]  # fmt: skip
    ema = fastema.EMA(model)
    for _ in range(3 if rank == 3 else 2):
        ema.update()
    messages.append(expect_error(LayoutError, ema.state_dict))
    both = meshes()["2x2"]
    other = fully_shard(build_net(), mesh=both["dp"])  # each mesh has two of the four ranks
    messages.append(expect_error(LayoutError, lambda: fastema.EMA(other, seed=int(rank == 3)))
                    if rank in (1, 3) else fastema.EMA(other, seed=0) and "")  # fmt: skip
    return messages


def check_nonfinite(layout: str) -> list[str]:
    """Check that a NaN on one rank skips the update on all ranks."""
    if not is_member(layout):
        return []
    model = build(layout)
    skipping = fastema.EMA(model, on_nonfinite="skip")
    raising = fastema.EMA(model, on_nonfinite="raise")
    before = gather_averages(skipping)
    bad = weights(1)
    bad["down.weight"][6, 3] = torch.nan
    set_weights(model, bad)
    with CommDebugMode() as counted:
        skipping.update()
    assert counted.get_total_counts() <= 2
    assert (skipping.num_updates, skipping.num_skipped) == (0, 1)
    message = expect_error(NonFiniteError, raising.update)
    assert_equal(gather_averages(skipping), before)
    assert_equal(gather_averages(raising), before)
    set_weights(model, weights(2))
    skipping.update()
    assert skipping.num_updates == 1
    return [message]


class Experts(nn.Module):
    """A dense layer over all ranks, experts over pairs of ranks, and an expert bias."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 5)
        self.experts = nn.Parameter(torch.randn(4, 5, 5))
        self.register_buffer("expert_bias", torch.zeros(4))


def check_experts() -> None:
    """Check meshes of several sizes, a list of stages, and policies by pattern."""
    torch.manual_seed(4)
    whole = Experts()
    torch.manual_seed(4)
    part = Experts()
    both = meshes()["2x2"]
    part.experts = nn.Parameter(distribute_tensor(part.experts.data, both["tp"], [Shard(0)]))
    part.dense.weight = nn.Parameter(
        distribute_tensor(part.dense.weight.data, both, [Shard(0), Replicate()])
    )
    stage = fully_shard(nn.Linear(3, 3), mesh=meshes()["4"])
    policy = {"*expert_bias": "average", "dense.bias": "skip", "expert*": "copy", "*": "average"}
    ema = fastema.EMA([part, stage], decay=0.5, shadow_dtype="bfloat16", policy=policy)
    one = fastema.EMA(whole, decay=0.5, shadow_dtype="bfloat16", policy=policy)
    assert ema.skipped_names == {"dense.bias"}
    assert ema.averaged_names == {"expert_bias", "dense.weight", "weight", "bias"}
    for step in range(3):
        for model in (part, whole):
            with torch.no_grad():
                generator = torch.Generator().manual_seed(step)
                for tensor in (model.dense.weight, model.experts, model.expert_bias):
                    value = torch.randn(tensor.shape, generator=generator)
                    if isinstance(tensor, DTensor):
                        value = distribute_tensor(
                            value, tensor.device_mesh, tensor.placements, src_data_rank=None
                        )
                    tensor.copy_(value)
        ema.update([part, stage])
        one.update()
    for name in one.shadow:
        assert torch.equal(gather(ema.shadow[name]), one.shadow[name]), name
    ema.update()
    with ema.swapped() as held:
        assert held[0] is part


def catch_refusals(folder: str) -> list[str]:
    """Return the errors for unsupported tensors and calls; none of them writes a file."""
    mesh = meshes()["4"]
    pending = DTensor.from_local(torch.ones(3), mesh, [dist.tensor.Partial()], run_check=False)
    messages = [expect_error(FastemaError, lambda: fastema.EMA({"w": pending}))]
    odd = dist.tensor.placement_types._StridedShard(0, split_factor=2)
    blocks = DTensor.from_local(
        torch.ones(2), mesh, [odd], run_check=False, shape=torch.Size([8]), stride=(1,)
    )
    messages.append(expect_error(FastemaError, lambda: fastema.EMA({"w": blocks})))
    model = build("fsdp 4")
    messages.append(expect_error(FastemaError, fastema.EMA(model).drift))
    other = fastema.EMA(build("tp 4"))
    messages.append(expect_error(LayoutError, other.update, model))
    power = fastema.PowerEMA(model, sigma_rels=(0.1,))
    power.update()
    messages.append(expect_error(FastemaError, fastema.posthoc.save_snapshot, power, folder))
    assert not any(path.suffix == ".safetensors" for path in Path(folder).iterdir())
    return messages


def check_data_parallel() -> None:
    """Check that DDP replicas have equal averages without any collective."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(build_net())
    ema = fastema.EMA(model, decay=0.8)
    for step in range(3):
        set_weights(model.module, weights(step))
        with CommDebugMode() as counted:
            ema.update()
            ema.state_dict()
        assert counted.get_total_counts() == 0
    one = build_net()
    reference = fastema.EMA(one, decay=0.8)
    for step in range(3):
        set_weights(one, weights(step))
        reference.update()
    assert_equal(gather_averages(ema), gather_averages(reference))


def count_followed_updates() -> list[int]:
    """Return the updates of replicas and of shards when single ranks skip theirs."""
    counts = []
    for divide in (lambda model: model, fully_shard):
        model = divide(build_net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ema = fastema.EMA(model, decay=0.8)
        wanted = iter([True, dist.get_rank() != 1, dist.get_rank() != 2, True])
        ema.follow(optimizer, update_if=lambda wanted=wanted: next(wanted))
        for count in (1, 1, 1, 4):
            optimizer.step()
            assert ema.num_updates == count
        counts.append(ema.num_updates)
    return counts


def check_offload(layout: str, kind: str) -> None:
    """Check that an offloaded average of sharded weights equals one on the device, bitwise."""
    if not is_member(layout):
        return
    model = build(layout)
    plain, offloaded = train_average(kind, model), OFFLOADED[kind](build(layout))
    for step in range(4):
        offloaded.wait()
        set_weights(offloaded._module, weights(step))
        offloaded.update()
    which = {"which": 1} if kind == "two" else {}
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    host = offloaded._module
    with torch.no_grad():
        raw = gather(host(x))  # may leave gathered weights behind
        with plain.swapped(**which), offloaded.swapped(**which):
            assert torch.equal(gather(host(x)), gather(model(x)))
        assert torch.equal(gather(host(x)), raw)
        assert torch.equal(gather(model(x)), raw)
    assert_equal(gather_averages(offloaded), gather_averages(plain))
    for one in (model, host):
        reshard(one)
    one, other = build(layout), build(layout)
    offloaded.copy_to(one, **which)
    plain.copy_to(other, **which)
    held = offloaded.model_state_dict(**which)
    for name, tensor in other.state_dict().items():
        assert torch.equal(gather(one.state_dict()[name]), gather(tensor)), name
        assert torch.equal(gather(held[name]), gather(tensor)), name
    state, wanted = offloaded.state_dict(), plain.state_dict()
    plain.load_state_dict(state)
    offloaded.load_state_dict(wanted)
    for average, of in ((plain, model), (offloaded, host)):
        set_weights(of, weights(7))
        average.update()
    assert_equal(gather_averages(offloaded), gather_averages(plain))


OFFLOADED = {
    kind: lambda model, kind=kind: _with(MAKE[kind], model, offload=True)
    for kind in MAKE
    if kind != "window"
}


def _with(make: Callable[[Any], Any], model: Any, **options: Any) -> Any:
    """Build an average with additional options."""
    plain = fastema.EMA
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastema, "EMA", lambda *args, **given: plain(*args, **given, **options))
        return make(model)


def count_skipped_updates() -> list[tuple[int, int]]:
    """Return the update counts when one rank is busy; check that reactions are refused."""
    found = []
    for divide in (lambda model: model, fully_shard):
        model = divide(build_net())
        ema = fastema.EMA(model, decay=0.8, offload="skip")
        late = threading.Event()
        ema._link.delay = lambda _, late=late: late.wait(20)
        for rank in (1, 2):
            set_weights(model, weights(rank))
            late.clear()
            if rank != dist.get_rank():
                late.set()
            ema.update()
            if rank != dist.get_rank():
                ema._drain()
            dist.barrier()
            ema.update()  # skipped on all ranks, since one is behind
            late.set()
            ema._drain()
            dist.barrier()
            ema.update()
            ema._drain()
            dist.barrier()
        found.append((ema.num_updates, ema.offload_stats.steps_skipped))
        reference = fastema.EMA(model, decay=0.8)
        assert ema.shadow.keys() == reference.shadow.keys()
    for reaction in ("skip", "raise"):
        with pytest.raises(ArgumentError, match=f"on_nonfinite='{reaction}' needs a decision"):
            fastema.EMA(fully_shard(build_net()), offload=True, on_nonfinite=reaction)
    return found


def lose_rank() -> list[str]:
    """Kill one rank; return the other rank's errors and how long they took."""
    model = fully_shard(build_net())
    ema = fastema.EMA(model)
    dist.barrier()
    if dist.get_rank():
        os._exit(1)
    found = []
    for call in (ema.state_dict, lambda: fastema.EMA(model)):
        began = time.perf_counter()
        try:
            call()
        except RuntimeError as error:
            found.append(f"{time.perf_counter() - began:.1f} s: {error}")
    ema.update()
    found.append(f"{ema.num_updates}")
    return found


def check_cpu_offload() -> None:
    """Check that shards off the mesh's device stay there, as with CPUOffloadPolicy."""
    mesh = copy.copy(meshes()["4"])
    weight = distribute_tensor(torch.ones(8, 3), meshes()["4"], [Shard(0)], src_data_rank=None)
    mesh._device_type = "meta"
    spec = dist.tensor._dtensor_spec.DTensorSpec(
        mesh, (Shard(0),), tensor_meta=weight._spec.tensor_meta
    )
    weights = DTensor(weight._local_tensor, spec, requires_grad=False)
    found = describe(weights).division.tensor(torch.zeros(2, 3))
    assert found._local_tensor.device.type == "cpu"
    assert (found.shape, found.device_mesh.device_type) == ((8, 3), "meta")


def check_writes(kind: str) -> None:
    """Check that any write to weights that hold the average is detected."""
    model = fully_shard(build_net())
    ema = fastema.EMA(model, decay=0.5)
    set_weights(model, weights(1))
    ema.update()
    block = ema.swapped()
    block.__enter__()
    if kind == "local":
        with torch.no_grad():
            model.up.weight.to_local().add_(1)
    else:
        model(torch.ones(2, 6)).square().mean().backward()
        options = {kind: True} if kind != "plain" else {"foreach": False}
        torch.optim.AdamW(model.parameters(), lr=0.1, **options).step()
    message = expect_error(StateError, block.__exit__, None, None, None)
    assert "'up.weight'" in message
    for name, value in weights(1).items():
        assert torch.equal(gather(dict((*model.named_parameters(), *model.named_buffers()))[name]),
                           value), name  # fmt: skip
    with ema.swapped():
        pass


def catch_list_refusals() -> list[str]:
    """Return the errors of classes that take parameter lists, for sharded parameters."""
    from fastema.compat.diffusers import EMAModel
    from fastema.compat.torch_ema import ExponentialMovingAverage

    model = fully_shard(build_net())
    return [
        expect_error(ArgumentError, lambda: ExponentialMovingAverage(model.parameters(), 0.9)),
        expect_error(ArgumentError, lambda: EMAModel(model.parameters())),
    ]
