"""The peers on a GPU: those of `bench.race.peers`, and peers that only make sense on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bench.gpu.cases import DeviceCase
from bench.gpu.targets import CAPTURED, COMPILED
from bench.race.peers import PEERS, Peer, PeerCalls, Refusal, copy_parameters, setup_ema

_FEW = 160
"""Maximum number of tensors for torch.compile, which takes minutes for a thousand."""


def _captured(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
    """Capture an update in a CUDA graph to replay; the weights must not move."""
    running = setup_ema(capturable=True)(model, decay, dtype)
    # Update once while averages equal weights, which changes nothing: this does the preparations
    # that a capture forbids.
    running.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        running.update()
    return PeerCalls(graph.replay, running.average)


def _compiled(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
    weights = [p.detach() for p in model.parameters()]
    averages = copy_parameters(model, dtype)
    torch._dynamo.reset()  # otherwise the ninth function from this code would run uncompiled

    def loop(averages: list[Tensor], weights: list[Tensor]) -> None:
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight.to(average.dtype), 1 - decay)

    # Dry runs on a CPU use all of the compiler except code generation.
    backend = "inductor" if weights[0].is_cuda else "aot_eager"
    compiled = torch.compile(loop, backend=backend, dynamic=False)
    compiled(averages, weights)
    return PeerCalls(lambda: compiled(averages, weights), lambda: averages)


def _apex(model: nn.Module, decay: float, dtype: torch.dtype) -> PeerCalls:
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    averages = copy_parameters(model, dtype)
    weights = [p.detach() for p in model.parameters()]
    overflow = torch.zeros(1, dtype=torch.int32, device=weights[0].device)

    def update() -> None:
        # out = a * x + b * y, without a check for non-finite values
        lists = [weights, averages, averages]
        multi_tensor_applier(amp_C.multi_tensor_axpby, overflow, lists, 1 - decay, decay, -1)

    return PeerCalls(update, lambda: averages)


_NO_BF16 = Refusal("has no bfloat16")
_ONLY_F32_PRECISION = Refusal("a float32 average: runs beside those of bf16 weights")


def _refused(*mixes: str, why: Refusal) -> Mapping[str, Refusal]:
    return dict.fromkeys(mixes, why)


_HERE: tuple[Peer, ...] = (
    Peer(CAPTURED, _captured, stochastic=True),
    Peer(
        "fastema.EMA, bf16+16",
        setup_ema(shadow_dtype="bf16+16"),
        refusals=_refused("f32/f32", "bf16/bf16", why=_ONLY_F32_PRECISION),
    ),
    Peer(COMPILED, _compiled),
    Peer(
        "apex multi_tensor_axpby",
        _apex,
        module="amp_C",
        refusals=_refused("bf16/f32", "bf16/bf16", why=_NO_BF16),
    ),
)


def _rank(peer: Peer) -> int:
    """Return a sort key that puts fastema first, so that a run cut short still has its entries."""
    return 0 if peer.name.startswith("fastema") else 1


DEVICE_PEERS: tuple[Peer, ...] = tuple(sorted((*PEERS, *_HERE), key=_rank))


def refusals(case: DeviceCase, device: torch.device) -> dict[str, str]:
    """Return the peers that do not take part in a case: name -> reason."""
    reasons = {}
    tensors = len(case.inventory())
    for peer in DEVICE_PEERS:
        if case.mix in peer.refusals:
            reasons[peer.name] = peer.refusals[case.mix].reason
        elif (missing := peer.missing()) is not None:
            reasons[peer.name] = missing
        elif peer.name == CAPTURED and device.type != "cuda":
            reasons[peer.name] = "only a GPU has graphs"
        elif peer.name == COMPILED and tensors > _FEW:
            reasons[peer.name] = f"compiling {tensors} tensors takes minutes"
        elif case.entries and peer.name not in case.entries:
            reasons[peer.name] = "left out of this case, which takes long to set up"
    return reasons
