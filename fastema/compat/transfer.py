"""Averages of other libraries' checkpoints into a :class:`fastema.EMA`, and out of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastema.bridges.names import plain_names
from fastema.errors import ArgumentError, CheckpointError, listed
from fastema.rules.checks import checked_whole
from fastema.shadow import EMA

__all__ = ["averages_of", "mapping_in", "mismatches", "take_over", "unfit", "whole_in"]


def mapping_in(found: Any, what: str) -> Mapping[str, Any]:
    """A part of a checkpoint that has to be a mapping by names.

    Raises
    ------
    CheckpointError
        If it is not, beginning with ``what`` it is.
    """
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{what} is of type {type(found).__name__}, expected a mapping of names"
        )
    odd = [name for name in found if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f"{what} has the key {odd[0]!r}, expected names")
    return found


def whole_in(found: Any, what: str, least: int = 0) -> int:
    """A part of a checkpoint that has to be a whole number, in a tensor or by itself.

    Raises
    ------
    CheckpointError
        If it is not, or below ``least``, beginning with ``what`` it is.
    """
    number = found
    if isinstance(found, Tensor) and found.numel() == 1 and not found.is_meta:
        number = found.item()
    try:
        return checked_whole(number, what, least)
    except ArgumentError as error:
        raise CheckpointError(str(error)) from None


def mismatches(own: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Why a state cannot be loaded into another with the same names: a line for each of them."""
    problems = [f"{name!r} is missing" for name in own if name not in found]
    problems += [f"{name!r} is unexpected" for name in found if name not in own]
    return problems + unfit((name, found[name], own[name]) for name in own if name in found)


def unfit(entries: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Why things cannot be loaded into tensors: a line for each that cannot.

    Parameters
    ----------
    entries : iterable of (str, object, Tensor)
        What it is called, what was found, and what it is for; what is for no tensor, such as a
        module's extra state, is as it may be.
    """
    whys = ((name, _why_unfit(one, own)) for name, one, own in entries if isinstance(own, Tensor))
    return [f"{name!r} {why}" for name, why in whys if why]


def _why_unfit(found: Any, own: Tensor) -> str:
    if not isinstance(found, Tensor):
        return f"is of type {type(found).__name__}, expected a tensor"
    if found.shape != own.shape:
        return f"is {list(found.shape)}, expected {list(own.shape)}"
    if found.is_meta:
        return "has no contents: load the checkpoint to a device other than 'meta'"
    if found.layout != torch.strided:
        return f"is of layout {found.layout}, expected a dense tensor"
    return ""


def _only(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors of an average that is one, in one part."""
    shadows: list[Mapping[str, Tensor]] = state["shadow"]
    if len(shadows) != 1:
        raise ArgumentError(
            f"the EMA holds {len(shadows)} averages, the checkpoint one: build an EMA with one "
            "decay for it"
        )
    if state.get("low"):
        raise ArgumentError(
            "the average is stored in two halves: call ema.to(dtype='float32') first, and "
            "ema.to(dtype='bf16+16') after it"
        )
    return shadows[0]


def averages_of(ema: EMA) -> dict[str, Tensor]:
    """Copies of an average's tensors by name, those that are only copied among them.

    Raises
    ------
    ArgumentError
        For several averages, or one in two halves.
    """
    return dict(_only(ema.state_dict()))


def take_over(ema: EMA, averages: Mapping[str, Any], num_updates: int | None = None) -> None:
    """Load tensors of another library's into an average.

    Everything that is averaged has to be there. What is only copied, such as buffers, stays as it
    is where it is not there; what the average leaves out may be there.

    Parameters
    ----------
    ema : EMA
    averages : mapping of str to Tensor
        Of any floating-point dtype and device; names may have what wrappers add.
    num_updates : int, optional
        Which the schedule goes on from; by default the average's own.

    Raises
    ------
    ArgumentError
        For several averages, one in two halves, or a ``num_updates`` that is no whole number of at
        least 0.
    CheckpointError
        Naming every tensor that does not fit; nothing was changed.
    StateError
        While the average is applied.
    """
    state = ema.state_dict(copy=False)
    own = _only(state)
    count = state["num_updates"] if num_updates is None else num_updates
    count = checked_whole(count, "num_updates", 0)
    found = dict(zip(plain_names(list(averages)), averages.values(), strict=True))
    aliases = ema.aliases
    for name, kept in aliases.items():
        if name in found:
            found.setdefault(kept, found[name])
    known = {*own, *aliases, *ema.skipped_names}
    problems = [f"{name!r} is missing" for name in ema.averaged_names if name not in found]
    problems += [f"{name!r} is unexpected" for name in found if name not in known]
    problems += unfit((name, found[name], one) for name, one in own.items() if name in found)
    if problems:
        raise CheckpointError(
            "the averages in the checkpoint are not those of the model:\n" + listed(problems)
        )
    tensors = {
        name: _like(found[name], one) if name in found else one.clone() for name, one in own.items()
    }
    state = {**state, "shadow": [tensors], "num_updates": count}
    if "log_decays" in state:  # of a bias correction: what so many updates leave of the beginning
        state["log_decays"] = list(ema.schedule.log_decays(count))
    ema.load_state_dict(state)


def _like(found: Tensor, own: Tensor) -> Tensor:
    """A tensor in the dtype of the average; a number never becomes an integer, or the reverse."""
    if found.dtype.is_floating_point != own.dtype.is_floating_point:
        return found
    return found.detach().to(own.device, own.dtype)
