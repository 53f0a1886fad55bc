"""Composer's averages of models: ``compute_ema``, their schedule as a rule, their checkpoints."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor, nn

from fastema.bridges.names import plain_names
from fastema.compat.following import Follower
from fastema.compat.shares import refuse_no_share
from fastema.compat.transfer import averages_of, mapping_in, take_over, whole_in
from fastema.errors import ArgumentError, BridgeError, CheckpointError
from fastema.layout.spec import Role
from fastema.rules import Aligned
from fastema.shadow import EMA

__all__ = ["compute_ema", "export", "load", "rule"]

_PARTS: Final = ("named_parameters_dict", "named_buffers_dict")
_TIME: Final = re.compile(r"(\d+)(ba|ep)")


@dataclass(frozen=True)
class _Held:
    """Average what the average holds; what is frozen, or a buffer, and not held is left out."""

    names: frozenset[str]

    def __call__(self, name: str, role: Role) -> Literal["average", "skip"]:
        return "average" if name in self.names or role == "weight" else "skip"


class _Known:
    """A follower of averages that a caller keeps, and how often it was called."""

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}
        self.follower: Follower | None = None
        self.calls = 0

    def following(self, averages: dict[str, Tensor], model: nn.Module) -> Follower:
        """The follower of these: the same for as long as they have the same names."""
        if self.follower is None or averages.keys() != self.averages.keys() - self.tied.keys():
            self.tied = _tied(model, averages)
            self.averages = {}
            names = frozenset([*averages, *self.tied])
            self.follower = Follower(self.averages, _Held(names))
        self.averages.update(averages)
        self.averages.update((name, averages[first]) for name, first in self.tied.items())
        return self.follower


_known: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()
"""By the object that holds the averages; their tensors do not keep it."""


def _tied(model: nn.Module, averages: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names that averaged parameters have in a model, to the one of the average."""
    every = dict(model.named_parameters(remove_duplicate=False))
    named = dict(zip(plain_names(list(every)), every.values(), strict=True))
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
        named = {name: one for part in _PARTS for name, one in getattr(ema_model, part).items()}
    else:
        raise BridgeError(
            f"ema_model is a {type(ema_model).__name__}: expected a torch.nn.Module, or an object "
            f"with the dicts {' and '.join(_PARTS)}"
        )
    return dict(zip(plain_names(list(named)), named.values(), strict=True))


def compute_ema(model: nn.Module, ema_model: Any, smoothing: float = 0.99) -> None:
    """``ema = smoothing * ema + (1 - smoothing) * model`` in place, for parameters and buffers.

    Parameters
    ----------
    model : torch.nn.Module
        The weights in training.
    ema_model : torch.nn.Module, or Composer's EMAParameters
        What is written: whatever its state dict holds, or its dicts of parameters and buffers.
    smoothing : float
        Weight of the old average, in [0, 1].

    Raises
    ------
    ArgumentError
        For a ``smoothing`` out of range.
    LayoutError
        Naming the averages that the model lacks, the trained parameters that have no average, and
        those of which the shapes differ; nothing was written.
    BridgeError
        For an ``ema_model`` that is neither.

    Notes
    -----
    The function of ``composer/algorithms/ema/ema.py``, version 0.32. It differs:

    - There integers are averaged and cut off, so that counters lag behind. Here they are copied.
    - There tensors that only one side has are left out without a word. Here only what is frozen or
      a buffer may be missing in the average.
    - There averages of 16 bits are rounded to nearest and stand still. Here they are rounded at
      random, by bits that depend on the number of calls with this ``ema_model`` so far; a resumed
      run draws others.

    What is looked up is kept for as long as ``ema_model`` lives. A sharded (FSDP) model has to be
    summoned by the caller.

    Examples
    --------
    >>> import copy, torch
    >>> model = torch.nn.Linear(3, 2)
    >>> ema_model = copy.deepcopy(model)
    >>> compute_ema(model, ema_model, smoothing=0.9)
    """
    refuse_no_share(smoothing, "smoothing")
    averages = _averages(ema_model)
    known = _known.setdefault(ema_model, _Known())
    known.following(averages, model).update(model, 1.0 - smoothing, known.calls)
    known.calls += 1


