"""Consolidation of sharded averages into folders, as run on every rank."""

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

from .cases import MAKE, expect_error, train_average
from .layouts import build, build_net, meshes


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of a Hugging Face folder and check its index."""
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


def check_live(layout: str, kind: str, dtype: torch.dtype, folder: str) -> None:
    """Check that a folder equals the ``model_state_dict`` of a single process."""
    ema = train_average(kind, build(layout, dtype))
    want = train_average(kind, build_net(dtype))
    which = {"which": 1} if kind == "two" else {}
    out = consolidate(ema, folder, file_bytes=300, max_bytes=1 << 20, **which)
    got = load_all(out)
    state = want.model_state_dict(**which)
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name
    dist.barrier()


def save_checkpoint(kind: str, folder: str, model_too: bool) -> None:
    """Save a checkpoint that a single process can read."""
    model = build("fsdp on tp")
    for parameter in model.lone.parameters():
        parameter.requires_grad_(not model_too)
    ema = train_average(kind, model)
    state: dict[str, Any] = {"trainer": {"ema": ema.state_dict()}}
    if model_too:
        state["model"] = model.state_dict()
    dcp.save(state, checkpoint_id=folder)


def check_saved(folder: str, out: str) -> None:
    """Check that all ranks together can consolidate a saved checkpoint."""
    consolidate(folder, out, file_bytes=500)
    want = train_average("f32", build_net())
    for name, tensor in load_all(Path(out)).items():
        assert torch.equal(tensor, want.shadow[name]), name
    dist.barrier()


def check_refusals(folder: str) -> None:
    """Check that an error on one rank is raised on all ranks and leaves no files."""
    ema = MAKE["f32"](build("fsdp 4"))
    occupied = Path(folder) / "occupied"
    if not dist.get_rank():
        occupied.mkdir()
        (occupied / "mine").write_text("")
    dist.barrier()
    assert "not empty" in expect_error(CheckpointError, consolidate, ema, occupied)
    with ema.swapped():
        expect_error(StateError, consolidate, ema, Path(folder) / "new")
    stage = fully_shard(nn.Linear(3, 3 + dist.get_rank() // 2), mesh=meshes()["2x2"]["tp"])
    message = expect_error(CheckpointError, consolidate, fastema.EMA(stage), Path(folder) / "new")
    assert "'weight' is f32[4, 3] on rank 2, f32[3, 3] on rank 0" in message
    ema.update()
    if dist.get_rank() == 1:
        ema.update()
    assert "num_updates" in expect_error(LayoutError, consolidate, ema, Path(folder) / "new")
    here = folder if not dist.get_rank() else f"{folder}/nowhere"
    expect_error(CheckpointError, consolidate, here, Path(folder) / "new")
    dist.barrier()
    assert {path.name for path in Path(folder).iterdir()} == {"occupied"}
    dist.barrier()


def check_stages(folder: str) -> None:
    """Check that the stages of a pipeline write one folder."""
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
    got = load_all(Path(folder))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    dist.barrier()


def run_page(text: str, folder: str) -> None:
    """Run the code blocks of a page in order, in one namespace."""
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
        """Shard a new model: the page shards one in several places."""
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
