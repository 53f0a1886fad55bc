"""Tensors of other libraries' checkpoints, into an average and out of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastema.bridges.memory import bytes_of
from fastema.bridges.names import plain_names
from fastema.checkpoint.layouts import candidates
from fastema.checkpoint.source import Checkpoint
from fastema.checkpoint.stored import StoredAverage
from fastema.errors import ArgumentError, CheckpointError, listed
from fastema.layout.dtypes import NAME_OF
from fastema.rules.checks import checked_whole
from fastema.shadow import EMA
from fastema.shadow.state import SavedOrMine

__all__ = [
    "averages_of",
    "averages_or_copies",
    "by_plain_name",
    "load_modules",
    "load_stored",
    "mapping_in",
    "mismatches",
    "take_over",
    "tensors_of",
    "unfit",
    "whole_in",
]

Value = TypeVar("Value")


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint into memory."""
    found = {}
    with checkpoint.opened() as read:
        for name, stored in checkpoint.tensors.items():
            tensor = torch.empty(stored.shape, dtype=getattr(torch, NAME_OF[stored.kind.code]))
            read(name, 0, bytes_of(tensor))
            found[name] = tensor
    return found


def by_plain_name(named: Mapping[str, Value]) -> dict[str, Value]:
    """The same by names without the prefixes of wrappers."""
    return dict(zip(plain_names(list(named)), named.values(), strict=True))


def mapping_in(found: Any, what: str) -> Mapping[str, Any]:
    """A part of a checkpoint that has to be a mapping of names; else a CheckpointError says so."""
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{what} is of type {type(found).__name__}, expected a mapping of names"
        )
    odd = [name for name in found if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f"{what} has the key {odd[0]!r}, expected names")
    return found


def whole_in(found: Any, what: str, least: int = 0) -> int:
    """A whole number of a checkpoint, in a tensor or by itself; else a CheckpointError says so."""
    if isinstance(found, Tensor) and found.numel() == 1 and not found.is_meta:
        found = found.item()
    try:
        return checked_whole(found, what, least)
    except ArgumentError as error:
        raise CheckpointError(str(error)) from None


def unfit(entries: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Why entries (name, what was found, the tensor it is for) cannot be loaded: a line for each.

    Entries for no tensor, such as a module's extra state, are left alone.
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


def mismatches(own: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Why tensors cannot be loaded into others of the same names: a line for each that cannot."""
    problems = [f"{name!r} is missing" for name in own if name not in found]
    problems += [f"{name!r} is unexpected" for name in found if name not in own]
    return problems + unfit((name, found[name], own[name]) for name in own if name in found)


def load_modules(*pairs: tuple[nn.Module, Mapping[str, Any]]) -> None:
    """Load states into modules, all of them or, with a CheckpointError, none."""
    problems = [one for module, state in pairs for one in mismatches(module.state_dict(), state)]
    if problems:
        raise CheckpointError("the checkpoint is not of this model:\n" + listed(problems))
    for module, state in pairs:
        module.load_state_dict(state)


def _single_average(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors of an average that is one, in one part."""
    shadows: list[Mapping[str, Tensor]] = state["shadow"]
    if len(shadows) != 1:
        raise ArgumentError(
            f"the EMA holds {len(shadows)} averages, the checkpoint one: build an EMA with one "
            "decay for it"
        )
    if state.get("residual"):
        raise ArgumentError(
            "the average is stored in two halves: call ema.to(dtype='float32') first, and "
            "ema.to(dtype='bf16+16') after it"
        )
    return shadows[0]


def averages_of(ema: EMA) -> dict[str, Tensor]:
    """Copies of an average's tensors by name; an ArgumentError for several averages, or halves."""
    return dict(_single_average(ema.state_dict()))


def averages_or_copies(
    averages: Mapping[str, Tensor], named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The averages of these tensors, or copies of the tensors where they are not averaged."""
    found = by_plain_name(named)
    return {name: averages.get(name, one.detach().clone()) for name, one in found.items()}


def take_over(ema: EMA, averages: Mapping[str, Any], num_updates: int | None = None) -> None:
    """Load another library's averages, of any floating dtype and device, by name.

    Everything that is averaged has to be there. What is only copied, such as buffers, may be
    missing and then stays; what the average leaves out may be there. ``num_updates`` is the count
    that the schedule continues from, by default the average's own. A CheckpointError names every
    tensor that does not fit; nothing was changed then.
    """
    state = ema.state_dict(copy=False)
    own = _single_average(state)
    count = state["num_updates"] if num_updates is None else num_updates
    count = checked_whole(count, "num_updates", 0)
    found = by_plain_name(averages)
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
        name: _cast_like(found[name], one) if name in found else one.clone()
        for name, one in own.items()
    }
    state = {**state, "shadow": [tensors], "num_updates": count}
    if "log_decays" in state:  # of a bias correction: what so many updates leave of the beginning
        state["log_decays"] = list(ema.schedule.log_decays(count))
    ema.load_state_dict(state)


def load_stored(ema: Any, stored: StoredAverage, schedule: SavedOrMine) -> None:
    """Load an average that was found in a file of another library's, or of ``torch.save``."""
    if stored.library == "fastema":
        try:
            content = torch.load(stored.path, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds
            raise CheckpointError(f"{stored.path} is damaged: {error}") from None
        state = next(one for one in candidates(content) if one.get("format") == "fastema")
        ema.load_state_dict(state, schedule=schedule)
        return
    take_over(ema, _by_name(ema, stored), stored.num_updates)


def _by_name(ema: EMA, stored: StoredAverage) -> dict[str, Tensor]:
    """The tensors of a file by the names that they have in an average."""
    tensors, own = tensors_of(stored.checkpoint), list(ema.shadow)
    if stored.names == "full":
        return tensors
    if stored.names == "without dots":
        dots = {name.replace(".", ""): name for name in own}
        return {dots.get(name, name): one for name, one in tensors.items()}
    averaged = [name for name in own if name in ema.averaged_names]
    for names in (averaged, own):  # frozen parameters are in the list, or are not
        shapes = [ema.shadow[name].shape for name in names]
        if shapes == [one.shape for one in tensors.values()]:
            return dict(zip(names, tensors.values(), strict=True))
    raise CheckpointError(
        f"{stored.path} holds a list of {len(tensors)} tensors, which by their shapes are not the "
        f"{len(averaged)} averaged ones in their order; convert it with "
        "fastema.checkpoint.convert(..., names=...)"
    )


def _cast_like(found: Tensor, own: Tensor) -> Tensor:
    """A tensor in the dtype of the average; a number never becomes an integer, or the reverse."""
    if found.dtype.is_floating_point != own.dtype.is_floating_point:
        return found
    return found.detach().to(own.device, own.dtype)
