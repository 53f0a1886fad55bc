"""Measure averages of sharded models: steps, memory, and one folder.

Two ranks on gloo, on this machine: the time of a step with an average and without, the memory of
each rank, and the time to write one folder.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastema
from bench.race.contest import contest
from bench.race.memory import ALLOCATOR, peak_extra_bytes
from bench.race.question import Question, Settings
from bench.race.report import Figure, Row, Rows, number
from fastema.cli.clock import seconds
from fastema.distributed import consolidate

WORLD = 2
BATCH = 16
MB = 1e6


class MlpBlock(nn.Module):
    """Two linear layers, split column-wise and row-wise by tensor parallel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + y


def _model(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(MlpBlock(width) for _ in range(depth)))


def _fsdp(model: nn.Sequential) -> nn.Module:
    over = init_device_mesh("cpu", (WORLD,))
    for block in model:
        fully_shard(block, mesh=over)
    fully_shard(model, mesh=over)
    return model


def _tp(model: nn.Sequential) -> nn.Module:
    over = init_device_mesh("cpu", (WORLD,))
    for block in model:
        parallelize_module(block, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def _whole(model: nn.Sequential) -> nn.Module:
    return model


LAYOUTS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "whole on each rank": _whole,
    "FSDP2": _fsdp,
    "tensor parallel": _tp,
}


def _local_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return the local tensors of this rank's parameters."""
    found = [one.detach() for one in model.parameters()]
    return [getattr(one, "_local_tensor", one) for one in found]


class Copies:
    """An average of each local shard by foreach, like torchtitan's contributed average."""

    def __init__(self, model: nn.Module) -> None:
        self._local_tensors = _local_tensors(model)
        self._shadow = [one.clone() for one in self._local_tensors]

    def update(self) -> None:
        """Update the average from the weights."""
        torch._foreach_lerp_(self._shadow, self._local_tensors, 0.001)

    def swap(self) -> None:
        """Put the average into the model, and restore the weights."""
        backup = [one.clone() for one in self._local_tensors]
        torch._foreach_copy_(self._local_tensors, self._shadow)
        torch._foreach_copy_(self._local_tensors, backup)


