"""State dicts of other libraries, and fastema's own files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema import compat
from fastema.checkpoint import load_state
from fastema.checkpoint.state import write_tensors
from fastema.errors import CheckpointError

pytestmark = pytest.mark.torch


def network() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def update_and_save(average: Any, *arguments: Any) -> Any:
    average.update(*arguments)
    return average.state_dict()


def save_averaged_model(model: Any) -> Any:
    averaged = compat.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return averaged.state_dict()


FOREIGN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "torch_ema": (
        lambda m: update_and_save(compat.torch_ema.ExponentialMovingAverage(m.parameters(), 0.9)),
        r"torch_ema\.ExponentialMovingAverage\.load_state_dict reads",
    ),
    "diffusers": (
        lambda m: compat.diffusers.EMAModel(m.parameters()).state_dict(),
        r"the state of diffusers' EMAModel, which fastema\.compat\.diffusers",
    ),
    "torch": (save_averaged_model, r"torch's AveragedModel, which fastema\.compat\.swa_utils"),
    "mmengine": (
        lambda m: {
            "steps": torch.tensor(3),
            **{f"module.{name}": one for name, one in m.state_dict().items()},
        },
        r"an average of MMEngine; fastema\.checkpoint\.load_into\(ema, path\) reads a file",
    ),
    "timm": (
        lambda m: update_and_save(compat.timm.ModelEmaV3(m), m),
        "names of a wrapper: timm's ModelEmaV2 and ModelEmaV3, or DataParallel",
    ),
    "timm's checkpoint": (
        lambda m: {"state_dict": m.state_dict(), "state_dict_ema": m.state_dict(), "epoch": 3},
        r"a checkpoint of timm, which fastema\.compat\.timm\.ModelEma\(model, resume=path\)",
    ),
    "ema_pytorch": (
        lambda m: update_and_save(compat.ema_pytorch.EMA(m)),
        r"ema_pytorch's EMA, which fastema\.compat\.ema_pytorch\.EMA\.load_state_dict",
    ),
    "LitEma": (
        lambda m: compat.litema.LitEma(m).state_dict(),
        r"Stable Diffusion's LitEma, which fastema\.compat\.litema",
    ),
    "Lightning": (
        lambda m: {"state_dict": {}, "current_model_state": {}, "averaging_state": {}},
        "a checkpoint of Lightning with an average",
    ),
    "NeMo": (
        lambda m: {"opt": {}, "ema": (), "current_step": 3, "decay": 0.9, "every_n_steps": 1},
        r"NeMo's EMAOptimizer; fastema\.checkpoint\.load_into\(ema, path\) reads a file",
    ),
    "Composer": (
        lambda m: {"ema_model": m.state_dict(), "ema_started": True},
        r"Composer's EMA; fastema\.checkpoint\.load_into\(ema, path\) reads a file",
    ),
    "D2Go": (
        lambda m: {"model": m.state_dict(), "ema_state": m.state_dict()},
        r"D2Go; fastema\.checkpoint\.load_into\(ema, path\) reads a file",
    ),
    "Ultralytics": (
        lambda m: compat.ultralytics.export(compat.ultralytics.ModelEMA(m)),
        r"Ultralytics, which fastema\.compat\.ultralytics\.load reads",
    ),
    "a model": (lambda m: m.state_dict(), "tensors by name, like a model's state"),
    "one inside another": (
        lambda m: {"model": m.state_dict(), "ema": fastema.EMA(m).state_dict()},
        "holds one: load the entry 'ema'",
    ),
}


@pytest.mark.parametrize("library", FOREIGN)
def test_error_for_a_foreign_state_names_the_call_that_reads_it(library: str) -> None:
    make, said = FOREIGN[library]
    model = network()
    ema = fastema.EMA(model, 0.9)
    with pytest.raises(CheckpointError, match=f"(?s)not a fastema state dict, but .*{said}"):
        ema.load_state_dict(make(model))


def build_averaged(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = network()
    ema = fastema.EMA(model, [0.9, 0.5], shadow_dtype="bf16+16", update_every=2)
    for _ in range(5):
        with torch.no_grad():
            for one in model.parameters():
                one += torch.randn_like(one)
        ema.update()
    return model, ema


@pytest.mark.parametrize("how", ["load_state", "load_file"])
def test_saved_file_loads_to_the_bit_through_either_reader(tmp_path: Path, how: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, ema = build_averaged(1)
    path = tmp_path / "ema.safetensors"
    write_tensors(path, ema.state_dict())
    _, other = build_averaged(2)
    state = (
        load_state(path, other.shadows[0]) if how == "load_state" else safetensors.load_file(path)
    )
    other.load_state_dict(state)
    assert other.num_updates == ema.num_updates == 5
    with torch.no_grad():
        for one in model.parameters():
            one += torch.randn_like(one)
    for average in (ema, other):
        average.update(model)
    found = other.state_dict()
    for name, tensor in ema.state_dict().items():
        assert torch.equal(found[name], tensor), name
