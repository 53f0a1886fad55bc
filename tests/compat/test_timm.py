"""Beside timm.utils.model_ema: the same numbers and files, and where it is wrong, ours is not."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import io
import logging
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastema.compat import timm as ours
from fastema.compat.signatures import differences
from fastema.errors import ArgumentError, CheckpointError, LayoutError

from .network import Network, Truth, bits, is_float, is_parameter, numbers, tensors, trained

NEEDS = ("timm",)


pytestmark = pytest.mark.torch


def _part(name: str, root: Path) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    return package


@contextmanager
def without_torchvision() -> Iterator[None]:
    """The files of timm that have to do with averages; the whole of it needs torchvision."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_timm(name)}
    try:
        sys.modules.update(
            {name: _part(name, root) for name in ("timm", "timm.models", "timm.utils")}
        )
        averages = importlib.import_module("timm.utils.model_ema")
        source = ast.parse((root / "utils" / "model.py").read_text())
        wanted = ("unwrap_model", "get_state_dict")
        source.body = [one for one in source.body if getattr(one, "name", "") in wanted]
        model = ModuleType("timm.utils.model")
        vars(model)["ModelEma"] = averages.ModelEma
        exec(compile(source, "timm/utils/model.py", "exec"), vars(model))
        sys.modules[model.__name__] = model
        yield
    finally:
        for name in [name for name in sys.modules if _of_timm(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def _of_timm(name: str) -> bool:
    return name.partition(".")[0] == "timm"


with without_torchvision():
    theirs = importlib.import_module("timm.utils.model_ema")


@pytest.fixture
def timm() -> Iterator[Callable[[str], ModuleType]]:
    """What imports a module of timm."""
    with without_torchvision():
        sys.modules["timm.utils.model_ema"] = theirs
        vars(sys.modules["timm.utils.model"])["ModelEma"] = theirs.ModelEma
        yield importlib.import_module


CLASSES = ["ModelEma", "ModelEmaV2", "ModelEmaV3"]
KINDS = {"mixed": None, "f64": torch.float64, "f32": torch.float32}
NARROW = [torch.bfloat16, torch.float16]
DECAY = 0.9


def made(module: Any, name: str, model: nn.Module, decay: float = DECAY, **options: Any) -> Any:
    return getattr(module, name)(model, decay, **options)


def inner(average: Any) -> nn.Module:
    return average.ema if hasattr(average, "ema") else average.module


class Untied(Network):
    """Without what theirs does wrong: tied weights, and buffers of integers."""

    def __init__(self, seed: int = 0, dtype: torch.dtype | None = None) -> None:
        super().__init__(seed, dtype, integers=False)
        self.head.weight = nn.Parameter(torch.zeros_like(self.embed.weight))


def in_the_state(name: str, tensor: Tensor) -> bool:
    return is_float(name, tensor) and name != "cache"


# -- the same interface ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_method_and_attribute_is_there(name: str) -> None:
    assert differences(getattr(theirs, name), getattr(ours, name)) == []
    model = Untied()
    one, other = made(ours, name, model), made(theirs, name, model)
    assert isinstance(one, nn.Module) is isinstance(other, nn.Module) is (name != "ModelEma")
    for attribute, value in vars(other).items():
        if not attribute.startswith("_"):
            mine = getattr(one, attribute)
            assert type(mine) is type(value), attribute
            assert mine == value or isinstance(value, nn.Module), attribute
    assert inner(one) is not model
    for mine, yours in zip(inner(one).modules(), inner(other).modules(), strict=True):
        assert mine.training is yours.training is False
    for mine, yours in zip(inner(one).parameters(), inner(other).parameters(), strict=True):
        assert mine.requires_grad is yours.requires_grad
        assert torch.equal(mine, yours)
    assert model.training


def test_the_interface_as_it_is_used(tmp_path: Path) -> None:
    model = Untied(1)
    tokens = torch.randint(7, (4, 3), generator=numbers(0))
    for name in CLASSES[1:]:
        average = made(ours, name, model)
        trained(model, numbers(2))
        average.set(model)
        assert torch.equal(average(tokens), model(tokens))
        assert torch.equal(average.module(tokens), model(tokens))
        assert set(average.state_dict()) == {f"module.{key}" for key in model.state_dict()}
    assert made(ours, "ModelEma", model).module is not model


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("name", CLASSES)
def test_equals_theirs(name: str, decay: float, kinds: str) -> None:
    model = Untied(3, KINDS[kinds])
    pair = [made(module, name, model, decay) for module in (ours, theirs)]
    truth, generator = Truth(inner(pair[0]), model, in_the_state), numbers(4)
    begun = model.cache.clone()
    for _ in range(15):
        trained(model, generator)
        truth.step(model, 1 - decay)
        for average in pair:
            average.update(model)
    for average in pair:
        truth.check(inner(average), model)
        assert torch.equal(inner(average).cache, begun), "what is in no state stays"


SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_warmup": True},
    {"use_warmup": True, "warmup_gamma": 3.0, "warmup_power": 0.9, "min_decay": 0.2},
    {"update_after_step": 4},
    {"use_warmup": True, "update_after_step": 2},
    {"exclude_buffers": True},
    {"exclude_buffers": True, "use_warmup": True},
    {"foreach": False},
    {"device": "cpu"},
    {"dtype": torch.float64, "device": "cpu"},
]


@pytest.mark.parametrize("counted", [True, False], ids=["step", "alone"])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_equals_the_third_of_theirs(options: dict[str, Any], kinds: str, counted: bool) -> None:
    model = Untied(5, KINDS[kinds])
    pair = [made(module, "ModelEmaV3", model, 0.95, **options) for module in (ours, theirs)]
    which = is_parameter if options.get("exclude_buffers") else in_the_state
    truth, generator = Truth(pair[0].module, model, which), numbers(6)
    for step in range(15):
        trained(model, generator)
        given = step if counted else None
        truth.step(model, 1 - theirs.ModelEmaV3.get_decay(pair[1], given))
        for average in pair:
            average.update(model, step=given)
    for average in pair:
        truth.check(average.module, model)
        copied = torch.equal(average.module.cache, model.cache.to(average.module.cache.dtype))
        assert copied is bool(options.get("exclude_buffers"))


@given(
    step=st.none() | st.integers(0, 10**7),
    decay=st.floats(0, 1),
    min_decay=st.floats(0, 1),
    after=st.integers(-1, 10**4),
    warmup=st.booleans(),
    gamma=st.floats(0.1, 1e4),
    power=st.floats(0.1, 2),
)
def test_the_decay_is_theirs(
    step: int | None,
    decay: float,
    min_decay: float,
    after: int,
    warmup: bool,
    gamma: float,
    power: float,
) -> None:
    pair = [
        module.ModelEmaV3(
            nn.Linear(1, 1),
            decay,
            min_decay=min_decay,
            update_after_step=after,
            use_warmup=warmup,
            warmup_gamma=gamma,
            warmup_power=power,
        )
        for module in (ours, theirs)
    ]
    one, other = (average.get_decay(step) for average in pair)
    assert math.isclose(one, other, rel_tol=4 * sys.float_info.epsilon, abs_tol=1e-15)


@pytest.mark.parametrize("narrow", NARROW)
def test_a_wide_average_of_narrow_weights(narrow: torch.dtype) -> None:
    model = Untied(7, narrow)
    pair = [
        made(module, "ModelEmaV3", model, dtype=torch.float32, device="cpu")
        for module in (ours, theirs)
    ]
    truth, generator = Truth(pair[0].module, model, in_the_state), numbers(8)
    for _ in range(12):
        trained(model, generator)
        truth.step(model, 1 - DECAY)
        for average in pair:
            average.update(model)
    for average in pair:
        truth.check(average.module, model)
        assert average.module.wide.dtype == torch.float32


@pytest.mark.parametrize("name", CLASSES)
def test_settings_that_are_changed_on_the_way(name: str) -> None:
    model = Untied(9)
    pair = [made(module, name, model) for module in (ours, theirs)]
    truth, generator = Truth(inner(pair[0]), model, in_the_state), numbers(10)
    for n in range(12):
        trained(model, generator)
        for average in pair:
            average.decay = 0.9 if n < 6 else 0.4
            average.update(model)
        truth.step(model, 1 - pair[0].decay)
    for average in pair:
        truth.check(inner(average), model)


def test_buffers_that_are_excluded_on_the_way() -> None:
    model = Untied(11)
    pair = [made(module, "ModelEmaV3", model) for module in (ours, theirs)]
    generator = numbers(12)
    for n in range(9):
        trained(model, generator)
        for average in pair:
            average.exclude_buffers = 3 <= n < 6
            average.update(model)
        assert torch.equal(pair[0].module.scale, model.scale) is (3 <= n < 6)
    for one, other in zip(pair[0].module.buffers(), pair[1].module.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CLASSES)
def test_another_module_in_its_place(name: str) -> None:
    model = Untied(13)
    average = made(ours, name, model)
    average.update(model)
    replaced = Untied(14)
    setattr(average, "ema" if name == "ModelEma" else "module", replaced)
    truth = Truth(replaced, model, in_the_state)
    truth.step(model, 1 - DECAY)
    average.update(model)
    truth.check(replaced, model)


@pytest.mark.parametrize("name", CLASSES)
def test_not_a_number_goes_in_and_a_copy_takes_it_out(name: str) -> None:
    model = nn.Linear(3, 2)
    pair = [made(module, name, model) for module in (ours, theirs)]
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    for average in pair:
        average.update(model)
        assert inner(average).weight.isnan().sum() == 1
    with torch.no_grad():
        model.weight.fill_(2)
    for average in pair:
        average.update(model)
        average.decay = 0.0
        average.update(model)
    assert torch.all(inner(pair[0]).weight == 2)
    assert inner(pair[1]).weight.isnan().any()


# -- where theirs is wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_integers_are_copied_exactly(name: str) -> None:
    model = Network(15)
    pair = [made(module, name, model) for module in (ours, theirs)]
    generator = numbers(16)
    for _ in range(5):
        trained(model, generator)
        for average in pair:
            average.update(model)
    for buffer in ("places", "mask", "norm.num_batches_tracked"):
        assert torch.equal(inner(pair[0]).get_buffer(buffer), model.get_buffer(buffer)), buffer
    wrong = not torch.equal(inner(pair[1]).places, model.places)
    assert wrong is (name != "ModelEmaV3")


@pytest.mark.parametrize("name", CLASSES)
def test_tied_weights_are_averaged_once(name: str) -> None:
    model = Network(17)
    pair = [made(module, name, model) for module in (ours, theirs)]
    begun = model.embed.weight.detach().double().clone()
    truth = Truth(inner(pair[0]), model, in_the_state)
    trained(model, numbers(18))
    truth.step(model, 1 - DECAY)
    for average in pair:
        average.update(model)
    truth.check(inner(pair[0]), model)
    assert inner(pair[0]).head.weight is inner(pair[0]).embed.weight
    twice = begun + (1 - DECAY**2) * (model.embed.weight.detach().double() - begun)
    torch.testing.assert_close(inner(pair[1]).embed.weight.detach(), twice.float())


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("name", CLASSES)
def test_a_narrow_average_moves(name: str, narrow: torch.dtype) -> None:
    """From 1 towards 1.5, by less than half a unit in the last place of each step."""
    size, steps, decay = 4096, 60, 0.9998
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(size, dtype=narrow))
    pair = [made(module, name, model, decay) for module in (ours, theirs)]
    third = name == "ModelEmaV3"
    nearest = made(ours, name, model, decay, **({"stochastic_rounding": False} if third else {}))
    with torch.no_grad():
        model.weight.fill_(1.5)
    for _ in range(steps):
        for average in (*pair, nearest):
            average.update(model)
    stands_still = torch.all(inner(pair[1]).weight == 1).item()
    assert stands_still is not (third and narrow == torch.bfloat16)
    assert torch.all(inner(nearest).weight == 1).item() is third
    # Without a bias the mean is within five standard deviations of the truth: half a unit in
    # the last place for each of `steps` times `size` roundings.
    bound = 5 * torch.finfo(narrow).eps / 2 * (steps / size) ** 0.5
    expected = 1.5 - 0.5 * decay**steps
    assert abs(inner(pair[0]).weight.double().mean().item() - expected) < bound < expected - 1


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("random", [True, False])
def test_narrow_averages_stay_within_their_bounds(random: bool, narrow: torch.dtype) -> None:
    model = Untied(19, narrow)
    average = made(ours, "ModelEmaV3", model, stochastic_rounding=random)
    truth, generator = Truth(average.module, model, in_the_state, random), numbers(20)
    for _ in range(10):
        trained(model, generator)
        truth.step(model, 1 - DECAY)
        average.update(model)
    truth.check(average.module, model)


