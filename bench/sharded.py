"""``python -m bench.sharded [--quick]``: averages of models that are divided among ranks.

Two ranks on gloo, on this machine: what a step costs with an average and without, what memory each
rank needs, and how quickly one folder is written.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
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
from bench import machine, report
from bench.clock import interleave
from bench.memory import ALLOCATOR, peak_extra_bytes
from fastema.distributed import consolidate

WORLD = 2
BATCH = 16
MB = 1e6


class Block(nn.Module):
    """Two layers, as tensor parallel divides them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + y


def _model(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(depth)))


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


def _parts(model: nn.Module) -> list[torch.Tensor]:
    """This rank's memory of the parameters."""
    found = [one.detach() for one in model.parameters()]
    return [getattr(one, "_local_tensor", one) for one in found]


class Copies:
    """A copy of each part and a foreach: what torchtitan's contributed average does."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = _parts(model)
        self._shadow = [one.clone() for one in self._parts]

    def update(self) -> None:
        """Average."""
        torch._foreach_lerp_(self._shadow, self._parts, 0.001)

    def swap(self) -> None:
        """Put the average into the model, and the weights back."""
        backup = [one.clone() for one in self._parts]
        torch._foreach_copy_(self._parts, self._shadow)
        torch._foreach_copy_(self._parts, backup)


class Gathered:
    """Whole averages on each rank, of gathered parameters: what callbacks without shards do."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shadow = [one.detach().full_tensor() for one in model.parameters()]

    def update(self) -> None:
        """Average."""
        whole = [one.detach().full_tensor() for one in self._model.parameters()]
        torch._foreach_lerp_(self._shadow, whole, 0.001)


def _trimmed() -> None:
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _peak(call: Callable[[], object]) -> float:
    _trimmed()
    dist.barrier()
    return peak_extra_bytes(call) / MB


def _steps(layout: str, width: int, depth: int, rounds: int) -> dict[str, Any]:
    """A training step with the average and without, in turn."""
    model = LAYOUTS[layout](_model(width, depth))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
    x = torch.randn(BATCH, width)
    averages = {"fastema": fastema.EMA(model, 0.999), "copies": Copies(model)}

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    for one in averages.values():
        step()
        one.update()
    times: dict[str, list[float]] = {name: [] for name in ("step", *averages)}
    collectives = 0
    for _ in range(rounds):
        for name, one in averages.items():
            dist.barrier()
            times["step"].append(timed(step))
            times[name].append(timed(one.update))
    with CommDebugMode() as counted:
        averages["fastema"].update()
        collectives = counted.get_total_counts()
    return {
        "layout": layout,
        "rank_elements": sum(part.numel() for part in _parts(model)),
        "collectives": collectives,
        **{f"{name}_ms": median(found) * 1e3 for name, found in times.items()},
    }


_Add = Callable[[str, str, Callable[[], object]], None]


def _of_fastema(model: nn.Module, folder: Path, add: _Add) -> None:
    kept: list[Any] = []
    add("fastema", "build", lambda: kept.append(fastema.EMA(model, 0.999)))
    (ema,) = kept

    def swap() -> None:
        with ema.swapped():
            pass

    ema.update()
    swap()
    dcp.save({"ema": ema}, checkpoint_id=folder / "first")
    consolidate(ema, folder / "second")
    add("fastema", "update", ema.update)
    add("fastema", "swap and back", swap)
    add("fastema", "state_dict", ema.state_dict)
    add("fastema", "save by DCP", lambda: dcp.save({"ema": ema}, checkpoint_id=folder / "third"))
    add("fastema", "consolidate", lambda: consolidate(ema, folder / "fourth"))


def _of_copies(model: nn.Module, add: _Add) -> None:
    kept: list[Any] = []
    add("copies", "build", lambda: kept.append(Copies(model)))
    kept[0].update()
    add("copies", "update", kept[0].update)
    add("copies", "swap and back", kept[0].swap)


