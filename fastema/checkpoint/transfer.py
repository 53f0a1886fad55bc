"""Transfer tensors between averages and the checkpoints of other libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastema.average import EMA
from fastema.average.reports import describe_schedule
from fastema.average.state import LOG_DECAYS, join_state, split_state
from fastema.bridges.names import strip_wrapper_prefixes
from fastema.checkpoint.layout import StoredAverage
from fastema.checkpoint.source import Checkpoint
from fastema.checkpoint.state import read_tensors
from fastema.errors import ArgumentError, CheckpointError, format_problems
from fastema.rules import Schedule
from fastema.rules.checks import validate_int

__all__ = [
    "check_integer",
    "check_mapping",
    "describe_unfit",
    "find_mismatches",
    "load_averages",
    "load_modules",
    "load_stored",
    "tensors_of",
]


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint into memory."""
    return read_tensors(checkpoint, torch.empty(0))


def check_mapping(found: Any, what: str) -> Mapping[str, Any]:
    """Return a part of a checkpoint, which must map names; raise a CheckpointError otherwise."""
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{what} is of type {type(found).__name__}, expected a mapping of names"
        )
    odd = [name for name in found if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f"{what} has the key {odd[0]!r}, expected names")
    return found


def check_integer(found: Any, what: str, least: int = 0) -> int:
    """Return an integer of a checkpoint, at least ``least``; raise a CheckpointError otherwise.

    The integer may be a plain value or a tensor of one element.
    """
    if isinstance(found, Tensor) and found.numel() == 1 and not found.is_meta:
        found = found.item()
    try:
        return validate_int(found, what, least)
    except ArgumentError as error:
        raise CheckpointError(str(error)) from None