def smaller() -> nn.Module:
    model = Untied(21)
    model.head.bias = None
    return model


def larger() -> nn.Module:
    model = Untied(21)
    model.register_parameter("further", nn.Parameter(torch.zeros(3)))
    return model


def reshaped() -> nn.Module:
    model = Untied(21)
    model.frozen = nn.Parameter(torch.zeros(34))
    return model


def without_a_buffer() -> nn.Module:
    model = Untied(21)
    del model.scale
    return model


OTHERS = [
    (smaller, r"head\.bias"),
    (larger, "further"),
    (reshaped, "frozen"),
    (without_a_buffer, "scale"),
]


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize(("other", "which"), OTHERS)
@pytest.mark.parametrize("name", CLASSES)
def test_another_model_is_refused(
    name: str, other: Callable[[], nn.Module], which: str, updates: int
) -> None:
    model = Untied(22)
    average = made(ours, name, model)
    for n in range(updates):
        trained(model, numbers(n))
        average.update(model)
    before = bits(inner(average))
    calls = [average.update, *([] if name == "ModelEma" else [average.set])]
    for call in calls:
        with pytest.raises(LayoutError, match=which):
            call(other())
    assert bits(inner(average)) == before
    trained(model, numbers(23))
    average.update(model)
    assert bits(inner(average)) != before


