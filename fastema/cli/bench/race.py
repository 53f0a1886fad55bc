"""Time ways to update an average, each interleaved with fastema."""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

import fastema
from fastema.cli.bench.shapes import Shapes
from fastema.cli.clock import interleave, seconds
from fastema.errors import ArgumentError

DECAY = 0.999
MOST_ROUNDS = 100_000


class Result(NamedTuple):
    """The timing of one way; if it does not run, ``ms`` is None and ``why`` has the reason."""

    name: str
    ms: float | None = None
    ratio: float | None = None
    gbps: float | None = None
    share: float | None = None
    why: str = ""


Job = Callable[[], object]


class Contender(NamedTuple):
    """A way to update an average, set up for one model."""

    update: Job
    averages: Callable[[], Iterable[torch.Tensor]]  # in the order of the model's parameters


Setup = Callable[[nn.Module, torch.dtype], Contender]


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [one.detach() for one in model.parameters()]


def _setup_fastema(model: nn.Module, dtype: torch.dtype) -> Contender:
    ema = fastema.EMA(model, DECAY, shadow_dtype=dtype)
    return Contender(ema.update, ema.shadow.values)


def _loop(model: nn.Module, dtype: torch.dtype) -> Contender:
    pairs = [(one.to(dtype, copy=True), one) for one in _weights(model)]

    def update() -> None:
        for average, weight in pairs:
            average.mul_(DECAY).add_(weight, alpha=1 - DECAY)

    return Contender(update, lambda: [average for average, _ in pairs])


def _foreach(model: nn.Module, dtype: torch.dtype) -> Contender:
    weights = _weights(model)
    averages = [one.to(dtype, copy=True) for one in weights]

    def update() -> None:
        torch._foreach_lerp_(averages, [one.to(dtype) for one in weights], 1 - DECAY)

    return Contender(update, lambda: averages)


def _averaged_model(model: nn.Module, dtype: torch.dtype) -> Contender:
    swa = torch.optim.swa_utils
    averaged = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(DECAY))
    averaged.module.to(dtype)
    averaged.update_parameters(model)  # the first call only copies
    return Contender(lambda: averaged.update_parameters(model), averaged.module.parameters)


def _torch_ema(model: nn.Module, dtype: torch.dtype) -> Contender:
    parameters = list(model.parameters())
    ema = import_module("torch_ema").ExponentialMovingAverage(parameters, DECAY, False)
    ema.to(dtype=dtype)
    return Contender(lambda: ema.update(parameters), lambda: ema.shadow_params)


def _timm(model: nn.Module, dtype: torch.dtype) -> Contender:
    ema = import_module("timm.utils").ModelEmaV3(model, decay=DECAY, dtype=dtype)
    return Contender(lambda: ema.update(model), ema.module.parameters)


def _ema_pytorch(model: nn.Module, dtype: torch.dtype) -> Contender:
    ema = import_module("ema_pytorch").EMA(
        model,
        ema_model=copy.deepcopy(model).to(dtype),
        beta=DECAY,
        min_value=DECAY,
        update_every=1,
        update_after_step=0,
        coerce_dtype=True,
    )
    ema.update()  # the first call only copies
    return Contender(ema.update, ema.ema_model.parameters)


def _diffusers(model: nn.Module, dtype: torch.dtype) -> Contender:
    parameters = list(model.parameters())
    ema = import_module("diffusers.training_utils").EMAModel(
        parameters, decay=DECAY, min_decay=DECAY, foreach=True
    )
    ema.to(dtype=dtype)
    ema.step(parameters)  # the first call only copies
    return Contender(lambda: ema.step(parameters), lambda: ema.shadow_params)


WAYS: dict[str, tuple[str, Setup]] = {
    "torch mul_/add_ loop": ("torch", _loop),
    "torch._foreach_lerp_": ("torch", _foreach),
    "torch AveragedModel": ("torch", _averaged_model),
    "torch_ema": ("torch_ema", _torch_ema),
    "ema_pytorch": ("ema_pytorch", _ema_pytorch),
    "timm ModelEmaV3": ("timm", _timm),
    "diffusers EMAModel": ("diffusers", _diffusers),
}
"""Name -> (the package that the way needs, the function that sets it up)."""


def time_contenders(shapes: Shapes, args: argparse.Namespace) -> Iterator[Result]:
    """Yield the timing of fastema, then of each other way; each is interleaved with fastema."""
    dtype, average = getattr(torch, args.dtype), getattr(torch, args.average)
    try:
        made = [torch.randn(shape, dtype=dtype, device=args.device) for shape in shapes]
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise ArgumentError(f"--device {args.device}: {reason}") from None
    model = nn.ParameterList(made)
    each = dtype.itemsize + 2 * average.itemsize
    nbytes = each * sum(one.numel() for one in made)
    ours = _setup_fastema(model, average).update
    limit = _limit(nbytes) if args.device == "cpu" else None
    timed = _race({"ours": ours, **({"limit": limit} if limit else {})}, args)
    plain, same = timed.get("limit"), timed["ours"]
    share = plain and plain / same
    yield Result("fastema.EMA", same * 1e3, 1.0, nbytes / same / 1e9, share)
    for name, (package, setup) in WAYS.items():
        if find_spec(package) is None:
            yield Result(name, why=f"{package} is not installed")
            continue
        try:
            theirs = setup(model, average).update
            timed = _race({"ours": ours, "theirs": theirs}, args)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")[:60]
            yield Result(name, why=f"raises {type(error).__name__}: {reason}")
        else:
            same, other = timed["ours"], timed["theirs"]
            share = plain and plain / other
            yield Result(name, other * 1e3, other / same, nbytes / other / 1e9, share)
        theirs = None  # type: ignore[assignment]
        gc.collect()  # free memory for the next way


def _limit(nbytes: int) -> Job:
    """Return the faster of two kernels that only move `nbytes` bytes."""
    from fastema.engine.limit import ReadReadWrite, StreamCopy

    kernels: dict[str, Job] = {"0": ReadReadWrite(nbytes), "1": StreamCopy(nbytes)}
    times = interleave(kernels, 3)
    return kernels[min(kernels, key=lambda name: median(times[name]))]


def _race(jobs: dict[str, Job], args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of each job, called in turn."""
    on_gpu = torch.device(args.device).type == "cuda"

    def time_of(_: str, job: Job) -> float:
        def finish() -> None:
            job()
            if on_gpu:
                torch.cuda.synchronize(args.device)

        return seconds(finish)

    times = interleave(jobs, MOST_ROUNDS, budget_s=args.seconds, time_of=time_of)
    return {name: median(found) for name, found in times.items()}
