"""Names of other libraries: errors say which option or attribute of fastema is meant."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import pytest

import fastema
from fastema import hints, tracking
from fastema.average.options import AverageOptions, parse_settings
from fastema.errors import ArgumentError, DTypeError, FastemaError, OptionError

WEIGHTS = [np.ones(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.9}, r"EMA\(\) has no option 'beta': use decay, .*old average.* pass 1 - beta"),
        ({"alpha": 0.1}, r"use decay, .*then pass decay=1 - alpha.*old average, pass decay=alpha"),
        ({"momentum": 0.9}, "decay=1 - momentum"),
        ({"tau": 0.005}, "decay=1 - tau"),
        ({"half_life": 10}, r"decay=fastema\.rules\.half_life\(steps\)"),
        ({"warmup": True}, r"decay=fastema\.rules\.warmup\(0\.999\)"),
        ({"update_every_n_steps": 2}, "use update_every$"),
        ({"update_after_step": 2}, "use start_after"),
        ({"dtype": "float32"}, "use shadow_dtype"),
        ({"use_buffers": True}, "use buffers, 'copy', 'average' or 'skip'"),
        ({"exclude": ["bias"]}, r"use policy, .*policy=\{'visual\.\*': 'skip'\}"),
        ({"strict": False}, r"use policy, .*policy=\{'adapter\.\*': 'skip'\}"),
        ({"device": "cpu"}, "use offload"),
        ({"target": WEIGHTS}, "use into, a module, list or dict of your own"),
        ({"model": WEIGHTS}, "use weights, the first argument"),
        ({"foreach": True}, "leave foreach out"),
        ({"drift": True}, r"call ema\.drift\(\): leave drift out"),
        ({"watch": "all"}, "leave watch out"),
        ({"update_evry": 2}, "did you mean update_every?"),
        ({"qqq": 2}, "its options: weights, decay, zero_debias"),
    ],
)
def test_option_of_another_library_raises_with_the_option_that_is_meant(
    options: dict[str, Any], message: str
) -> None:
    given = () if "model" in options else (WEIGHTS,)
    with pytest.raises(OptionError, match=message) as caught:
        fastema.EMA(*given, **options)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ArgumentError)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "SWA": (fastema.SWA, {"swa_start": 3}, r"SWA\(\) .*: use start_after"),
    "SMA": (fastema.SMA, {"window_size": 3}, r"SMA\(\) .*: use window"),
    "PowerEMA": (fastema.PowerEMA, {"sigma_rel": 0.1}, r"PowerEMA\(\) .*: use sigma_rels"),
    "Plan": (fastema.Plan, {"target": [], "x": []}, r"Plan\(\) .*: use avg"),
    "numbers": (tracking.ExponentialMovingAverage, {"alpha": 0.1}, "decay=1 - alpha"),
    "window of numbers": (tracking.SimpleMovingAverage, {"window": 3}, "use window_size"),
    "metrics": (tracking.MetricSmoother, {"window": 3}, "use window_size"),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_class_suggests_an_option_that_it_has(call: str) -> None:
    build, options, message = CALLS[call]
    with pytest.raises(OptionError, match=message):
        build(**options)


@pytest.mark.parametrize("framework", ["keras", "lightning", "transformers"])
def test_callbacks_suggest_an_option_that_they_have(framework: str) -> None:
    pytest.importorskip("torch" if framework == "lightning" else framework)
    pytest.importorskip(framework)
    package = getattr(fastema, framework)
    average = package.EMAWeights if framework == "keras" else package.EMACallback
    with pytest.raises(OptionError, match="use decay, the weight of the old average"):
        average(beta=0.9)
    with pytest.raises(OptionError, match="use window_size"):
        package.LossAverages(window=3)


INVALID: list[dict[str, Any]] = [
    {"decay": 1.5}, {"decay": ()}, {"decay": fastema.rules.constant}, {"zero_debias": 1},
    {"rounding": "up"}, {"seed": -1}, {"update_every": 0}, {"start_after": -1}, {"frozen": "melt"},
    {"buffers": "melt"}, {"policy": {"*": "melt"}}, {"policy": ["*"]}, {"on_nonfinite": "stop"},
    {"capturable": 1}, {"capturable": True, "on_nonfinite": "raise"},
    {"shadow_dtype": "f31"},
]  # fmt: skip


@pytest.mark.parametrize("framework", ["keras", "lightning", "transformers"])
def test_callbacks_refuse_what_no_average_can_have_when_they_are_built(framework: str) -> None:
    pytest.importorskip("torch" if framework == "lightning" else framework)
    pytest.importorskip(framework)
    package = getattr(fastema, framework)
    average = package.EMAWeights if framework == "keras" else package.EMACallback
    for options in INVALID:
        with pytest.raises(FastemaError) as theirs:
            fastema.EMA(WEIGHTS, **options)
        with pytest.raises(type(theirs.value)) as ours:
            average(**options)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(DTypeError, match="shadow_dtype does not fit: an average cannot be i32"):
        average(shadow_dtype="int32")
    # Only the model decides whether these fit.
    average(policy={"*.bias": "skip"}, shadow_dtype="complex64", capturable=True)


@pytest.mark.parametrize("offload", [False, True])
def test_load_state_dict_says_that_it_is_always_strict(offload: bool) -> None:
    torch = pytest.importorskip("torch")
    ema = fastema.EMA([torch.ones(3)] if not offload else torch.nn.Linear(2, 2), offload=offload)
    with pytest.raises(OptionError, match=r"^load_state_dict\(\) .*'strict': every mismatch is an"):
        ema.load_state_dict(ema.state_dict(), strict=False)  # type: ignore[call-arg]


def test_signatures_are_those_of_the_constructors() -> None:
    assert [*inspect.signature(fastema.EMA).parameters][:3] == ["weights", "decay", "zero_debias"]


AVERAGES = {
    "fastema": ["EMA", "SWA", "SMA", "PowerEMA"],
    "fastema.keras": ["EMAWeights"],
    "fastema.lightning": ["EMACallback"],
    "fastema.transformers": ["EMACallback"],
}


@pytest.mark.parametrize("package", AVERAGES)
def test_shared_options_are_in_every_signature_type_hint_and_docstring(package: str) -> None:
    if package != "fastema":
        pytest.importorskip(package.removeprefix("fastema."))
    shared = get_type_hints(AverageOptions)
    settings = inspect.signature(parse_settings).parameters
    assert [*settings] == ["rules", *shared]
    for name in AVERAGES[package]:
        average = getattr(importlib.import_module(package), name)
        parameters = inspect.signature(average).parameters
        assert [*parameters][-len(shared) :] == [*shared]
        hints = get_type_hints(average.__init__)
        assert hints.keys() == {*parameters, "return"}
        for option, its_type in shared.items():
            assert parameters[option].default == settings[option].default
            assert hints[option] == its_type
            assert average.__doc__.count(f"\n{option} : ") == 1
        assert "**options" not in average.__doc__


def test_no_name_is_listed_twice_for_one_option() -> None:
    names = [(option.name, other) for option in hints._OPTIONS for other in option.others.split()]
    assert len(set(names)) == len(names)


def test_attribute_of_another_library_suggests_the_decay() -> None:
    with pytest.raises(AttributeError, match="no attribute 'alpha': use decay, the weight of"):
        _ = fastema.EMA(WEIGHTS).alpha