@pytest.mark.parametrize("name", CLASSES[1:])
def test_theirs_takes_a_smaller_model(name: str) -> None:
    average = made(theirs, name, Untied(22))
    average.update(smaller())


def test_what_is_in_no_state_may_differ() -> None:
    """Such as tables that are made anew for another size of image."""
    model = Untied(24)
    average = made(ours, "ModelEmaV3", model)
    average.update(model)
    begun = average.module.cache.clone()
    model.cache = torch.ones(9)
    average.update(model)
    model.register_buffer("later", torch.ones(2), persistent=False)
    model.head.register_buffer("later", torch.ones(2), persistent=False)
    truth = Truth(average.module, model, in_the_state)
    trained(model, numbers(25))
    truth.step(model, 1 - DECAY)
    average.update(model)
    truth.check(average.module, model)
    del model.cache
    average.update(model)
    assert torch.equal(average.module.cache, begun)
    model.register_buffer("further", torch.ones(2))
    with pytest.raises(LayoutError, match="further"):
        average.update(model)


# -- random bits -----------------------------------------------------------------------------------


def test_random_bits_are_those_of_seed_and_step() -> None:
    model, generator = Untied(26, torch.bfloat16), numbers(27)
    averages = {
        "one": made(ours, "ModelEmaV3", model),
        "again": made(ours, "ModelEmaV3", model),
        "other seed": made(ours, "ModelEmaV3", model, stochastic_rounding_seed=-5),
        "other steps": made(ours, "ModelEmaV3", model),
    }
    for step in range(4):
        trained(model, generator)
        for name, average in averages.items():
            average.update(model, step=step + 100 * (name == "other steps") + 10)
    found = {name: bits(average.module) for name, average in averages.items()}
    assert found["one"] == found["again"]
    assert found["one"] != found["other seed"]
    assert found["one"] != found["other steps"]


