"""Sharded training on two ranks: each rank averages its shards; one folder is written at the end.

pip install fastema torch scikit-learn
torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from digits import TRAINED, accuracy, load, network, report
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import fastema
from fastema.checkpoint import open_checkpoint
from fastema.distributed import consolidate


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    images, digits, labels = load()
    model = network()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    ema = fastema.EMA(model, decay=0.998)  # averages DTensors; offload=True keeps them on the host
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for _ in range(300):
        batch = torch.randint(TRAINED, (128,))[rank::ranks]  # every rank draws the same numbers
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()  # no collective

    trained = accuracy(model, images, digits)
    with ema.swapped():
        averaged = accuracy(model, images, digits)
    shared = [tempfile.mkdtemp()] if rank == 0 else [""]
    dist.broadcast_object_list(shared)
    consolidate(ema, Path(shared[0]) / "average")
    if rank == 0:
        report(trained, averaged)
        found = open_checkpoint(Path(shared[0]) / "average")
        print(f"one folder: {len(found.tensors)} tensors, {found.format}")
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.2)  # FSDP keeps Gloo's threads alive: one that frees a tensor at exit would abort


if __name__ == "__main__":
    main()
