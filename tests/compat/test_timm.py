"""The drop-in for timm.utils.model_ema: the same decays, and timm's own checkpoints."""

import argparse
import ast
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from fastema.compat import timm as ours

from ..support.peers import import_timm_averages, is_saved_float
from .network import Network, Truth, make_generator, randomize

NEEDS = ("timm",)

pytestmark = pytest.mark.torch


theirs = import_timm_averages()


def remove_timm() -> dict[str, ModuleType]:
    """Remove timm's modules from sys.modules and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "timm"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def timm() -> Iterator[Callable[[str], ModuleType]]:
    """Yield a function that imports timm's modules for averages without torchvision."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (root,) = spec.submodule_search_locations
    source = ast.parse(Path(root, "utils", "model.py").read_text())
    wanted = ("unwrap_model", "get_state_dict")
    source.body = [one for one in source.body if getattr(one, "name", "") in wanted]
    packages = {name: ModuleType(name) for name in ("timm", "timm.models", "timm.utils")}
    for name, package in packages.items():
        package.__path__ = [str(Path(root, *name.split(".")[1:]))]
    model = ModuleType("timm.utils.model")
    vars(model)["ModelEma"] = theirs.ModelEma
    exec(compile(source, "timm/utils/model.py", "exec"), vars(model))
    before = remove_timm()
    sys.modules.update(packages)
    sys.modules.update({"timm.utils.model": model, "timm.utils.model_ema": theirs})
    yield importlib.import_module
    remove_timm()
    sys.modules.update(before)


CLASSES = ["ModelEma", "ModelEmaV2", "ModelEmaV3"]
DECAY = 0.9


def build(module: Any, name: str, model: nn.Module, decay: float = DECAY, **options: Any) -> Any:
    return getattr(module, name)(model, decay, **options)


def averaged_module(average: Any) -> nn.Module:
    return average.ema if hasattr(average, "ema") else average.module


def build_untied(seed: int = 0, dtype: torch.dtype | None = None) -> Network:
    """Build a model without tied weights or integer buffers, which theirs gets wrong."""
    return Network(seed, dtype, integers=False, tied=False)


@given(
    step=st.none() | st.integers(0, 10**7),
    settings=st.fixed_dictionaries(
        {
            "decay": st.floats(0, 1),
            "min_decay": st.floats(0, 1),
            "update_after_step": st.integers(-1, 10**4),
            "use_warmup": st.booleans(),
            "warmup_gamma": st.floats(0.1, 1e4),
            "warmup_power": st.floats(0.1, 2),
        }
    ),
)
@example(step=9, settings={"decay": 0.5, "min_decay": 0.75, "use_warmup": True})
@example(step=3, settings={"update_after_step": 2})
def test_decay_matches_timm(step: int | None, settings: dict[str, Any]) -> None:
    one, other = (
        module.ModelEmaV3(nn.Linear(1, 1), **settings).get_decay(step) for module in (ours, theirs)
    )
    assert math.isclose(one, other, rel_tol=4 * sys.float_info.epsilon, abs_tol=1e-15)


@pytest.mark.parametrize("name", CLASSES)
def test_averages_round_trip_through_timm_checkpoints(
    timm: Callable[[str], ModuleType], name: str, tmp_path: Path
) -> None:
    """timm's own functions save and load our averages."""
    model = build_untied(33)
    average = build(ours, name, model)
    for n in range(3):
        randomize(model, make_generator(n))
        average.update(model)
    utils = timm("timm.utils.model")
    assert utils.unwrap_model(average) is averaged_module(average)
    saver = timm("timm.utils.checkpoint_saver").CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model="network"),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=1.0)
    path = next(tmp_path.glob("checkpoint*"))
    helpers = timm("timm.models._helpers")
    again = helpers.load_state_dict(path, use_ema=True)
    state = averaged_module(average).state_dict()
    assert set(again) == set(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    resumed = [
        ours.ModelEma(build_untied(34), resume=str(path)),
        theirs.ModelEma(build_untied(34), "", "", path),
    ]
    resumed[0].decay = DECAY
    for one in resumed:
        for key, value in one.ema.state_dict().items():
            assert torch.equal(value, state[key]), key
        assert not any(parameter.requires_grad for parameter in one.ema.parameters())
    truth = Truth(averaged_module(average), model, is_saved_float)
    truth.train(model, make_generator(35), 1 - DECAY, resumed[0].update)
    resumed[0].ema.cache.copy_(model.cache)
    truth.check(resumed[0].ema, model)


def test_subclass_with_its_own_update_averages_as_in_timm() -> None:
    def train(library: Any) -> dict[str, torch.Tensor]:
        class Counting(library.ModelEmaV2):  # type: ignore[misc]
            calls = 0

            def _update(self, model: nn.Module, update_fn: Any) -> None:
                self.calls += 1
                super()._update(model, update_fn)

        model = build_untied(36)
        average = Counting(model, DECAY)
        for n in range(3):
            randomize(model, make_generator(n))
            average.update(model)
        assert average.calls == 3
        randomize(model, make_generator(3))
        other = Counting(model, DECAY)
        other.set(averaged_module(average))
        assert other.calls == 1
        return dict(averaged_module(other).state_dict())

    torch.testing.assert_close(train(ours), train(theirs))