@pytest.mark.parametrize("way", ["state", "deepcopy"])
def test_a_resumed_run_has_the_same_random_bits(way: str) -> None:
    results = []
    for stop in (None, 5):
        model, generator = Untied(28, torch.bfloat16), numbers(29)
        average = made(ours, "ModelEmaV3", model)
        for step in range(10):
            if step == stop and way == "state":
                state = average.state_dict()
                average = made(ours, "ModelEmaV3", model)
                average.load_state_dict(state)
            elif step == stop:
                average = copy.deepcopy(average)
            trained(model, generator)
            average.update(model, step=step if way == "state" else None)
        results.append({k: v for k, v in bits(average.module).items() if k != "cache"})
    assert results[0] == results[1]


def test_no_two_steps_share_their_random_bits() -> None:
    """Alone too, where nothing says the step: what is added at each of them differs."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    average = made(ours, "ModelEmaV3", model, 0.5)
    eps = torch.finfo(torch.bfloat16).eps
    ups = []
    for _ in range(6):
        with torch.no_grad():
            average.module.weight.fill_(1)
            model.weight.fill_(1 + eps)
        average.update(model)
        ups.append(average.module.weight > 1)
    for at, one in enumerate(ups):
        assert 0.4 < one.float().mean() < 0.6
        for other in ups[:at]:
            assert 0.4 < (one == other).float().mean() < 0.6


# -- states in both directions ---------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", CLASSES[1:])
@pytest.mark.parametrize(("first", "second"), [(ours, theirs), (theirs, ours), (ours, ours)])
def test_an_interrupted_run_goes_on_in_the_other(
    first: Any, second: Any, name: str, kinds: str
) -> None:
    model = Untied(30, KINDS[kinds])
    options = {"use_warmup": True, "warmup_gamma": 2.0} if name == "ModelEmaV3" else {}
    average = made(first, name, model, **options)
    truth, generator = Truth(average.module, model, in_the_state), numbers(31)
    for step in range(14):
        if step == 7:
            file = io.BytesIO()
            torch.save(average.state_dict(), file)
            file.seek(0)
            average = made(second, name, Untied(32, KINDS[kinds]), **options)
            average.load_state_dict(torch.load(file, weights_only=True))
        trained(model, generator)
        given = (step,) if options else ()
        truth.step(model, 1 - (average.get_decay(*given) if options else DECAY))
        average.update(model, *given)
    average.module.cache.copy_(model.cache)
    truth.check(average.module, model)


@pytest.mark.parametrize("name", CLASSES)
def test_files_of_the_training_script(
    timm: Callable[[str], ModuleType], name: str, tmp_path: Path
) -> None:
    """timm's own functions save and load ours."""
    model = Untied(33)
    average = made(ours, name, model)
    for n in range(3):
        trained(model, numbers(n))
        average.update(model)
    utils = timm("timm.utils.model")
    assert utils.unwrap_model(average) is inner(average)
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
    state = inner(average).state_dict()
    assert set(again) == set(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    resumed = [
        ours.ModelEma(Untied(34), resume=str(path)),
        theirs.ModelEma(Untied(34), "", "", path),
    ]
    resumed[0].decay = DECAY
    for one in resumed:
        for key, value in one.ema.state_dict().items():
            assert torch.equal(value, state[key]), key
        assert not any(parameter.requires_grad for parameter in one.ema.parameters())
    truth = Truth(inner(average), model, in_the_state)
    trained(model, numbers(35))
    truth.step(model, 1 - DECAY)
    resumed[0].ema.cache.copy_(model.cache)
    resumed[0].update(model)
    truth.check(resumed[0].ema, model)


def test_resuming_a_wrapped_model(tmp_path: Path) -> None:
    model = Untied(36)
    for prefix in ("", "module."):
        path = tmp_path / f"{prefix}checkpoint"
        torch.save({"state_dict_ema": {prefix + k: v for k, v in model.state_dict().items()}}, path)
        average = ours.ModelEma(nn.DataParallel(Untied(37)), resume=path)
        assert average.ema_has_module
        for key, value in average.ema.module.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


def test_files_without_an_average(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, path = nn.Linear(2, 2), tmp_path / "checkpoint"
    torch.save({"state_dict": {}}, path)
    with caplog.at_level(logging.WARNING):
        average = ours.ModelEma(model, resume=str(path))
    assert "state_dict_ema" in caplog.text
    assert torch.equal(average.ema.weight, model.weight)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="state_dict_ema"):
        ours.ModelEma(model, resume=str(path))


# -- models that are wrapped, move, and are copied -------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
@pytest.mark.parametrize("which", ["model", "average", "both"])
@pytest.mark.parametrize("name", CLASSES)
def test_wrapped_models(name: str, which: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Untied(38)
    wrapped = wrap(model)
    average = made(ours, name, model if which == "model" else wrapped)
    unwrapped = inner(average) if which == "model" else next(inner(average).children())
    truth, generator = Truth(unwrapped, model, in_the_state), numbers(39)
    for _ in range(4):
        trained(model, generator)
        truth.step(model, 1 - DECAY)
        average.update(model if which == "average" else wrapped)
    truth.check(unwrapped, model)


@pytest.mark.parametrize("name", CLASSES[1:])
def test_an_average_that_is_compiled(timm: Callable[[str], ModuleType], name: str) -> None:
    """As the training script does it: for validation, while it is updated as before."""
    model = Untied(40)
    average = made(ours, name, model)
    fast = compiled(average)
    truth = Truth(average.module, model, in_the_state)
    trained(model, numbers(41))
    truth.step(model, 1 - DECAY)
    fast.update(model)
    truth.check(average.module, model)
    assert timm("timm.utils.model").unwrap_model(fast) is average.module


def repointed(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def cast(model: nn.Module) -> None:
    model.to(torch.float64)


@pytest.mark.parametrize("change", [repointed, assigned, cast])
@pytest.mark.parametrize("side", ["model", "average"])
@pytest.mark.parametrize("name", CLASSES)
def test_tensors_that_move(name: str, side: str, change: Callable[[nn.Module], None]) -> None:
    model = Untied(42, torch.float32)
    average = made(ours, name, model)
    truth, generator = Truth(inner(average), model, in_the_state), numbers(43)
    for n in range(8):
        if n == 4:
            change(model if side == "model" else inner(average))
        trained(model, generator)
        truth.step(model, 1 - DECAY)
        average.update(model)
    truth.check(inner(average), model)


def through_pickle(average: Any) -> Any:
    return pickle.loads(pickle.dumps(average))


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("name", CLASSES)
def test_copies_go_on_by_themselves(name: str, way: Callable[[Any], Any]) -> None:
    model, generator = Untied(44), numbers(45)
    average = made(ours, name, model)
    truth = Truth(inner(average), model, in_the_state)
    trained(model, generator)
    truth.step(model, 1 - DECAY)
    average.update(model)
    other, before = way(average), bits(inner(average))
    assert bits(inner(other)) == before
    trained(model, generator)
    truth.step(model, 1 - DECAY)
    other.update(model)
    truth.check(inner(other), model)
    assert bits(inner(average)) == before


# -- details ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES[1:])
@pytest.mark.parametrize("narrow", [None, *NARROW])
def test_set_makes_it_the_weights(name: str, narrow: torch.dtype | None) -> None:
    model = Network(46)
    options = {"exclude_buffers": True} if name == "ModelEmaV3" else {}
    pair = [made(module, name, model, **options) for module in (ours, theirs)]
    for average in pair:
        if narrow is not None:
            average.module.to(narrow)
    trained(model, numbers(47))
    for average in pair:
        average.set(model)
    assert bits(pair[0].module) == bits(pair[1].module)
    assert tensors(pair[0].module)["places"].tolist() == model.places.tolist()


def test_a_function_of_a_subclass() -> None:
    class Half(ours.ModelEmaV2):
        def update(self, model: nn.Module) -> None:
            self._update(model, update_fn=lambda average, new: (average + new) / 2)

    model = Network(48)
    average = Half(model)
    truth = Truth(average.module, model, in_the_state)
    trained(model, numbers(49))
    truth.step(model, 0.5)
    average.update(model)
    truth.check(average.module, model)
    before = bits(average.module)
    shorter = Network(48)
    shorter.head.bias = None
    with pytest.raises(LayoutError):
        average.update(shorter)
    assert bits(average.module) == before


def test_methods_of_a_subclass_are_called() -> None:
    decays = []

    class Noted(ours.ModelEmaV3):
        def apply_update_(self, model: nn.Module, decay: float) -> None:
            decays.append(decay)
            super().apply_update_(model, decay / 2)

    model = Untied(50)
    average = Noted(model, DECAY)
    truth = Truth(average.module, model, in_the_state)
    trained(model, numbers(51))
    truth.step(model, 1 - DECAY / 2)
    average.update(model, step=4)
    truth.check(average.module, model)
    assert decays == [DECAY]


def test_a_decay_that_is_no_number() -> None:
    model = nn.Linear(2, 2)
    average = ours.ModelEmaV3(model, float("nan"))
    before = bits(average.module)
    with pytest.raises(ArgumentError):
        average.update(model)
    assert bits(average.module) == before


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_models_of_torchscript(name: str) -> None:
    states = []
    for where in (ours, theirs):
        torch.manual_seed(3)
        model = torch.jit.script(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
        average = made(where, name, model)
        for _ in range(4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            average.update(model)
        states.append(average.module.state_dict())
    assert not torch.equal(states[0]["0.weight"], model.state_dict()["0.weight"])
    for key, tensor in states[1].items():
        torch.testing.assert_close(states[0][key], tensor)


def test_subclasses_with_an_update_of_their_own() -> None:
    def scaled(base: Any) -> Any:
        class Scaled(base):  # type: ignore[misc]
            def _update(self, model: nn.Module, update_fn: Any) -> None:
                super()._update(model, lambda ema, new: 2.0 * update_fn(ema, new))

        return Scaled

    states = []
    for where in (ours, theirs):
        model = Untied(11)
        average = scaled(where.ModelEmaV2)(model, decay=0.75)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        average.update(model)
        states.append(copy.deepcopy(average.module.state_dict()))
        average.set(model)
        states.append(average.module.state_dict())
    for one, other in zip(states[:2], states[2:], strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name])


def test_steps_of_any_size() -> None:
    model = Network(12, torch.bfloat16)
    average = ours.ModelEmaV3(model, decay=0.5)
    average.update(model, step=10**30)
