"""What `into=` shares with the model, and what it refuses."""

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastema
from fastema.errors import (
    ArgumentError,
    BridgeError,
    DTypeError,
    LayoutError,
)

from .weights import (
    assert_bits,
    layers,
    snapshot,
    train_,
    values,
)

pytestmark = pytest.mark.torch


def test_shared_tensors_are_left_alone_and_reported() -> None:
    model, target = layers(), layers(seed=1)
    target[0] = model[0]
    ema = fastema.EMA(model, decay=0.5, into=target)
    assert ema.skipped_names == {"0.weight", "0.bias"}
    assert ema.averaged_names == {"1.weight", "1.bias"}
    old, new = values(target[1]), values(model[1])
    ema.update()
    for name, one in values(target[1]).items():
        torch.testing.assert_close(one, (old[name] + new[name]) / 2)


@pytest.mark.parametrize("side", ["model", "target"])
def test_tensors_that_are_shared_no_more_are_an_error(side: str) -> None:
    model, target = layers(), layers(seed=1)
    target[0] = model[0]
    ema = fastema.EMA(model, decay=0.5, into=target)
    ema.update()
    {"model": model, "target": target}[side][0] = nn.Linear(5, 17)
    raw = snapshot(target)
    with pytest.raises(LayoutError, match=r"'0\.weight' was the model's own"):
        ema.update()
    assert_bits(target, raw)


def tied(tie: bool = True) -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    if tie:
        model["b"].weight = model["a"].weight  # type: ignore[assignment]
    return model


def test_ties_of_the_model_must_be_ties_of_the_target() -> None:
    with pytest.raises(LayoutError, match=r"'b\.weight' is not tied to 'a\.weight'"):
        fastema.EMA(tied(True), into=tied(False))
    with pytest.raises(LayoutError, match="overlap"):
        fastema.EMA(tied(False), into=tied(True))
    model, target = tied(True), tied(True)
    expected = (target["a"].weight + model["a"].weight) / 2  # type: ignore[operator]
    fastema.EMA(model, decay=0.5, into=target).update()
    torch.testing.assert_close(target["b"].weight, expected)


@pytest.mark.parametrize("updates", [0, 1, 4])
def test_target_that_is_no_longer_tied_is_refused(updates: int) -> None:
    model, target = tied(), tied()
    ema = fastema.EMA(model, decay=0.5, into=target)
    train_(model, range(updates), ema)
    target["b"].weight = nn.Parameter(target["b"].weight.detach().clone())  # type: ignore[arg-type]
    raw = snapshot(target)
    for call in (ema.update, ema.sync, ema.state_dict, lambda: ema.shadow["b.weight"]):
        with pytest.raises(LayoutError, match=r"'b\.weight' is not tied to 'a\.weight'"):
            call()
    assert_bits(target, raw)


def _overlapping() -> tuple[Any, Any]:
    whole = torch.zeros(10)
    return [whole[:6]], [whole[3:9]]


def test_partial_overlap_is_refused() -> None:
    model, target = _overlapping()
    with pytest.raises(LayoutError, match="overlap"):
        fastema.EMA(model, into=target)


def test_model_itself_is_refused() -> None:
    model = layers()
    for target in (model, list(model.parameters())):
        with pytest.raises((ArgumentError, LayoutError), match=r"model itself|not in the model"):
            fastema.EMA(model, into=target)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"decay": (0.5, 0.9)}, ArgumentError, "one decay"),
        ({"shadow_dtype": "float32"}, ArgumentError, "shadow_dtype"),
        ({"offload": True}, ArgumentError, "offload"),
        ({"overwrite": 1}, ArgumentError, "True or False"),
        ({"into": None, "overwrite": True}, ArgumentError, "pass into= as well"),
    ],
)
def test_options_of_owned_memory_are_refused(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        fastema.EMA(layers(), **{"into": layers(), **options})


def test_containers_that_do_not_fit_are_refused() -> None:
    model = layers()
    other = nn.Sequential(nn.Linear(5, 17), nn.Linear(17, 4))
    with pytest.raises(LayoutError, match=r"'1\.weight' is \[4, 17\], in the model \[3, 17\]"):
        fastema.EMA(model, into=other)
    with pytest.raises(LayoutError, match=r"'2\.weight' is not in the model"):
        fastema.EMA(model, into=nn.Sequential(*layers(), nn.Linear(3, 3)))
    with pytest.raises(LayoutError, match=r"'1\.weight' is missing"):
        fastema.EMA(model, into=nn.Sequential(nn.Linear(5, 17)))
    with pytest.raises(DTypeError, match="i64"):
        fastema.EMA([torch.zeros(3)], into=[torch.zeros(3, dtype=torch.int64)])
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    with pytest.raises(BridgeError, match="stay in place"):
        fastema.EMA([np.zeros(3)], into=[read_only])


def test_tensors_that_share_elements_are_refused() -> None:
    for target in (torch.zeros(4).expand(3, 4), torch.zeros(6).as_strided((3, 4), (1, 1))):
        with pytest.raises(LayoutError, match=r"into= 0: .*share one element"):
            fastema.EMA([torch.ones(3, 4)], into=[target])


@pytest.mark.parametrize("replaced", [False, True])
def test_arrays_that_become_read_only_are_refused(replaced: bool) -> None:
    model, target = [np.zeros(3)], [np.ones(3)]
    ema = fastema.EMA(model, decay=0.5, into=target)
    ema.update()
    ema.update()
    state = ema.state_dict()
    if replaced:
        target[0] = np.ones(3)
    target[0].flags.writeable = False
    raw = target[0].copy()
    for call in (ema.update, ema.sync, lambda: ema.load_state_dict(state)):
        with pytest.raises(LayoutError, match=r"into= 0: .*read-only"):
            call()
    assert (target[0] == raw).all()
    assert ema.num_updates == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_average_model_and_target_are_freed_without_the_collector(frozen: bool) -> None:
    model = layers()
    model[0].weight.requires_grad_(not frozen)
    target = copy.deepcopy(model)
    ema = fastema.EMA(model, decay=0.5, into=target)
    train_(model, range(3), ema)
    with ema.swapped():
        dict(ema.shadow)
    gone = [weakref.ref(one) for one in (ema, *model.parameters(), *target.parameters())]
    gc.collect()
    gc.disable()
    try:
        del ema, model, target
        assert not any(one() is not None for one in gone)
    finally:
        gc.enable()


def test_names_that_a_policy_skips_may_be_missing_or_differ() -> None:
    model = nn.Sequential(*layers(), nn.Linear(3, 9))
    target = nn.Sequential(*layers(seed=1), nn.Linear(3, 4))
    ema = fastema.EMA(model, decay=0.5, into=target, policy={"2.*": "skip"})
    old = values(target)
    ema.update()
    assert torch.equal(target[2].weight, old["2.weight"])
    assert not torch.equal(target[0].weight, old["0.weight"])


def test_given_tensors_are_moved_by_their_owner() -> None:
    ema = fastema.EMA(layers(), into=layers())
    with pytest.raises(ArgumentError, match="your own"):
        ema.to(torch.float64)
    with pytest.raises(ArgumentError, match="your own"):
        ema.to("cpu")
