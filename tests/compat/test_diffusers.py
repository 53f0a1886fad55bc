"""Beside diffusers itself: the same numbers, states and folders, and the training scripts' way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel as Theirs

from fastema.binding.binding import Binding
from fastema.compat.diffusers import EMAModel as Ours
from fastema.errors import LayoutError

from ..support.peers import PEERS, diffusers_weight
from .network import numbers, refused
from .parameter_lists import Truth, parameters, same, trained, values

pytestmark = pytest.mark.torch

SCHEDULES = PEERS["diffusers"].schedules


@pytest.mark.parametrize("turns", [False, True])
def test_what_needs_no_gradient_is_looked_at_at_every_step(
    turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freezing in turns makes no new plans."""
    weights, generator = parameters(6), numbers(7)
    one, other, truth = Ours(weights, 0.9), Theirs(weights, 0.9), Truth(weights, copied=True)
    for n in range(1, 13):
        if turns and n == 5:
            monkeypatch.setattr(Binding, "_bind", None)
        weights[0 if turns else n % 8].requires_grad_(n % (2 if turns else 3) > 0)
        trained(weights, generator)
        truth.step(weights, diffusers_weight(n - 1, 0.9))
        one.step(weights)
        other.step(weights)
        for at, weight in enumerate(weights):
            assert weight.requires_grad or torch.equal(one.shadow_params[at], weight)
    truth.check(one.shadow_params)
    truth.check(other.shadow_params)


def unet(seed: int) -> Any:
    torch.manual_seed(seed)
    blocks = {f"{way.lower()}_block_types": 2 * (f"{way}Block2D",) for way in ("Down", "Up")}
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4}
    return UNet2DModel(in_channels=1, out_channels=1, layers_per_block=1, **sizes, **blocks)


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model:FutureWarning")
@pytest.mark.parametrize("first", [Ours, Theirs], ids=["ours", "theirs"])
@pytest.mark.parametrize("then", [Ours, Theirs], ids=["ours", "theirs"])
def test_a_saved_folder_is_read_by_both(first: Any, then: Any, tmp_path: Path) -> None:
    model, options = unet(42), SCHEDULES["all"]
    ema = first(model.parameters(), model_cls=UNet2DModel, model_config=model.config, **options)
    truth, generator = Truth(list(model.parameters())), numbers(43)
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
        trained(model.parameters(), generator, 0.1)
        truth.step(list(model.parameters()), diffusers_weight(n - 1, **options))
        ema.step(model.parameters())
    truth.check(ema.shadow_params)
    again = tmp_path / "again"
    ema.save_pretrained(again)
    average = UNet2DModel.from_pretrained(again)
    assert same(average.parameters(), ema.shadow_params)


def test_parameters_that_are_spread_over_processes_are_refused_with_advice() -> None:
    """As DeepSpeed leaves them: empty, with a number of their own."""
    weights = parameters(62)
    ema = Ours(weights)
    averages = values(ema.shadow_params)
    for number, one in enumerate(weights):
        one.ds_id = number
        one.data = torch.empty(0)
    with refused(LayoutError, "GatheredParameters", ema.shadow_params):
        ema.step(weights)
    assert ema.optimization_step == 0
    for one, average in zip(weights, averages, strict=True):  # gathered
        one.data = average + 1
    ema.step(weights)
    assert same(ema.shadow_params, weights)
