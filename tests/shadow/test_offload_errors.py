"""Errors of averages on the host: surfaced at the next call, nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastema
from fastema.errors import LayoutError, NonFiniteError, StateError

from .offloaded import both, build, move

NEEDS = ("torch",)

__all__ = ["both"]


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
