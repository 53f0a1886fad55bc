"""EMAModel beside diffusers' own: frozen parameters, saved folders and DeepSpeed shards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel as Theirs
from torch import nn

from fastema.binding.binding import Binding
from fastema.compat.diffusers import EMAModel as Ours
from fastema.errors import BridgeError

from ..support.peers import PEERS, diffusers_weight
from ..support.zero3 import gather, partition
from .network import assert_refused, make_generator
from .parameter_lists import ListTruth, are_equal, parameters, perturb

pytestmark = pytest.mark.torch

SCHEDULES = PEERS["diffusers"].schedules


@pytest.mark.parametrize("turns", [False, True])
def test_parameters_frozen_at_this_step_are_copied(
    turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layouts that alternate are bound once each."""
    weights, generator = parameters(6), make_generator(7)
    one, other, truth = Ours(weights, 0.9), Theirs(weights, 0.9), ListTruth(weights, copied=True)
    for n in range(1, 13):
        if turns and n == 5:
            monkeypatch.setattr(Binding, "_bind", None)
        weights[0 if turns else n % 8].requires_grad_(n % (2 if turns else 3) > 0)
        perturb(weights, generator)
        truth.step(weights, diffusers_weight(n - 1, 0.9))
        one.step(weights)
        other.step(weights)
        for at, weight in enumerate(weights):
            assert weight.requires_grad or torch.equal(one.shadow_params[at], weight)
    truth.check(one.shadow_params)
    truth.check(other.shadow_params)


def build_unet(seed: int) -> Any:
    torch.manual_seed(seed)
    blocks = {f"{way.lower()}_block_types": 2 * (f"{way}Block2D",) for way in ("Down", "Up")}
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4}
    return UNet2DModel(in_channels=1, out_channels=1, layers_per_block=1, **sizes, **blocks)


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model:FutureWarning")
@pytest.mark.parametrize("first", [Ours, Theirs], ids=["ours", "theirs"])
@pytest.mark.parametrize("then", [Ours, Theirs], ids=["ours", "theirs"])
def test_saved_folder_loads_in_both_libraries(first: Any, then: Any, tmp_path: Path) -> None:
    model, options = build_unet(42), SCHEDULES["all"]
    ema = first(model.parameters(), model_cls=UNet2DModel, model_config=model.config, **options)
    truth, generator = ListTruth(list(model.parameters())), make_generator(43)
    for n in range(1, 13):
        if n == 7:
            ema.save_pretrained(tmp_path)
            saved = ema.state_dict()
            config = json.loads((tmp_path / "config.json").read_text())
            del saved["shadow_params"]
            assert saved.items() <= config.items()
            ema = then.from_pretrained(tmp_path, UNet2DModel, foreach=True)
            assert ema.model_cls is UNet2DModel
            assert ema.foreach
        perturb(model.parameters(), generator, 0.1)
        truth.step(list(model.parameters()), diffusers_weight(n - 1, **options))
        ema.step(model.parameters())
    truth.check(ema.shadow_params)
    again = tmp_path / "again"
    ema.save_pretrained(again)
    average = UNet2DModel.from_pretrained(again)
    assert are_equal(average.parameters(), ema.shadow_params)


def test_sharded_deepspeed_parameters_are_refused_with_advice() -> None:
    weights = parameters(62)
    ema = Ours(weights)
    partition(nn.ParameterList(weights))
    with assert_refused(BridgeError, "GatheredParameters", ema.shadow_params):
        ema.step(weights)
    assert ema.optimization_step == 0
    gather(nn.ParameterList(weights))
    ema.step(weights)
    assert are_equal(ema.shadow_params, weights)
