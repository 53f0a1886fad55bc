"""Averages on the host beside the training step, over a link that is as slow as wanted."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastema
from fastema.errors import ArgumentError, BridgeError, LayoutError, NonFiniteError, StateError
from fastema.shadow.offload import OffloadedEMA

NEEDS = ("torch",)


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    model[0].bias.requires_grad_(False)
    return model.to(dtype)


def move(model: nn.Module, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    with torch.no_grad():
        for one in model.state_dict().values():
            if one.is_floating_point():
                one.add_(torch.randn(one.shape, generator=generator).to(one.dtype))
            else:
                one.add_(1)


def assert_same(one: Any, other: Any) -> None:
    assert one.num_updates == other.num_updates
    assert list(one.shadow) == list(other.shadow)
    for name, wanted in other.shadow.items():
        assert one.shadow[name].dtype == wanted.dtype
        assert torch.equal(one.shadow[name], wanted), name


def assert_all_same(several: Any, others: Any) -> None:
    """Assert that mappings of names to tensors are equal, one by one."""
    for one, other in zip(several, others, strict=True):
        assert list(one) == list(other)
        for name in other:
            assert torch.equal(one[name], other[name]), name


OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16 with float32": (torch.bfloat16, {"shadow_dtype": "float32"}),
    "two halves": (torch.bfloat16, {"shadow_dtype": "bf16+16"}),
    "random bits": (torch.bfloat16, {"seed": 3}),
    "several": (torch.float32, {"decay": (0.5, 0.9), "update_every": 2}),
    "all averaged": (torch.float32, {"buffers": "average", "frozen": "copy"}),
    "patterns": (torch.float32, {"policy": {"1.*": "skip", "2.*": "average"}}),
    "debiased, later": (torch.float32, {"zero_debias": True, "start_after": 2}),
}


@pytest.fixture(params=OPTIONS)
def both(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Any]:
    """A model with an average on the host, and one beside it."""
    dtype, options = OPTIONS[request.param]
    model = build(dtype)
    options = {"decay": 0.75, **options}
    offloaded = fastema.EMA(model, offload=True, **options)
    return model, offloaded, fastema.EMA(model, **options)


def train(model: nn.Module, averages: tuple[Any, ...], steps: int = 5) -> None:
    for n in range(steps):
        averages[0].wait()
        move(model, n)
        for one in averages:
            one.update()


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


def test_states_go_from_one_kind_to_the_other(both: Any) -> None:
    model, offloaded, ema = both
    train(model, (offloaded, ema))
    state = offloaded.state_dict()
    wanted = ema.state_dict()
    assert state.keys() == wanted.keys()
    assert state["num_updates"] == wanted["num_updates"]
    for part in ("shadow", "residual"):
        assert_all_same(state.get(part, ()), wanted.get(part, ()))
    ema.load_state_dict(state)
    offloaded.load_state_dict(wanted)
    train(model, (offloaded, ema), 2)
    assert_all_same(offloaded.shadows, ema.shadows)


def test_other_models_get_the_average(both: Any) -> None:
    model, offloaded, ema = both
    train(model, (offloaded, ema))
    found = offloaded.model_state_dict(which=0)
    wanted = ema.model_state_dict(which=0)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    one, other = build(model[0].weight.dtype), build(model[0].weight.dtype)
    offloaded.copy_to(one, which=0)
    ema.copy_to(other, which=0)
    for name, tensor in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name


# -- the order of events --------------------------------------------------------------------------


class SlowLink:
    """A link that waits before each tensor until ``go`` is set, and records what happens."""

    def __init__(self, ema: Any) -> None:
        self.go, self.events = threading.Event(), []
        ema._link.delay = self

    def __call__(self, number: int) -> None:
        self.events.append(f"copy {number}")
        assert self.go.wait(20)


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


def test_without_a_fence_the_same_run_mixes_steps() -> None:
    """What the fence is for: the test before would notice if it were not there."""
    model = build()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    offloaded, ema = (fastema.EMA(model, decay=0.5, offload=on) for on in (True, False))
    offloaded._end_fences()
    link = SlowLink(offloaded)
    ema.update()
    offloaded.update()
    for one in parameters:
        one.grad = torch.ones_like(one)
    optimizer.step()
    link.go.set()
    assert not torch.equal(offloaded.shadow["2.weight"], ema.shadow["2.weight"])


def test_wait_is_the_fence_of_other_loops() -> None:
    model = build()
    offloaded, ema = (fastema.EMA(model, decay=0.5, offload=on) for on in (True, False))
    offloaded.wait()
    offloaded._link.delay = lambda number: time.sleep(0.02)
    for n in range(3):
        offloaded.wait()
        move(model, n)
        offloaded.update()
        ema.update()
    assert_same(offloaded, ema)
    assert offloaded.offload_stats.seconds_waited > 0.0


def test_it_follows_optimizers() -> None:
    model = build()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    offloaded, ema = (fastema.EMA(model, decay=0.5, offload=on) for on in (True, False))
    offloaded._link.delay = lambda number: time.sleep(0.002)
    offloaded.follow(optimizer)
    for n in range(5):
        for one in parameters:
            one.grad = torch.full_like(one, n - 1.7)
        optimizer.step()
        ema.update()
    assert_same(offloaded, ema)


def test_the_stats_say_what_it_cost() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True, buffers="skip")
    nbytes = sum(one.nbytes for one in model.parameters() if one.requires_grad)
    assert offloaded.offload_stats == (0, 0.0, 0, 0)
    link = SlowLink(offloaded)
    offloaded.update()
    assert offloaded.offload_stats.queue_depth == 1
    assert offloaded.num_updates == 1
    link.go.set()
    offloaded.state_dict()
    assert offloaded.offload_stats[::2] == (0, nbytes)
    assert offloaded.offload_stats.steps_skipped == 0
    with offloaded.swapped():
        pass
    assert offloaded.offload_stats.bytes_moved == 4 * nbytes


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


def test_it_is_saved_while_updates_come_from_another_thread(tmp_path: Path) -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True)
    offloaded._link.delay = lambda number: time.sleep(0.0005)
    stop = threading.Event()

    def update() -> None:
        while not stop.is_set():
            offloaded.update()

    thread = threading.Thread(target=update)
    thread.start()
    for _ in range(5):
        fastema.checkpoint.save(offloaded, tmp_path / "ema.safetensors")
        with offloaded.lock, offloaded.swapped():
            assert offloaded.applied
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    fastema.checkpoint.load_into(offloaded, tmp_path / "ema.safetensors")


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


# -- errors ---------------------------------------------------------------------------------------


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


def test_steps_that_were_left_out_count_though_an_update_raises() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload="skip", on_nonfinite="raise")
    reference = fastema.EMA(model, decay=0.5)
    link = SlowLink(offloaded)
    offloaded.update()
    offloaded.update()  # left out
    link.go.set()
    offloaded.state_dict()
    good = model[2].weight.detach().clone()
    for call in (
        lambda: (offloaded.update(), offloaded.state_dict()),
        lambda: offloaded.update_from_host(model.state_dict()),
    ):
        with torch.no_grad():
            model[2].weight.fill_(torch.nan)
        with pytest.raises(NonFiniteError):
            call()
        with torch.no_grad():
            model[2].weight.copy_(good)
    reference.update()
    move(model, 1)
    offloaded.update()
    reference.update(steps=2)
    assert_same(offloaded, reference)


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


def test_counters_while_an_update_is_under_way() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True)
    before = offloaded.version
    seen = set()
    for count in range(1, 200):
        offloaded.update()
        seen |= {offloaded.num_updates - count for _ in range(20)}
    assert seen == {0}
    assert offloaded.version == before + 199  # up to date with what is read next


def test_skipped_updates_are_counted() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True, on_nonfinite="skip")
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    offloaded.update()
    assert (offloaded.num_skipped, offloaded.num_updates) == (1, 0)


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


def test_a_model_that_changed_is_refused() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True)
    model[2] = nn.Linear(4, 3, bias=False)
    with pytest.raises(LayoutError, match=r"'2\.weight' is now \[3, 4\], was \[4, 4\]"):
        offloaded.update()


def test_names_are_those_of_the_model() -> None:
    model = build()
    model.add_module("tied", model[2])
    offloaded, ema = (fastema.EMA(model, decay=0.5, offload=on) for on in (True, False))
    for one in (offloaded, ema):
        assert one.skipped_names == {"0.bias"}
        assert one.aliases == {"tied.weight": "2.weight"}
    model[0].bias.requires_grad_(True)
    for one in (offloaded, ema):
        with pytest.raises(LayoutError, match=r"'0\.bias' is trained now but was frozen"):
            one.update()


def test_a_model_in_another_dtype_gets_the_whole_precision() -> None:
    model = build(torch.bfloat16)
    options: dict[str, Any] = {"decay": 0.9, "shadow_dtype": "float32"}
    offloaded, ema = (fastema.EMA(model, offload=on, **options) for on in (True, False))
    train(model, (offloaded, ema))
    one, other = build(), build()
    assert_all_same([offloaded.model_state_dict(one)], [ema.model_state_dict(one)])
    offloaded.copy_to(one)
    ema.copy_to(other)
    assert_all_same([one.state_dict()], [other.state_dict()])
    assert not torch.equal(one[2].weight, one[2].weight.bfloat16().float())
    train(model, (offloaded, ema), 1)
    assert_all_same(offloaded.shadows, ema.shadows)


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


# -- the model that moves -------------------------------------------------------------------------


def test_weights_that_are_replaced_are_found_again() -> None:
    model = build()
    offloaded, ema = (fastema.EMA(model, decay=0.5, offload=on) for on in (True, False))
    for n in range(4):
        offloaded.wait()
        if n == 1:
            model[2].weight.data = model[2].weight.data.clone()
        if n == 2:
            model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
        move(model, n)
        offloaded.update()
        ema.update()
    assert_same(offloaded, ema)


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


def test_weights_that_are_on_the_host_already() -> None:
    model = build()
    offloaded, ema = (fastema.EMA(model, decay=0.5, offload=on) for on in (True, False))
    move(model, 1)
    ema.update()
    masters: dict[str, Tensor] = {n: one.clone() for n, one in model.state_dict().items()}
    offloaded.update_from_host(masters)
    assert_same(offloaded, ema)
    assert offloaded.offload_stats.bytes_moved == 0
    masters["2.weight"] = masters["2.weight"].double()
    with pytest.raises(LayoutError, match=r"'2\.weight' is now torch\.float64"):
        offloaded.update_from_host(masters)
    del masters["2.weight"]
    with pytest.raises(LayoutError, match=r"'2\.weight' is gone"):
        offloaded.update_from_host(masters)
    assert_same(offloaded, ema)


def test_tied_weights_are_one() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    offloaded, ema = (fastema.EMA(model, decay=0.5, offload=on) for on in (True, False))
    train(model, (offloaded, ema), 2)
    assert_same(offloaded, ema)
    found, wanted = offloaded.model_state_dict(), ema.model_state_dict()
    assert list(found) == list(wanted) == ["a.weight", "b.weight"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# -- the end --------------------------------------------------------------------------------------


def test_nothing_is_kept_alive() -> None:
    model = build()
    offloaded = fastema.EMA(model, decay=0.5, offload=True)
    offloaded.update()
    offloaded.state_dict()
    gone = weakref.ref(offloaded)
    del offloaded
    gc.collect()
    assert gone() is None
    torch.optim.SGD(model.parameters(), lr=0.1).step()


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
