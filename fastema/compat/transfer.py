"""Averages of other libraries' checkpoints into a :class:`fastema.EMA`, and out of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastema.bridges.names import plain_names
from fastema.errors import ArgumentError, CheckpointError, listed
from fastema.shadow import EMA

__all__ = ["averages_of", "mismatches", "take_over"]


def mismatches(own: Mapping[str, Tensor], found: Mapping[str, Any]) -> list[str]:
    """Why tensors cannot be loaded into these of the same names: a line for each."""
    problems = [f"{name!r} is missing" for name in own if name not in found]
    problems += [f"{name!r} is unexpected" for name in found if name not in own]
    return problems + _misshapen(own, found)


def _misshapen(own: Mapping[str, Tensor], found: Mapping[str, Any]) -> list[str]:
    return [
        f"{name!r} is {list(found[name].shape)}, expected {list(one.shape)}"
        for name, one in own.items()
        if name in found and found[name].shape != one.shape
    ]


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
        For several averages, or one in two halves.
    CheckpointError
        Naming every tensor that does not fit; nothing was changed.
    StateError
        While the average is applied.
    """
    state = ema.state_dict(copy=False)
    own = _only(state)
    found = dict(zip(plain_names(list(averages)), averages.values(), strict=True))
    aliases = ema.aliases
    for name, kept in aliases.items():
        if name in found:
            found.setdefault(kept, found[name])
    known = {*own, *aliases, *ema.skipped_names}
    problems = [f"{name!r} is missing" for name in ema.averaged_names if name not in found]
    problems += [f"{name!r} is unexpected" for name in found if name not in known]
    problems += _misshapen(own, found)
    if problems:
        raise CheckpointError(
            "the averages in the checkpoint are not those of the model:\n" + listed(problems)
        )
    tensors = {
        name: _like(found[name], one) if name in found else one.clone() for name, one in own.items()
    }
    count = state["num_updates"] if num_updates is None else num_updates
    ema.load_state_dict({**state, "shadow": [tensors], "num_updates": count})


def _like(found: Tensor, own: Tensor) -> Tensor:
    """A tensor in the dtype of the average; a number never becomes an integer, or the reverse."""
    if found.dtype.is_floating_point != own.dtype.is_floating_point:
        return found
    return found.detach().to(own.device, own.dtype)
