"""Averages on the host, updated concurrently with the training step."""

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import fastema
from fastema.average.offload import OffloadedEMA
from fastema.errors import ArgumentError, BridgeError, LayoutError, NonFiniteError, StateError

from ..support.states import nested
from .kinds import assert_unchanged, full_state, which
from .weights import (
    BUFFERS,
    Net,
    assert_bits,
    assert_same,
    bits,
    net,
    refresh_,
    snapshot,
    tensors_of,
)

pytestmark = pytest.mark.torch

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 with float32": {"dtype": torch.bfloat16, "shadow_dtype": "float32"},
    "two halves": {"dtype": torch.bfloat16, "shadow_dtype": "bf16+16"},
    "random bits": {"dtype": torch.bfloat16, "seed": 3},
    "several": {"decay": (0.5, 0.9), "update_every": 2},
    "all averaged": {"buffers": "average", "frozen": "copy"},
    "patterns": {"policy": {"norm.*": "skip", "head.*": "average"}},
    "debiased, later": {"zero_debias": True, "start_after": 2},
}


def build(dtype: torch.dtype | None = None, **options: Any) -> tuple[Net, Any, fastema.EMA]:
    """Return a model with a frozen bias, its offloaded average, and an ordinary average."""
    model = net(0, dtype)
    model.conv.bias.requires_grad_(False)
    options = {"decay": 0.75, "offload": True, **options}
    return model, fastema.EMA(model, **options), fastema.EMA(model, **{**options, "offload": False})


def train(model: Net, offloaded: Any, ema: fastema.EMA, steps: int = 5) -> None:
    for _ in range(steps):
        offloaded.wait()
        refresh_(model, ema.num_updates + 1)
        offloaded.update()
        ema.update()


def block_link(ema: Any) -> tuple[threading.Event, list[str]]:
    """Make the link wait for the returned event before each tensor, and record its copies."""
    go, events = threading.Event(), []

    def delay(number: int) -> None:
        events.append(f"copy {number}")
        assert go.wait(20)

    ema._link.delay = delay
    return go, events


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_offloaded_average_equals_an_ordinary_one_to_the_bit(options: dict[str, Any]) -> None:
    model, offloaded, ema = build(**options)
    assert isinstance(offloaded, OffloadedEMA)
    assert isinstance(offloaded, fastema.EMA)
    train(model, offloaded, ema)
    assert full_state(offloaded) == full_state(ema)
    assert list(offloaded.shadows[-1]) == list(ema.shadows[-1])
    assert offloaded.averaged_names == ema.averaged_names
    with ema.swapped(**which(ema)):
        wanted = snapshot(model)
    for _ in range(2):
        with assert_unchanged(model, offloaded), offloaded.swapped(**which(ema)) as held:
            assert held is model
            assert offloaded.applied
            assert_bits(model, wanted)
    train(model, offloaded, ema, 2)
    assert full_state(offloaded) == full_state(ema)


def test_sync_copies_the_current_weights() -> None:
    model = net()
    ema = fastema.EMA(model, decay=0.5, offload=True)
    ema.update()
    refresh_(model, 1)
    ema.sync()
    assert_same({name: bits(one) for name, one in ema.shadow.items()}, snapshot(model))
    with ema.swapped(), pytest.raises(StateError, match="sync"):
        ema.sync()


def test_update_returns_before_the_copy_and_the_next_step_waits_for_it() -> None:
    model, offloaded, ema = build()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0, foreach=True)
    go, events = block_link(offloaded)
    refresh_(model, 1)
    ema.update()
    offloaded.update()
    events.append("update returned")
    for one in parameters:
        one.grad = torch.ones_like(one)

    def release() -> None:
        events.append("released")
        go.set()

    timer = threading.Timer(0.1, release)
    timer.start()
    optimizer.step()
    events.append("stepped")
    timer.join()
    assert full_state(offloaded) == full_state(ema)
    others = [one for one in events if not one.startswith("copy")]
    assert others == ["update returned", "released", "stepped"]
    assert events.index("copy 1") > events.index("released")
    assert events[-1] == "stepped"


@pytest.mark.parametrize("policy", ["copy", "average"])
@pytest.mark.parametrize("form", ["module", "dict"])
def test_tensors_that_forward_passes_write_are_copied_before_update_returns(
    policy: Any, form: str
) -> None:
    model = net()
    model.register_buffer("seen", torch.tensor([False, True]))
    model.conv.bias.requires_grad_(False)  # like a teacher's, which a forward pass moves
    held: Any = model if form == "module" else dict(tensors_of(model))
    options = {"policy": dict.fromkeys((*BUFFERS, "seen", "conv.bias"), policy)}
    offloaded, ema = (fastema.EMA(held, 0.75, offload=on, **options) for on in (True, False))
    forward = [*model.buffers(), model.conv.bias]
    for n in range(1, 4):
        offloaded.wait()
        refresh_(model, n)
        go, _ = block_link(offloaded)
        ema.update()
        offloaded.update()
        refresh_(dict(enumerate(forward)), n + 10)
        go.set()
        assert full_state(offloaded) == full_state(ema)


