"""Folders of all parts of an average, on every rank."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastema
from fastema.distributed import consolidate
from fastema.errors import CheckpointError, LayoutError, StateError

from .cases import MAKE, raised, trained
from .layouts import divided, meshes, net


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, as its index says."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    known = json.loads(index.read_text())
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(known["weight_map"].values())):
        part = load_file(folder / file)
        assert all(known["weight_map"][name] == file for name in part)
        found |= part
    assert found.keys() == known["weight_map"].keys()
    total = sum(tensor.nbytes for tensor in found.values())
    assert known["metadata"]["total_size"] == total
    return found


def live(layout: str, kind: str, dtype: torch.dtype, folder: str) -> None:
    """The folder has what one process' ``model_state_dict`` has."""
    ema = trained(kind, divided(layout, dtype))
    want = trained(kind, net(dtype))
    which = {"which": 1} if kind == "two" else {}
    out = consolidate(ema, folder, file_bytes=300, max_bytes=1 << 20, **which)
    got = loaded(out)
    state = want.model_state_dict(**which)
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    dist.barrier()


def saved(kind: str, folder: str, model_too: bool) -> None:
    """A checkpoint for a process without ranks to read."""
    model = divided("fsdp on tp")
    for parameter in model.lone.parameters():
        parameter.requires_grad_(not model_too)
    ema = trained(kind, model)
    state: dict[str, Any] = {"trainer": {"ema": ema.state_dict()}}
    if model_too:
        state["model"] = model.state_dict()
    dcp.save(state, checkpoint_id=folder)


def from_saved(folder: str, out: str) -> None:
    """All ranks read a checkpoint together."""
    consolidate(folder, out, file_bytes=500)
    want = trained("f32", net())
    for name, tensor in loaded(Path(out)).items():
        assert torch.equal(tensor, want.shadow[name]), name
    dist.barrier()


def refused(folder: str) -> None:
    """What is wrong on one rank is an error on all, and leaves nothing."""
    ema = MAKE["f32"](divided("fsdp 4"))
    occupied = Path(folder) / "occupied"
    if not dist.get_rank():
        occupied.mkdir()
        (occupied / "mine").write_text("")
    dist.barrier()
    assert "not empty" in raised(CheckpointError, consolidate, ema, occupied)
    with ema.swapped():
        raised(StateError, consolidate, ema, Path(folder) / "new")
    stage = fully_shard(nn.Linear(3, 3 + dist.get_rank() // 2), mesh=meshes()["2x2"]["tp"])
    message = raised(CheckpointError, consolidate, fastema.EMA(stage), Path(folder) / "new")
    assert "'weight' is f32[4, 3] on rank 2, f32[3, 3] on rank 0" in message
    ema.update()
    if dist.get_rank() == 1:
        ema.update()
    assert "num_updates" in raised(LayoutError, consolidate, ema, Path(folder) / "new")
    here = folder if not dist.get_rank() else f"{folder}/nowhere"
    raised(CheckpointError, consolidate, here, Path(folder) / "new")
    dist.barrier()
    assert {path.name for path in Path(folder).iterdir()} == {"occupied"}
    dist.barrier()


def stages(folder: str) -> None:
    """Stages of a pipeline write one folder."""
    torch.manual_seed(1)
    both = [nn.Linear(5, 5) for _ in range(2)]
    want = {
        f"stage{number}.{name}": tensor.detach().clone()
        for number, layer in enumerate(both)
        for name, tensor in layer.named_parameters()
    }
    stage = dist.get_rank() // 2
    part = nn.ModuleDict({f"stage{stage}": both[stage]})
    fully_shard(both[stage], mesh=meshes()["2x2"]["tp"])
    consolidate(fastema.EMA([part]), folder)
    got = loaded(Path(folder))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    dist.barrier()


def page(text: str, folder: str) -> None:
    """The blocks of a page, in order and in one namespace."""
    os.chdir(folder)
    if not dist.get_rank():
        Path("Llama-3-8B").mkdir()
        Path("Llama-3-8B/config.json").write_text("{}")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    dcp.save({"model": model}, checkpoint_id="pretrained")
    sharded = fully_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    state = {"ema": fastema.EMA(sharded), "model": sharded}
    dcp.save(state, checkpoint_id="step-10000")
    names: dict[str, Any] = {
        "torch": torch,
        "dcp": dcp,
        "fastema": fastema,
        "data": [torch.ones(2, 4)] * 100,
        "decay": 0.999,
        "folder": "saved",
        "pretrained": "pretrained",
        "loss": lambda y: y.square().mean(),
        "evaluate": lambda model: model(torch.ones(1, 4)),
    }

    def fresh(before: nn.Module) -> nn.Module:
        """A page shards its model in several places: each has one of its own."""
        made = fully_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
        names["model"], names["optimizer"] = made, torch.optim.SGD(made.parameters(), lr=1e-3)
        return made

    names["fully_shard"], names["model"] = fresh, model
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, "sharded.md", "exec"), names)
    dist.barrier()
    os.chdir("/")
    written = {path.name for path in Path(folder).iterdir()}
    assert {"average", "average of step 10000", "with frozen weights", "saved"} <= written
    assert names["ema"].averaged_names == {"expert_bias", "text.bias", "text.weight"}
