"""Composer's averages of models: ``compute_ema``, their schedule as a rule, their checkpoints."""

from __future__ import annotations

import re
import reprlib
import weakref
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from fastema.checkpoint.transfer import (
    averages_of,
    averages_or_copies,
    by_plain_name,
    mapping_in,
    take_over,
    whole_in,
)
from fastema.compat.modules import NamedAverager
from fastema.compat.shares import refuse_no_share
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, BridgeError, CheckpointError
from fastema.rules import Aligned
from fastema.shadow import EMA

__all__ = ["compute_ema", "export", "load", "rule"]

_PARTS: Final = ("named_parameters_dict", "named_buffers_dict")
"""The two dicts of Composer's ``EMAParameters``."""

_TIME: Final = re.compile(r"(\d+)(ba|ep)")


class _CallState:
    """The averager of averages that a caller keeps, and its number of calls."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.tied: dict[str, str] = {}
        self.averager = NamedAverager(())
        self.calls = 0

    def update(self, averages: dict[str, Tensor], model: nn.Module, weight: float) -> None:
        """Update averages by name, those too that have further names in the model."""
        if self.names != averages.keys():
            names, tied = frozenset(averages), _tied(model, averages)
            averager = NamedAverager([*averages, *tied])
            self.tied, self.averager, self.names = tied, averager, names
        more = {name: averages[first] for name, first in self.tied.items()}
        follows = self.averager.of({**averages, **more})
        with defer_signals():  # an update is done and counted, or neither
            follows.update(model, weight, self.calls)
            self.calls += 1


_call_states: weakref.WeakKeyDictionary[Any, _CallState] = weakref.WeakKeyDictionary()
"""By the object that holds the averages; does not keep it alive."""


def _tied(model: nn.Module, averages: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names that averaged parameters have in a model, to the one of the average."""
    named = by_plain_name(dict(model.named_parameters(remove_duplicate=False)))
    held = {id(one): name for name, one in named.items() if name in averages}
    return {
        name: held[id(one)]
        for name, one in named.items()
        if name not in averages and id(one) in held
    }


def _averages(ema_model: Any) -> dict[str, Tensor]:
    """The tensors that are averages, by plain names."""
    if isinstance(ema_model, nn.Module):
        found = ema_model.state_dict(keep_vars=True)
        named = {name: one for name, one in found.items() if isinstance(one, Tensor)}
    elif all(isinstance(getattr(ema_model, part, None), dict) for part in _PARTS):
        parts = (getattr(ema_model, part) for part in _PARTS)
        named = {name: one for part in parts for name, one in part.items()}
    else:
        raise BridgeError(
            f"ema_model is a {type(ema_model).__name__}: expected a torch.nn.Module, or an object "
            f"with the dicts {' and '.join(_PARTS)}"
        )
    return by_plain_name(named)


def compute_ema(model: nn.Module, ema_model: Any, smoothing: float = 0.99) -> None:
    """``ema = smoothing * ema + (1 - smoothing) * model`` in place, for parameters and buffers.

    The function of ``composer/algorithms/ema/ema.py``, version 0.32. There a tensor that one side
    lacks is left out silently; here only what is frozen, or a buffer, may have no average. Random
    bits depend on the number of calls with this ``ema_model``; a resumed run draws others.

    Parameters
    ----------
    model : torch.nn.Module
        The weights in training. A sharded (FSDP) model has to be summoned by the caller.
    ema_model : torch.nn.Module, or Composer's EMAParameters
        What is written: whatever its state dict holds, or its dicts of parameters and buffers.
    smoothing : float
        Weight of the old average, in [0, 1].

    Raises
    ------
    LayoutError
        Naming the averages that the model lacks, the trained parameters that have no average, and
        those with other shapes; nothing was written.
    ArgumentError, BridgeError
        For a ``smoothing`` out of range; for another kind of ``ema_model``.

    Examples
    --------
    >>> import copy, torch
    >>> model = torch.nn.Linear(3, 2)
    >>> ema_model = copy.deepcopy(model)
    >>> compute_ema(model, ema_model, smoothing=0.9)
    """
    refuse_no_share(smoothing, "smoothing")
    averages = _averages(ema_model)
    _call_states.setdefault(ema_model, _CallState()).update(averages, model, 1.0 - smoothing)


def rule(
    half_life: str | None = "1000ba",
    smoothing: float | None = None,
    update_interval: str | None = None,
) -> Aligned:
    """The schedule of Composer's ``EMA``: ``smoothing = 2 ** (-update_interval / half_life)``.

    It is the decay per batch (or epoch), for ``fastema.EMA(model, decay=rule(...), update_every=k,
    buffers="average", start_after=1)``, with ``k`` the number in ``update_interval``; call
    ``update()`` once per batch (or epoch). As with Composer's ``ema_start="0.0dur"`` the average
    begins with the weights after the first batch, and is updated after the batches whose number is
    a multiple of ``k``, with the same weights. For ``ema_start="50ba"`` it is ``start_after=50``.

    Parameters
    ----------
    half_life : str, optional
        In batches or epochs, such as ``"1000ba"`` or ``"2ep"``.
    smoothing : float, optional
        In its place: the weight of the old average in an update, in (0, 1).
    update_interval : str, optional
        In the same unit; one of it by default.

    Raises
    ------
    ArgumentError
        If both or none of ``half_life`` and ``smoothing`` are given, or a time is none.

    Examples
    --------
    >>> rule("1000ba").decay(1) == rule("1000ba", update_interval="10ba").decay(1)
    True
    >>> round(rule(None, smoothing=0.9, update_interval="10ba").decay(1), 4)
    0.9895
    """
    if (half_life is None) == (smoothing is None):
        raise ArgumentError(
            f"half_life={half_life!r}, smoothing={smoothing!r}: expected exactly one of the two"
        )
    if half_life is not None:
        steps, unit = _time(half_life, "half_life")
        if update_interval is not None and _time(update_interval, "update_interval")[1] != unit:
            raise ArgumentError(
                f"update_interval={update_interval!r}: expected the unit of half_life={half_life!r}"
            )
        return Aligned(2.0 ** (-1.0 / steps))
    assert smoothing is not None
    if not 0.0 < smoothing < 1.0:
        raise ArgumentError(f"smoothing={smoothing!r}: expected a number in (0, 1)")
    interval = 1 if update_interval is None else _time(update_interval, "update_interval")[0]
    return Aligned(smoothing ** (1.0 / interval))