def rule(
    half_life: str | None = "1000ba",
    smoothing: float | None = None,
    update_interval: str | None = None,
) -> Aligned:
    """The schedule of Composer's ``EMA``: ``smoothing = 2 ** (-update_interval / half_life)``.

    Parameters
    ----------
    half_life : str, optional
        In batches or epochs, such as ``"1000ba"`` or ``"2ep"``.
    smoothing : float, optional
        In its place: the weight of the old average in an update, in (0, 1).
    update_interval : str, optional
        In the same unit; one of it by default.

    Returns
    -------
    Aligned
        Decay per batch (or epoch), for ``fastema.EMA(model, decay=rule(...), update_every=k,
        buffers="average", start_after=1)``, with ``k`` the number in ``update_interval``; call
        ``update()`` once per batch (or epoch). As with Composer's ``ema_start="0.0dur"`` the
        average begins with the weights after the first batch, and is updated after the batches
        whose number is a multiple of ``k``, with the same weights. For ``ema_start="50ba"`` it is
        ``start_after=50``.

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


def _parts_of(checkpoint: Any) -> tuple[Mapping[str, Any], Any, int | None]:
    """The algorithm's state; the model's and the batches of the run, where they are there."""
    whole = mapping_in(checkpoint, "the checkpoint")
    state = mapping_in(whole.get("state", whole), "'state' of the checkpoint")
    if "ema_model" in state:
        return state, None, None
    found = [one for name, one in _named_states(state.get("algorithms", ())) if name == "EMA"]
    if len(found) != 1:
        raise CheckpointError(
            f"the checkpoint holds {len(found)} states of Composer's EMA, expected one: under "
            "'algorithms', or by itself with 'ema_model'"
        )
    algorithm = mapping_in(found[0], "the state of Composer's EMA")
    if "ema_model" not in algorithm:
        raise CheckpointError("the state of Composer's EMA lacks 'ema_model'")
    return algorithm, state.get("model"), _batches(state.get("timestamp"))


def _named_states(algorithms: Any) -> list[tuple[Any, Any]]:
    """Names and states of algorithms: a list of pairs, or a mapping as in old checkpoints."""
    if isinstance(algorithms, Mapping):
        return list(algorithms.items())
    if isinstance(algorithms, list | tuple) and all(
        isinstance(one, list | tuple) and len(one) == 2 for one in algorithms
    ):
        return [(name, one) for name, one in algorithms]
    raise CheckpointError(
        f"'algorithms' is {_shortened(algorithms)}, expected a list of pairs of a name and a state"
    )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _batches(timestamp: Any) -> int | None:
    if timestamp is None:
        return None
    outer = mapping_in(timestamp, "'timestamp' of the checkpoint")
    inner = mapping_in(outer.get("Timestamp", {}), "'Timestamp' of the checkpoint's 'timestamp'")
    return whole_in(inner["batch"], "the timestamp's batch") if "batch" in inner else None


def _flat(saved: Any) -> dict[str, Any]:
    """The tensors of a saved ``ema_model``; before Composer 0.13 it was a state dict."""
    if saved is None:
        raise CheckpointError(
            "'ema_model' is None: the run was saved before its average began, at ema_start"
        )
    parts = mapping_in(saved, "'ema_model'")
    if not all(part in parts for part in _PARTS):
        return dict(parts)
    inner = (mapping_in(parts[part], f"{part!r} of 'ema_model'") for part in _PARTS)
    return {name: one for part in inner for name, one in part.items()}


def load(ema: EMA, checkpoint: Mapping[str, Any], num_updates: int | None = None) -> None:
    """Take over the average of a checkpoint of Composer.

    A checkpoint that Composer wrote in training has average and weights in each other's places,
    ``ema_weights_active``: the average is then taken from the model's state.

    Parameters
    ----------
    ema : EMA
        Of the same model.
    checkpoint : mapping
        Of a ``Trainer``, or the state of its ``EMA`` algorithm alone.
    num_updates : int, optional
        Batches of the run; by default those in the checkpoint, or else what ``ema`` has.

    Raises
    ------
    CheckpointError
        Naming every tensor that does not fit, if there is no average, if something is not what
        Composer writes there, or if average and weights have changed places and the model's state
        is not there; nothing was changed.
    ArgumentError
        For an ``ema`` with several averages, or one in two halves, or an invalid ``num_updates``.
    StateError
        While the average is applied.
    """
    state, model, batches = _parts_of(checkpoint)
    averages = _flat(state["ema_model"])
    if state.get("ema_weights_active") and "training_model" not in state:
        if model is None:
            raise CheckpointError(
                "the state holds the weights in place of the average (ema_weights_active), which "
                "is in the model's: pass the whole checkpoint of the Trainer"
            )
        weights = mapping_in(model, "'model' of the checkpoint")
        held = dict(zip(plain_names(list(weights)), weights.values(), strict=True))
        averages = {name: held[name] for name in plain_names(list(averages)) if name in held}
    take_over(ema, averages, batches if num_updates is None else num_updates)


def export(ema: EMA, model: nn.Module) -> dict[str, Any]:
    """The state of Composer's ``EMA`` algorithm with this average.

    Parameters
    ----------
    ema : EMA
    model : torch.nn.Module
        Whose buffers the state is to hold, those that ``ema`` leaves out too.

    Returns
    -------
    dict
        For ``algorithm.load_state_dict``: ``ema_model`` with copies of the trained parameters and
        of all buffers, ``ema_weights_active=False`` and ``ema_started=True``.

    Raises
    ------
    CheckpointError
        If the model has trained parameters that are not averaged.
    ArgumentError
        For an ``ema`` with several averages, or one in two halves.
    """
    averages = averages_of(ema)
    parameters, buffers = (
        dict(zip(plain_names(list(found)), found.values(), strict=True))
        for found in (
            {name: one for name, one in model.named_parameters() if one.requires_grad},
            dict(model.named_buffers()),
        )
    )
    missing = [name for name in parameters if name not in averages]
    if missing:
        raise CheckpointError(f"these parameters are not averaged: {', '.join(missing)}")
    held = {name: averages.get(name, one.detach().clone()) for name, one in buffers.items()}
    return {
        "ema_model": {
            "named_parameters_dict": {name: averages[name] for name in parameters},
            "named_buffers_dict": held,
        },
        "ema_weights_active": False,
        "ema_started": True,
    }