def _memory(width: int, depth: int, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of one rank, beyond what it held before each call."""
    model = _fsdp(_model(width, depth))
    mine = sum(part.nbytes for part in _parts(model)) / MB
    rows: list[dict[str, Any]] = []

    def add(name: str, call: str, function: Callable[[], object]) -> None:
        rows.append({"entry": name, "call": call, "mb": _peak(function), "shard_mb": mine})

    _of_fastema(model, folder, add)
    _of_copies(model, add)
    kept: list[Any] = []
    add("gathered", "build", lambda: kept.append(Gathered(model)))
    add("gathered", "update", kept[0].update)
    return rows


def _updates(width: int, depth: int, quick: bool) -> list[dict[str, Any]]:
    """Updates of parts against those of plain tensors of the same sizes: what the index costs."""
    rows = []
    for layout in ("FSDP2", "tensor parallel"):
        model = LAYOUTS[layout](_model(width, depth)).to(torch.bfloat16)
        plain = [part.clone() for part in _parts(model)]
        for dtype in ("bfloat16", "float32"):
            jobs = {
                "parts": fastema.EMA(model, 0.999, shadow_dtype=dtype).update,
                "plain tensors": fastema.EMA(plain, 0.999, shadow_dtype=dtype).update,
            }
            for job in jobs.values():
                job()
            times: dict[str, list[float]] = {}
            dist.barrier()
            if not dist.get_rank():  # alone: two ranks share the memory's bandwidth
                times = interleave(jobs, rounds=20 if quick else 100, budget_s=5 if quick else 20)
            dist.barrier()
            rows.append(
                {
                    "layout": layout,
                    "dtype": dtype,
                    **{f"{name}_ms": median(found) * 1e3 for name, found in times.items()},
                }
            )
    return rows


def _copied(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        handle = os.open(target / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _folders(width: int, depth: int, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Writing one folder, and copying it, in turn; files that are synchronised to the disk."""
    model = _fsdp(_model(width, depth))
    ema = fastema.EMA(model, 0.999)
    dcp.save({"ema": ema}, checkpoint_id=folder / "saved")
    ways: dict[str, Callable[[Path], object]] = {
        "consolidate, of an average": lambda target: consolidate(ema, target),
        "consolidate, of a DCP folder": lambda target: consolidate(folder / "saved", target),
        "copy of the files": lambda target: (
            None if dist.get_rank() else _copied(folder / "kept", target)
        ),
    }
    consolidate(ema, folder / "kept")
    size = sum(file.stat().st_size for file in (folder / "kept").iterdir())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            target = folder / f"{name} {number}"
            dist.barrier()
            began = time.perf_counter()
            way(target)
            dist.barrier()
            times[name].append(time.perf_counter() - began)
            if not dist.get_rank():
                shutil.rmtree(target)
            dist.barrier()
    copy = median(times["copy of the files"])
    return [
        {
            "entry": name,
            "mb": size / MB,
            "median_s": median(found),
            "rate_to_copy": copy / median(found),
        }
        for name, found in times.items()
    ]


def _staging(width: int, depth: int, folder: Path) -> dict[str, float]:
    """How long a save keeps the training waiting."""
    model = _fsdp(_model(width, depth))
    ema = fastema.EMA(model, 0.999)
    found = []
    for number in range(4):
        dist.barrier()
        began = time.perf_counter()
        pending = dcp.async_save({"ema": ema}, checkpoint_id=folder / str(number))
        found.append(time.perf_counter() - began)
        pending.result()
    began = time.perf_counter()
    ema.state_dict()
    return {
        "async_save_ms": median(found[1:]) * 1e3,
        "copy_ms": (time.perf_counter() - began) * 1e3,
    }


def _rank(rank: int, store: str, folder: str, quick: bool, pipe: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    fastema.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    width, depth, rounds = (512, 4, 10) if quick else (2048, 8, 15)
    where = Path(folder)
    result: dict[str, Any] = {
        "parameters": sum(one.numel() for one in _model(width, depth).parameters()),
        "steps": [_steps(layout, width, depth, rounds) for layout in LAYOUTS],
        "updates": _updates(width, depth, quick),
        "memory": _memory(width, depth, where),
        "staging": _staging(width, depth, where / "staged"),
        "folders": _folders(width, depth, where, 3 if quick else 7),
    }
    pipe.send(result)
    dist.barrier()
    dist.destroy_process_group()


def measured(quick: bool) -> dict[str, Any]:
    """Run two ranks; return what the first one measured."""
    os.environ.update(ALLOCATOR)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(WORLD)]
        processes = [
            context.Process(
                target=_rank, args=(rank, f"{folder}/store", folder, quick, pipes[rank][1])
            )
            for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
        results = []
        for (receiver, sender), process in zip(pipes, processes, strict=True):
            sender.close()
            results.append(receiver.recv())
            process.join()
    return json.loads(json.dumps(results[0]))  # type: ignore[no-any-return]


_METHOD = """\
Two ranks on gloo over the loopback of one machine, one thread each; medians, entries in turn.
*Copies* clones each rank's part and averages with `torch._foreach_lerp_`, as trainers do by hand;
*gathered* keeps whole averages on each rank, of parameters gathered at each update."""


def markdown(result: dict[str, Any]) -> str:
    """Return all tables of a result."""
    number = report.number
    found = result["measured"]
    steps = [
        [
            row["layout"],
            f"{row['rank_elements'] / 1e6:.1f} M",
            number(row["step_ms"]),
            number(row["fastema_ms"]),
            number(row["copies_ms"]),
            str(row["collectives"]),
        ]
        for row in found["steps"]
    ]
    updates = [
        [
            row["layout"],
            row["dtype"],
            number(row["parts_ms"]),
            number(row["plain tensors_ms"]),
            f"{row['parts_ms'] / row['plain tensors_ms']:.3f}",
        ]
        for row in found["updates"]
    ]
    memory = [
        [row["entry"], row["call"], number(row["mb"]), f"{row['mb'] / row['shard_mb']:.2f}"]
        for row in found["memory"]
    ]
    folders = [
        [
            row["entry"],
            number(row["mb"]),
            number(row["median_s"] * 1e3),
            number(row["mb"] / row["median_s"]),
            f"{row['rate_to_copy']:.2f}",
        ]
        for row in found["folders"]
    ]
    staging = found["staging"]
    parts = [
        "# Averages of models that are divided among ranks",
        report.provenance(result["header"]),
        _METHOD,
        f"{found['parameters'] / 1e6:.0f} million parameters in float32.",
        "## A step of training, and an update after it",
        report.aligned(
            ["", "on a rank", "step, ms", "fastema, ms", "copies, ms", "collectives"], steps
        ),
        "## Parts against plain tensors of the same sizes, bfloat16 weights",
        report.aligned(["", "average", "parts, ms", "plain, ms", "ratio"], updates),
        "## Memory of a rank beyond what it held, at its peak",
        report.aligned(["", "call", "MB", "shards of float32"], memory),
        "## One folder, synchronised to the disk",
        report.aligned(["", "MB", "ms", "MB/s", "rate / copying"], folders),
        f"`async_save` returns after {number(staging['async_save_ms'])} ms, of which the copy of "
        f"the average takes {number(staging['copy_ms'])} ms; updates may go on from there.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sharded", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, half a minute")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="DIR")
    options = parser.parse_args()
    command = "python -m bench.sharded" + (" --quick" if options.quick else "")
    header = machine.header(command, "sharded", ("torch", "numpy", "numba"))
    result = {"header": header, "measured": measured(options.quick)}
    text = markdown(result)
    print(text)
    report.store(options.out, "sharded-quick" if options.quick else "sharded", result, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