def describe_unfit(entries: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return a line for each entry (name, loaded value, target) that cannot be loaded.

    Entries whose target is not a tensor, such as a module's extra state, are not checked.
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
        return f"has layout {found.layout}, expected a dense tensor"
    return ""


def find_mismatches(own: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return a line for each tensor that is missing, unexpected or cannot be loaded."""
    problems = [f"{name!r} is missing" for name in own if name not in found]
    problems += [f"{name!r} is unexpected" for name in found if name not in own]
    return problems + describe_unfit(
        (name, found[name], own[name]) for name in own if name in found
    )


def load_modules(*pairs: tuple[nn.Module, Mapping[str, Any]]) -> None:
    """Load states into modules, or load none and raise a CheckpointError if any does not fit."""
    problems = [
        one for module, state in pairs for one in find_mismatches(module.state_dict(), state)
    ]
    if problems:
        raise CheckpointError(
            "the checkpoint does not fit the model:\n" + format_problems(problems)
        )
    for module, state in pairs:
        module.load_state_dict(state)


def _single_average(parts: Mapping[str, Mapping[int, Any]]) -> Mapping[str, Tensor]:
    """Return the tensors of a single, unsplit average; raise an ArgumentError for others."""
    shadows: Mapping[int, Mapping[str, Tensor]] = parts["shadow"]
    if len(shadows) != 1:
        raise ArgumentError(
            f"the EMA holds {len(shadows)} averages, the checkpoint one: build an EMA with one "
            "decay"
        )
    if "residual" in parts:
        raise ArgumentError(
            "the average is stored in two halves: call ema.to(dtype='float32') first, and "
            "ema.to(dtype='bf16+16') after it"
        )
    return shadows[0]


def load_averages(ema: EMA, averages: Mapping[str, Any], num_updates: int | None = None) -> None:
    """Load another library's averages, of any floating dtype and device, by name.

    Every averaged tensor must be present. Tensors that are only copied, such as buffers, may be
    missing and are then unchanged; names that the average skips are ignored. The schedule continues
    from ``num_updates``, by default the average's own count. If any tensor does not fit, raise a
    CheckpointError that names all of them, and change nothing. Raise an ArgumentError if the next
    update would replace the loaded average, or if its weight depends on an unknown count.
    """
    header, parts = split_state(ema.state_dict(copy=False))
    if "ring" in parts:
        raise ArgumentError(
            "a windowed mean can continue only from its own file, which holds the weights of its "
            "window; load this average into an EMA or SWA"
        )
    own = _single_average(parts)
    count = header["num_updates"] if num_updates is None else num_updates
    count = validate_int(count, "num_updates", 0)
    found = strip_wrapper_prefixes(averages)
    aliases = ema.aliases
    for name, kept in aliases.items():
        if name in found:
            found.setdefault(kept, found[name])
    known = {*own, *aliases, *ema.skipped_names}
    problems = [f"{name!r} is missing" for name in ema.averaged_names if name not in found]
    problems += [f"{name!r} is unexpected" for name in found if name not in known]
    problems += describe_unfit(
        (name, found[name], one) for name, one in own.items() if name in found
    )
    if problems:
        raise CheckpointError(
            "the averages in the checkpoint do not fit the model:\n" + format_problems(problems)
        )
    _check_count(ema.schedule, count, num_updates)
    tensors = {
        name: _cast_like(found[name], one) if name in found else one.clone()
        for name, one in own.items()
    }
    header["num_updates"] = count
    if LOG_DECAYS in header:
        header[LOG_DECAYS] = list(ema.schedule.log_decays(count))
    ema.load_state_dict(join_state(header, {"shadow": [tensors]}))


_LATE: Final = 1 << 40
"""A number of updates after which every schedule has reached its limit."""


def _check_count(schedule: Schedule, count: int, num_updates: int | None) -> None:
    """Raise an ArgumentError if a loaded average would be lost with this number of updates."""
    every = schedule.update_every
    if num_updates == 0 or schedule.discards(_LATE):  # nothing averaged yet, or decay 0
        return
    if schedule.discards(count):
        start = schedule.start_after
        least = next((n for n in (start, start + 1, start + every) if not schedule.discards(n)), 0)
        counts = "is of unknown age" if num_updates is None else f"counts {count:,} updates"
        raise ArgumentError(
            f"the loaded average {counts}, and the next update with {describe_schedule(schedule)} "
            "would replace it by the weights: pass num_updates, the number of updates it has seen"
            + (f", here {least:,} or more" if start and least else "")
        )
    first, late = (schedule.weights(n + every, every) for n in (count, _LATE))
    if num_updates is None and not count and first != late:
        raise ArgumentError(
            "the number of updates of the loaded average is unknown, and the schedule "
            f"({describe_schedule(schedule)}) depends on it: pass num_updates, or 0 to start over"
        )


def load_stored(ema: Any, stored: StoredAverage, num_updates: int | None = None) -> None:
    """Load an average from another library's file."""
    count = stored.num_updates if num_updates is None else num_updates
    load_averages(ema, _by_name(ema, stored), count)


def _by_name(ema: EMA, stored: StoredAverage) -> dict[str, Tensor]:
    """Read the tensors of a file under the names that they have in an average."""
    tensors, own = tensors_of(stored.checkpoint), list(ema.shadows[0])
    if stored.names == "full":
        return tensors
    if stored.names == "without dots":
        dots = {name.replace(".", ""): name for name in own}
        return {dots.get(name, name): one for name, one in tensors.items()}
    listed = own if ema._names.parameters is None else ema._names.parameters
    every = [name for name in listed if name in ema.shadows[0]]
    averaged = [name for name in every if name in ema.averaged_names]
    for names in (averaged, every):  # the list may or may not include frozen parameters
        shapes = [ema.shadows[0][name].shape for name in names]
        if shapes == [one.shape for one in tensors.values()]:
            return dict(zip(names, tensors.values(), strict=True))
    raise CheckpointError(
        f"{stored.path} holds a list of {len(tensors)} tensors, whose shapes are not those of the "
        f"{len(averaged)} averaged ones in order; convert it with "
        "fastema.checkpoint.convert(..., names=...)"
    )


def _cast_like(found: Tensor, own: Tensor) -> Tensor:
    """Cast a tensor to its average's dtype and device, but never between floats and integers."""
    if found.dtype.is_floating_point != own.dtype.is_floating_point:
        return found
    return found.detach().to(own.device, own.dtype)
