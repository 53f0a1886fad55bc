"""Averages on the host, updated beside the training step."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.errors import ArgumentError, BridgeError, LayoutError, NonFiniteError, StateError
from fastema.shadow.offload import OffloadedEMA

from .offloaded import SlowLink, assert_all_same, assert_same, both, build, move, train

NEEDS = ("torch",)

__all__ = ["both"]


def test_it_is_the_average_to_the_bit(both: Any) -> None:
    model, offloaded, ema = both
    assert isinstance(offloaded, OffloadedEMA)
    assert isinstance(offloaded, fastema.EMA)
    train(model, (offloaded, ema))
    assert_all_same(offloaded.shadows, ema.shadows)
    assert offloaded.num_updates == ema.num_updates == 5
    assert offloaded.averaged_names == ema.averaged_names


def test_the_model_holds_the_average_and_gets_its_weights_back(both: Any) -> None:
    model, offloaded, ema = both
    train(model, (offloaded, ema))
    which = len(offloaded.shadows) - 1
    raw = {name: one.clone() for name, one in model.state_dict().items()}
    with ema.swapped(which=which):
        wanted = {name: one.clone() for name, one in model.state_dict().items()}
    for _ in range(2):
        with offloaded.swapped(which=which) as held:
            assert held is model
            assert offloaded.applied
            for name, one in model.state_dict().items():
                assert torch.equal(one, wanted[name]), name
        for name, one in model.state_dict().items():
            assert torch.equal(one, raw[name]), name
    train(model, (offloaded, ema), 2)
    assert_all_same(offloaded.shadows, ema.shadows)


# -- the order of events --------------------------------------------------------------------------


def test_update_returns_before_the_weights_are_copied_and_a_step_waits_for_them() -> None:
    model = build()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0, foreach=True)
    offloaded, ema = (fastema.EMA(model, decay=0.5, offload=on) for on in (True, False))
    link = SlowLink(offloaded)
    move(model, 0)
    ema.update()
    offloaded.update()
    link.events.append("update returned")
    for one in parameters:
        one.grad = torch.ones_like(one)

    def release() -> None:
        time.sleep(0.1)
        link.events.append("released")
        link.go.set()

    thread = threading.Thread(target=release)
    thread.start()
    optimizer.step()
    link.events.append("stepped")
    thread.join()
    assert_same(offloaded, ema)
    events = [one for one in link.events if not one.startswith("copy")]
    assert events == ["update returned", "released", "stepped"]
    assert link.events.index("copy 1") > link.events.index("released")
    assert link.events.index("stepped") == len(link.events) - 1


def test_any_delays_give_the_same_average() -> None:
    chance = random.Random(4)
    model = build(torch.bfloat16)
    options: dict[str, Any] = {"decay": 0.9, "shadow_dtype": "float32"}
    offloaded, ema = (fastema.EMA(model, offload=on, **options) for on in (True, False))
    offloaded._link.delay = lambda number: time.sleep(chance.choice((0.0, 0.0, 0.002)))
    for n in range(150):
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0.0, 0.003))
        offloaded.wait()
        move(model, n)
        offloaded.update()
        ema.update()
        if chance.random() < 0.1:
            with offloaded.swapped():
                held = model[2].weight.detach().clone()
            with ema.swapped():
                assert torch.equal(held, model[2].weight)
    assert_same(offloaded, ema)


def test_threads_may_update_at_once() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True)
    offloaded._link.delay = lambda number: time.sleep(0.001)
    threads = [
        threading.Thread(target=lambda: [offloaded.update() for _ in range(10)]) for _ in range(3)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert offloaded.state_dict()["num_updates"] == 30


def test_it_stays_on_the_host() -> None:
    offloaded = fastema.EMA(build(), decay=0.5, offload=True)
    assert offloaded.to(torch.float64).shadow["2.weight"].dtype == torch.float64
    assert offloaded.to("cpu") is offloaded
    with pytest.raises(ArgumentError, match="it stays"):
        offloaded.to("cuda")


def test_updates_are_left_out_while_it_is_behind_and_the_horizon_is_kept() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload="skip")
    reference = fastema.EMA(model, decay=0.5)
    link = SlowLink(offloaded)
    move(model, 0)
    offloaded.update()
    reference.update()
    for n in (1, 2):  # these do not wait for the first
        offloaded.update(steps=n)
    assert offloaded.num_updates == 1
    assert offloaded.offload_stats.steps_skipped == 3
    link.go.set()
    assert offloaded.state_dict()["num_updates"] == 1
    move(model, 3)
    offloaded.update()
    reference.update(steps=4)
    assert_same(offloaded, reference)
    assert offloaded.num_updates == 5
    move(model, 4)
    offloaded.update()
    reference.update()
    assert_same(offloaded, reference)


# -- the model that moves -------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "NumPy": (lambda: fastema.EMA([np.ones(3)], offload=True), BridgeError, "models of PyTorch"),
    "capturable": (
        lambda: fastema.EMA(build(), offload=True, capturable=True),
        ArgumentError,
        "offload=True on the host",
    ),
    "another word": (
        lambda: fastema.EMA(build(), offload="drop"),  # type: ignore[arg-type]
        ArgumentError,
        "offload='drop': expected True, False or 'skip'",
    ),
    "a subclass": (
        lambda: type("Own", (fastema.EMA,), {})(build(), offload=True),
        ArgumentError,
        "not for Own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_on_the_host_is_refused(name: str) -> None:
    build_it, error, said = REFUSED[name]
    with pytest.raises(error, match=said):
        build_it()


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_of_fork_goes_on(python: Callable[..., str]) -> None:
    said = python(
        """
        import os, warnings, torch, fastema
        warnings.simplefilter("ignore")  # that there are threads is what is tested
        model = torch.nn.Linear(3, 2)
        ema = fastema.EMA(model, decay=0.5, offload=True)
        ema.update()
        ema.state_dict()
        ema.update()
        child = os.fork()
        if not child:
            ema.update()
            print("child", ema.state_dict()["num_updates"] >= 2, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print("parent", ema.state_dict()["num_updates"])
        """
    )
    assert said.splitlines() == ["child True", "parent 2"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_waits_for_what_is_under_way(python: Callable[..., str]) -> None:
    said = python(
        """
        import os, time, warnings, torch, fastema
        warnings.simplefilter("ignore")
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = fastema.EMA(model, decay=0.5, offload="skip")
        ema._link.delay = lambda number: time.sleep(0.1)
        ema.update()
        child = os.fork()
        if not child:
            optimizer.step()
            ema.update()
            print(ema.state_dict()["num_updates"], ema.offload_stats.steps_skipped, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        """
    )
    assert said.split() == ["2", "0"]


def test_an_update_under_way_is_finished_at_exit(python: Callable[..., str]) -> None:
    said = python(
        """
        import time, torch, fastema
        model = torch.nn.Linear(3, 2)
        ema = fastema.EMA(model, decay=0.5, offload=True)
        ema._link.delay = lambda number: (time.sleep(0.1), print("copied", flush=True))
        ema.update()
        """
    )
    assert said.splitlines() == ["copied", "copied"]


CALLS: dict[str, Callable[[Any], Any]] = {
    "update": lambda ema: ema.update(),
    "shadow": lambda ema: ema.shadow["0.weight"],
    "state_dict": lambda ema: ema.state_dict(),
    "swapped": lambda ema: ema.apply_shadow(),
    "copy_to": lambda ema: ema.copy_to(build()),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_the_worker_raises_the_next_call_does(call: str) -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True, on_nonfinite="raise")
    before = {name: one.clone() for name, one in offloaded.shadow.items()}
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    offloaded.update()
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        CALLS[call](offloaded)
    assert offloaded.num_updates == 0
    for name, one in before.items():
        assert torch.equal(offloaded.shadow[name], one)
    with torch.no_grad():
        model[2].weight[0, 0] = 1.0
    offloaded.update()
    assert offloaded.state_dict()["num_updates"] == 1


def test_an_update_that_cannot_be_started_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True)

    def submit(*_: Any) -> Any:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.ThreadPoolExecutor.submit", submit)
        with pytest.raises(RuntimeError, match="start new thread"):
            offloaded.update()
    offloaded.wait()
    assert (offloaded.num_updates, offloaded.offload_stats.queue_depth) == (0, 0)
    offloaded.update()
    assert offloaded.state_dict()["num_updates"] == 1


def test_weights_written_while_it_is_applied_are_noticed_and_come_back() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True)
    move(model, 1)
    offloaded.update()
    raw = model[2].weight.detach().clone()
    with pytest.raises(StateError, match=r"'2\.weight'"), offloaded.swapped(), torch.no_grad():
        model[2].weight.add_(1)
    assert torch.equal(model[2].weight, raw)
    with pytest.raises(StateError, match="applied"), offloaded.swapped():
        offloaded.update()
    assert not offloaded.applied


def test_restore_is_refused_where_it_cannot_be_done_and_loses_nothing() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True)
    move(model, 1)
    raw = model[2].weight.detach().clone()
    offloaded.update()
    offloaded.apply_shadow()
    with pytest.raises(StateError, match="applied to another model"):
        offloaded.restore(build())
    model.half()
    with pytest.raises(LayoutError, match=r"'2\.weight' is now torch\.float16"):
        offloaded.restore()
    model.float()
    assert offloaded.applied
    offloaded.restore()
    assert torch.equal(model[2].weight, raw)