def test_updates_skipped_while_behind_count_in_the_next_update() -> None:
    model, offloaded, ema = build(offload="skip")
    go, _events = block_link(offloaded)
    refresh_(model, 1)
    offloaded.update()
    ema.update()
    for n in (1, 2):  # do not wait for the first update
        offloaded.update(steps=n)
    assert offloaded.num_updates == 1
    assert offloaded.offload_stats.steps_skipped == 3
    go.set()
    assert nested(offloaded.state_dict())["num_updates"] == 1
    for steps in (4, 1):
        refresh_(model, steps)
        offloaded.update()
        ema.update(steps=steps)
        assert full_state(offloaded) == full_state(ema)


@pytest.mark.parametrize("reaction", ["skip", "raise"])
def test_steps_skipped_while_behind_outlive_an_update_skipped_for_a_nan(reaction: Any) -> None:
    model, offloaded, ema = build(offload="skip", on_nonfinite=reaction)
    go, _events = block_link(offloaded)
    refresh_(model, 1)
    ema.update()
    for _ in range(3):  # two of them do not wait for the first one
        offloaded.update()
    go.set()
    offloaded._drain()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    offloaded.update()
    with pytest.raises(NonFiniteError) if reaction == "raise" else nullcontext():
        offloaded.state_dict()
    refresh_(model, 2)
    offloaded.update()
    ema.update(steps=3)
    offloaded._drain()
    skipped = int(reaction == "skip")
    assert full_state(offloaded) == {**full_state(ema), "num_skipped": skipped}


def test_steps_skipped_before_a_state_is_loaded_do_not_count_after_it() -> None:
    model, offloaded, ema = build(offload="skip")
    state = offloaded.state_dict()
    go, _events = block_link(offloaded)
    for _ in range(3):
        offloaded.update()
    go.set()
    offloaded.load_state_dict(state)
    refresh_(model, 2)
    offloaded.update()
    ema.update()
    assert full_state(offloaded) == full_state(ema)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "NumPy": (lambda: fastema.EMA([np.ones(3)], offload=True), BridgeError, "PyTorch models only"),
    "capturable": (lambda: build(capturable=True), ArgumentError, "offload=True on the host"),
    "another word": (
        lambda: build(offload="drop"),
        ArgumentError,
        "offload='drop': expected True, False or 'skip'",
    ),
    "a subclass": (
        lambda: type("Own", (fastema.EMA,), {})(net(), offload=True),
        ArgumentError,
        "not for Own",
    ),
    "a GPU": (lambda: build()[1].to("cuda"), ArgumentError, "stays on the CPU"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_offload_is_refused(name: str) -> None:
    build_it, error, said = REFUSED[name]
    with pytest.raises(error, match=said):
        build_it()


CALLS: dict[str, Callable[[Any], Any]] = {
    "update": lambda ema: ema.update(),
    "shadow": lambda ema: ema.shadow["conv.weight"],
    "state_dict": lambda ema: ema.state_dict(),
    "swapped": lambda ema: ema.apply_shadow(),
    "copy_to": lambda ema: ema.copy_to(net(1)),
}


@pytest.mark.parametrize("call", CALLS)
def test_error_in_the_worker_is_raised_by_the_next_call(call: str) -> None:
    model, offloaded, _ema = build(on_nonfinite="raise")
    before = full_state(offloaded)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    offloaded.update()
    with pytest.raises(NonFiniteError, match=r"'head\.weight'"):
        CALLS[call](offloaded)
    assert full_state(offloaded) == before
    with torch.no_grad():
        model.head.weight[0, 0] = 1.0
    offloaded.update()
    assert nested(offloaded.state_dict())["num_updates"] == 1


def test_weights_written_while_applied_raise_and_are_restored() -> None:
    model, offloaded, ema = build()
    train(model, offloaded, ema, 1)
    with assert_unchanged(model, offloaded):
        with pytest.raises(StateError, match=r"'head\.weight'"), offloaded.swapped():
            model.head.weight.detach().add_(1)
        with pytest.raises(StateError, match="applied"), offloaded.swapped():
            offloaded.update()


def test_refused_restore_loses_nothing() -> None:
    model = net()
    offloaded = fastema.EMA(model, 0.75, offload=True)
    refresh_(model, 1)
    offloaded.update()
    with assert_unchanged(model, offloaded):
        offloaded.apply_shadow()
        with pytest.raises(StateError, match="applied to another model"):
            offloaded.restore(net())
        model.half()
        with pytest.raises(LayoutError, match=r"'head\.weight' is torch\.float16"):
            offloaded.restore()
        model.float()
        assert offloaded.applied
        offloaded.restore()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_fork_waits_for_an_update_and_both_processes_continue(python: Callable[..., str]) -> None:
    said = python(
        """
        import os, time, warnings, torch, fastema
        warnings.simplefilter("ignore")  # forking with threads is what is tested
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = fastema.EMA(model, decay=0.5, offload="skip")
        ema._link.delay = lambda number: time.sleep(0.1)
        ema.update()
        child = os.fork()
        optimizer.step()
        ema.update()
        if child:
            os.waitpid(child, 0)
        ema.state_dict()  # waits for the update
        print(ema.num_updates, ema.offload_stats.steps_skipped, flush=True)
        os._exit(0)
        """
    )
    assert said.splitlines() == ["2 0"] * 2


def test_running_update_is_finished_at_exit(python: Callable[..., str]) -> None:
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