class Gathered:
    """Whole averages on each rank, of gathered parameters, like callbacks unaware of shards."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shadow = [one.detach().full_tensor() for one in model.parameters()]

    def update(self) -> None:
        """Update the average from the weights."""
        whole = [one.detach().full_tensor() for one in self._model.parameters()]
        torch._foreach_lerp_(self._shadow, whole, 0.001)


def _trim_memory() -> None:
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _peak(call: Callable[[], object]) -> float:
    _trim_memory()
    dist.barrier()
    return peak_extra_bytes(call) / MB


def _steps(layout: str, width: int, depth: int, rounds: int) -> Row:
    """Time training steps and the updates after them, for both averages in turn."""
    model = LAYOUTS[layout](_model(width, depth))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
    x = torch.randn(BATCH, width)
    averages = {"fastema": fastema.EMA(model, 0.999), "copies": Copies(model)}

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for one in averages.values():
        step()
        one.update()
    times: dict[str, list[float]] = {name: [] for name in ("step", *averages)}
    for _ in range(rounds):
        for name, one in averages.items():
            dist.barrier()
            times["step"].append(seconds(step))
            times[name].append(seconds(one.update))
    with CommDebugMode() as counted:
        averages["fastema"].update()
        collectives = counted.get_total_counts()
    figures = {
        "rank_elements": sum(part.numel() for part in _local_tensors(model)),
        **{f"{name}_ms": median(found) * 1e3 for name, found in times.items()},
        "collectives": collectives,
    }
    return Row("A step of training, and an update after it", layout, figures)


def _memory(width: int, depth: int, folder: Path) -> Iterator[Row]:
    """Yield the peak memory of a rank in each call, beyond the memory before the call."""
    model = _fsdp(_model(width, depth))
    mine = sum(part.nbytes for part in _local_tensors(model)) / MB

    def row(name: str, call: str, function: Callable[[], object]) -> Row:
        peak = _peak(function)
        figures = {"mb": peak, "shards": peak / mine}
        title = "Memory of a rank beyond what it held, at its peak"
        return Row(title, f"{name}: {call}", figures)

    kept: list[Any] = []
    yield row("fastema", "build", lambda: kept.append(fastema.EMA(model, 0.999)))
    (ema,) = kept

    def swap() -> None:
        with ema.swapped():
            pass

    ema.update()
    swap()
    dcp.save({"ema": ema}, checkpoint_id=folder / "first")
    consolidate(ema, folder / "second")
    for call, function in {
        "update": ema.update,
        "swap and back": swap,
        "state_dict": ema.state_dict,
        "save by DCP": lambda: dcp.save({"ema": ema}, checkpoint_id=folder / "third"),
        "consolidate": lambda: consolidate(ema, folder / "fourth"),
    }.items():
        yield row("fastema", call, function)
    yield row("copies", "build", lambda: kept.append(Copies(model)))
    kept[1].update()
    yield row("copies", "update", kept[1].update)
    yield row("copies", "swap and back", kept[1].swap)
    yield row("gathered", "build", lambda: kept.append(Gathered(model)))
    yield row("gathered", "update", kept[2].update)


def _updates(width: int, depth: int, quick: bool) -> Iterator[Row]:
    """Race updates of shards against plain tensors of the same sizes, to show the index's cost."""
    for layout in ("FSDP2", "tensor parallel"):
        model = LAYOUTS[layout](_model(width, depth)).to(torch.bfloat16)
        plain = [part.clone() for part in _local_tensors(model)]
        for dtype in ("bfloat16", "float32"):
            jobs = {
                "plain tensors of the same sizes": fastema.EMA(
                    plain, 0.999, shadow_dtype=dtype
                ).update,
                "parts": fastema.EMA(model, 0.999, shadow_dtype=dtype).update,
            }
            for job in jobs.values():
                job()
            dist.barrier()
            if not dist.get_rank():  # one rank only: two would share the memory bandwidth
                yield from contest(
                    f"An update of bfloat16 weights, average {dtype}: {layout}",
                    jobs,
                    rounds=20 if quick else 100,
                    budget_s=5 if quick else 20,
                )
            dist.barrier()


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        handle = os.open(target / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _folders(width: int, depth: int, folder: Path, rounds: int) -> Iterator[Row]:
    """Time writing one folder and copying its files, in turn, synchronized to disk."""
    model = _fsdp(_model(width, depth))
    ema = fastema.EMA(model, 0.999)
    dcp.save({"ema": ema}, checkpoint_id=folder / "saved")
    ways: dict[str, Callable[[Path], object]] = {
        "consolidate, of an average": lambda target: consolidate(ema, target),
        "consolidate, of a DCP folder": lambda target: consolidate(folder / "saved", target),
        "copy of the files": lambda target: (
            None if dist.get_rank() else _copy_files(folder / "kept", target)
        ),
    }
    consolidate(ema, folder / "kept")
    size = sum(file.stat().st_size for file in (folder / "kept").iterdir())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            target = folder / f"{name} {turn}"
            dist.barrier()
            began = time.perf_counter()
            way(target)
            dist.barrier()
            times[name].append(time.perf_counter() - began)
            if not dist.get_rank():
                shutil.rmtree(target)
            dist.barrier()
    copy = median(times["copy of the files"])
    for name, found in times.items():
        typical = median(found)
        figures = {
            "mb": size / MB,
            "ms": typical * 1e3,
            "mb_per_s": size / MB / typical,
            "rate_to_copy": copy / typical,
        }
        yield Row("One folder, synchronised to the disk", name, figures)


def _staging(width: int, depth: int, folder: Path) -> Iterator[Row]:
    """Yield how long an asynchronous save blocks training."""
    model = _fsdp(_model(width, depth))
    ema = fastema.EMA(model, 0.999)
    found = []
    for turn in range(4):
        dist.barrier()
        began = time.perf_counter()
        pending = dcp.async_save({"ema": ema}, checkpoint_id=folder / str(turn))
        found.append(time.perf_counter() - began)
        pending.result()
    title = "How long a save keeps the training waiting"
    yield Row(title, "async_save, until updates may go on", {"ms": median(found[1:]) * 1e3})
    yield Row(title, "of that, the copy of the average", {"ms": seconds(ema.state_dict) * 1e3})


def _rank(rank: int, store: str, folder: str, quick: bool, pipe: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    fastema.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    width, depth, rounds = (512, 4, 10) if quick else (2048, 8, 15)
    where = Path(folder)
    found = [
        *(_steps(layout, width, depth, rounds) for layout in LAYOUTS),
        *_updates(width, depth, quick),
        *_memory(width, depth, where),
        *_folders(width, depth, where, 3 if quick else 7),
        *_staging(width, depth, where / "staged"),
    ]
    pipe.send(found)
    dist.barrier()
    dist.destroy_process_group()


def rows(settings: Settings) -> Rows:
    """Run two ranks, and return the rows of the first."""
    os.environ.update(ALLOCATOR)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(WORLD)]
        processes = [
            context.Process(
                target=_rank, args=(rank, f"{folder}/store", folder, settings.quick, pipe[1])
            )
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        results: list[list[Row]] = []
        for (receiver, sender), process in zip(pipes, processes, strict=True):
            sender.close()
            results.append(receiver.recv())
            process.join()
    return results[0]


METHOD = """\
Two ranks on gloo over the loopback of one machine, one thread each; medians, entries in turn. 67
million parameters in float32, 2 million in quick mode. *Copies* clones each rank's part and
averages with `torch._foreach_lerp_`, as trainers do by hand; *gathered* keeps whole averages on
each rank, of parameters gathered at each update."""

QUESTION = Question(
    "Averages of models that are divided among ranks",
    METHOD,
    rows,
    packages=("torch", "numpy", "numba"),
    figures={
        "rank_elements": Figure("on a rank", lambda count: f"{count / 1e6:.1f} M"),
        "step_ms": Figure("step, ms", number),
        "fastema_ms": Figure("fastema, ms", number),
        "copies_ms": Figure("copies, ms", number),
        "collectives": Figure("collectives", str),
        "mb": Figure("MB", number),
        "shards": Figure("shards of float32", "{:.2f}".format),
        "mb_per_s": Figure("MB/s", number),
        "rate_to_copy": Figure("rate / copying", "{:.2f}".format),
        "ratio": Figure("time / plain", "{:.3f}".format),
    },
)
