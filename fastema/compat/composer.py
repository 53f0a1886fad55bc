"""Composer's model averages: ``compute_ema``, the schedule as a rule, and checkpoints."""

from __future__ import annotations

import re
import reprlib
import weakref
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from fastema.checkpoint.transfer import (
    averages_or_copies,
    check_integer,
    check_mapping,
    copy_averages,
    load_averages,
    strip_wrapper_prefixes,
)
from fastema.compat.modules import NamedAverager
from fastema.compat.shares import check_fraction
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, BridgeError, CheckpointError
from fastema.rules import Aligned
from fastema.shadow import EMA

__all__ = ["compute_ema", "export", "load", "rule"]

_PARTS: Final = ("named_parameters_dict", "named_buffers_dict")
"""The two dicts of Composer's ``EMAParameters``."""

_TIME: Final = re.compile(r"(\d+)(ba|ep)")


class _CallState:
    """The averager for one caller's averages, and its number of calls."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()
        self.tied: dict[str, str] = {}
        self.averager = NamedAverager(())
        self.calls = 0

    def update(self, averages: dict[str, Tensor], model: nn.Module, weight: float) -> None:
        """Update averages by name, including those whose parameters are tied in the model."""
        if self.names != averages.keys():
            names, tied = frozenset(averages), _find_tied_names(model, averages)
            averager = NamedAverager([*averages, *tied])
            self.tied, self.averager, self.names = tied, averager, names
        more = {name: averages[first] for name, first in self.tied.items()}
        follows = self.averager.of({**averages, **more})
        with defer_signals():  # an interrupt never separates an update from its count
            follows.update(model, weight, self.calls)
            self.calls += 1


_call_states: weakref.WeakKeyDictionary[Any, _CallState] = weakref.WeakKeyDictionary()
"""Keyed weakly by the object that holds the averages."""


def _find_tied_names(model: nn.Module, averages: Mapping[str, Tensor]) -> dict[str, str]:
    """Return further names of averaged parameters, each with the name that has the average."""
    named = strip_wrapper_prefixes(dict(model.named_parameters(remove_duplicate=False)))
    held = {id(one): name for name, one in named.items() if name in averages}
    return {
        name: held[id(one)]
        for name, one in named.items()
        if name not in averages and id(one) in held
    }


def _averages_of(ema_model: Any) -> dict[str, Tensor]:
    """Return the averages by plain name."""
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
    return strip_wrapper_prefixes(named)


def compute_ema(model: nn.Module, ema_model: Any, smoothing: float = 0.99) -> None:
    """Update the average of a model's parameters and buffers in place.

    ``ema = smoothing * ema + (1 - smoothing) * model``, like ``compute_ema`` in
    ``composer/algorithms/ema/ema.py``, version 0.32. Composer silently skips tensors that one side
    lacks; here only buffers and frozen parameters may lack an average. Random bits depend on the
    number of calls with this ``ema_model``, so a resumed run draws different bits.

    Parameters
    ----------
    model : torch.nn.Module
        The weights in training. The caller must summon the parameters of a sharded (FSDP) model.
    ema_model : torch.nn.Module, or Composer's EMAParameters
        The averages to update: all tensors of its state dict, or its dicts of parameters and
        buffers.
    smoothing : float
        Weight of the old average, in [0, 1]. Default 0.99.

    Raises
    ------
    LayoutError
        If the model lacks averaged tensors, a trained parameter has no average, or shapes differ.
        The error names them; nothing is written.
    ArgumentError, BridgeError
        If ``smoothing`` is out of range; if ``ema_model`` is of another kind.

    Examples
    --------
    >>> import copy, torch
    >>> model = torch.nn.Linear(3, 2)
    >>> ema_model = copy.deepcopy(model)
    >>> compute_ema(model, ema_model, smoothing=0.9)
    """
    check_fraction(smoothing, "smoothing")
    averages = _averages_of(ema_model)
    _call_states.setdefault(ema_model, _CallState()).update(averages, model, 1.0 - smoothing)


def rule(
    half_life: str | None = "1000ba",
    smoothing: float | None = None,
    update_interval: str | None = None,
) -> Aligned:
    """Return the schedule of Composer's ``EMA`` as a rule for :class:`fastema.EMA`.

    Composer has ``smoothing = 2 ** (-update_interval / half_life)``; the rule is the decay per
    batch (or epoch). Pass it to ``fastema.EMA(model, decay=rule(...), update_every=k,
    buffers="average", start_after=1)``, where ``k`` is the number in ``update_interval``, and call
    ``update()`` once per batch (or epoch). As with Composer's ``ema_start="0.0dur"``, the average
    starts as the weights after the first batch; it is updated after each batch whose number is a
    multiple of ``k``, with Composer's decay. For ``ema_start="50ba"`` pass ``start_after=50``.

    Parameters
    ----------
    half_life : str, optional
        Half-life in batches or epochs, such as ``"1000ba"`` (default) or ``"2ep"``.
    smoothing : float, optional
        Weight of the old average in an update, in (0, 1); replaces ``half_life``.
    update_interval : str, optional
        Time between updates, in the unit of ``half_life``. Default: one batch or epoch.

    Raises
    ------
    ArgumentError
        If both or neither of ``half_life`` and ``smoothing`` are given, or a value is invalid.

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
        steps, unit = _parse_time(half_life, "half_life")
        if (
            update_interval is not None
            and _parse_time(update_interval, "update_interval")[1] != unit
        ):
            raise ArgumentError(
                f"update_interval={update_interval!r}: expected the unit of half_life={half_life!r}"
            )
        return Aligned(2.0 ** (-1.0 / steps))
    assert smoothing is not None
    if not 0.0 < smoothing < 1.0:
        raise ArgumentError(f"smoothing={smoothing!r}: expected a number in (0, 1)")
    interval = 1 if update_interval is None else _parse_time(update_interval, "update_interval")[0]
    return Aligned(smoothing ** (1.0 / interval))