def _time(value: str, name: str) -> tuple[int, str]:
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None or int(found[1]) == 0:
        raise ArgumentError(
            f"{name}={value!r}: expected batches or epochs, such as '10ba' or '2ep'"
        )
    return int(found[1]), found[2]


def _state_of(checkpoint: Any) -> tuple[Mapping[str, Any], Any, int | None]:
    """The algorithm's state; the model's and the batches of the run, where they are there."""
    whole = mapping_in(checkpoint, "the checkpoint")
    state = mapping_in(whole.get("state", whole), "'state' of the checkpoint")
    if "ema_model" in state:
        return state, None, None
    algorithms = state.get("algorithms", ())
    if isinstance(algorithms, Mapping):  # as in old checkpoints
        algorithms = list(algorithms.items())
    if not isinstance(algorithms, list | tuple) or not all(
        isinstance(one, list | tuple) and len(one) == 2 for one in algorithms
    ):
        raise CheckpointError(
            f"'algorithms' is {reprlib.repr(algorithms)}, expected a list of pairs of a name and "
            "a state"
        )
    found = [one for name, one in algorithms if name == "EMA"]
    if len(found) != 1:
        raise CheckpointError(
            f"the checkpoint holds {len(found)} states of Composer's EMA, expected one: under "
            "'algorithms', or by itself with 'ema_model'"
        )
    algorithm = mapping_in(found[0], "the state of Composer's EMA")
    if "ema_model" not in algorithm:
        raise CheckpointError("the state of Composer's EMA lacks 'ema_model'")
    batches = None
    if state.get("timestamp") is not None:
        outer = mapping_in(state["timestamp"], "'timestamp' of the checkpoint")
        inner = outer.get("Timestamp", {})
        inner = mapping_in(inner, "'Timestamp' of the checkpoint's 'timestamp'")
        batches = whole_in(inner["batch"], "the timestamp's batch") if "batch" in inner else None
    return algorithm, state.get("model"), batches


def _read(checkpoint: Any) -> tuple[dict[str, Any], int | None]:
    """The averages by name, and the batches of the run where they are there."""
    state, model, batches = _state_of(checkpoint)
    if state["ema_model"] is None:
        raise CheckpointError(
            "'ema_model' is None: the run was saved before its average began, at ema_start"
        )
    averages = dict(mapping_in(state["ema_model"], "'ema_model'"))
    if averages.keys() >= set(_PARTS):  # else a state dict, from before Composer 0.13
        parts = [mapping_in(averages[part], f"{part!r} of 'ema_model'") for part in _PARTS]
        averages = {name: one for part in parts for name, one in part.items()}
    if state.get("ema_weights_active") and "training_model" not in state:
        if model is None:
            raise CheckpointError(
                "the state holds the weights in place of the average (ema_weights_active), which "
                "is in the model's: pass the whole checkpoint of the Trainer"
            )
        weights = by_plain_name(mapping_in(model, "'model' of the checkpoint"))
        averages = {name: weights[name] for name in by_plain_name(averages) if name in weights}
    return averages, batches


def load(ema: EMA, checkpoint: Mapping[str, Any], num_updates: int | None = None) -> None:
    """Take over the average of a checkpoint of Composer.

    A checkpoint that Composer wrote in training has average and weights in each other's places,
    ``ema_weights_active``: the average is then taken from the model's state.

    Parameters
    ----------
    ema : EMA
        Of the same model. Several averages, or one in two halves, are an ArgumentError; an applied
        one is a StateError.
    checkpoint : mapping
        Of a ``Trainer``, or the state of its ``EMA`` algorithm alone. A CheckpointError names what
        is missing or does not fit; nothing was changed then.
    num_updates : int, optional
        Batches of the run; by default those in the checkpoint, or else what ``ema`` has.
    """
    averages, batches = _read(checkpoint)
    take_over(ema, averages, batches if num_updates is None else num_updates)


def export(ema: EMA, model: nn.Module) -> dict[str, Any]:
    """The state of Composer's ``EMA`` algorithm with this average, for its ``load_state_dict``.

    Parameters
    ----------
    ema : EMA
        Several averages, or one in two halves, are an ArgumentError.
    model : torch.nn.Module
        The state holds copies of all its buffers and of its trained parameters' averages; a
        CheckpointError names those that are not averaged.
    """
    averages = averages_of(ema)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    names = list(by_plain_name(trained))
    missing = [name for name in names if name not in averages]
    if missing:
        raise CheckpointError(f"these parameters are not averaged: {', '.join(missing)}")
    buffers = averages_or_copies(averages, dict(model.named_buffers()))
    held = {name: averages[name] for name in names}, buffers
    return {
        "ema_model": dict(zip(_PARTS, held, strict=True)),
        "ema_weights_active": False,
        "ema_started": True,
    }