def _parse_time(value: str, name: str) -> tuple[int, str]:
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None or int(found[1]) == 0:
        raise ArgumentError(
            f"{name}={value!r}: expected batches or epochs, such as '10ba' or '2ep'"
        )
    return int(found[1]), found[2]


def _state_of(checkpoint: Any) -> tuple[Mapping[str, Any], Any, int | None]:
    """Return the EMA's state, and the model's state and the batch count, or None if absent."""
    whole = check_mapping(checkpoint, "the checkpoint")
    state = check_mapping(whole.get("state", whole), "'state' of the checkpoint")
    if "ema_model" in state:
        return state, None, None
    algorithms = state.get("algorithms", ())
    if isinstance(algorithms, Mapping):  # in old checkpoints
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
    algorithm = check_mapping(found[0], "the state of Composer's EMA")
    if "ema_model" not in algorithm:
        raise CheckpointError("the state of Composer's EMA lacks 'ema_model'")
    batches = None
    if state.get("timestamp") is not None:
        outer = check_mapping(state["timestamp"], "'timestamp' of the checkpoint")
        inner = outer.get("Timestamp", {})
        inner = check_mapping(inner, "'Timestamp' of the checkpoint's 'timestamp'")
        batches = (
            check_integer(inner["batch"], "the timestamp's batch") if "batch" in inner else None
        )
    return algorithm, state.get("model"), batches


def _read_averages(checkpoint: Any) -> tuple[dict[str, Any], int | None]:
    """Return the averages by name, and the batch count, or None if it is absent."""
    state, model, batches = _state_of(checkpoint)
    if state["ema_model"] is None:
        raise CheckpointError(
            "'ema_model' is None: the run was saved before its average began, at ema_start"
        )
    averages = dict(check_mapping(state["ema_model"], "'ema_model'"))
    if averages.keys() >= set(_PARTS):  # before Composer 0.13 it was a state dict
        parts = [check_mapping(averages[part], f"{part!r} of 'ema_model'") for part in _PARTS]
        averages = {name: one for part in parts for name, one in part.items()}
    if state.get("ema_weights_active") and "training_model" not in state:
        if model is None:
            raise CheckpointError(
                "the state holds the weights, not the average (ema_weights_active): the average is "
                "in the model's state; pass the whole checkpoint of the Trainer"
            )
        weights = strip_wrapper_prefixes(check_mapping(model, "'model' of the checkpoint"))
        averages = {
            name: weights[name] for name in strip_wrapper_prefixes(averages) if name in weights
        }
    return averages, batches


def load(ema: EMA, checkpoint: Mapping[str, Any], num_updates: int | None = None) -> None:
    """Load the average of a Composer checkpoint into ``ema``.

    In a checkpoint that Composer wrote during training, average and weights are swapped
    (``ema_weights_active``): the average is then read from the model's state.

    Parameters
    ----------
    ema : EMA
        Average of the same model.
    checkpoint : mapping
        Checkpoint of a ``Trainer``, or the state of its ``EMA`` algorithm alone.
    num_updates : int, optional
        Batches of the run. Default: the number in the checkpoint; without one, that of ``ema``.

    Raises
    ------
    CheckpointError
        If something is missing or does not fit. The error names it; nothing is changed.
    ArgumentError, StateError
        If ``ema`` has several averages, one split into two halves, or a window; if ``ema`` is
        applied. If the next update would replace the loaded average, or the schedule depends on an
        unknown number of updates: pass ``num_updates``.
    """
    averages, batches = _read_averages(checkpoint)
    load_averages(ema, averages, batches if num_updates is None else num_updates)


def export(ema: EMA, model: nn.Module) -> dict[str, Any]:
    """Return this average as a state of Composer's ``EMA``, for its ``load_state_dict``.

    Parameters
    ----------
    ema : EMA
        Average to export. Several averages, or one split into two halves, raise an ArgumentError.
    model : torch.nn.Module
        The averaged model. The state holds copies of all its buffers, and of the averages of its
        trained parameters; a CheckpointError names trained parameters that are not averaged.
    """
    averages = copy_averages(ema)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    names = list(strip_wrapper_prefixes(trained))
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
