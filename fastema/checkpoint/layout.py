"""The layout in which a library saves an average: how to recognize, read and write it.

``LAYOUT`` in ``fastema.compat.<library>`` is one; the functions here are what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from fastema.checkpoint.content import Content
from fastema.checkpoint.source import Checkpoint
from fastema.errors import ArgumentError, CheckpointError
from fastema.rules import Constant, Rule, Schedule, Warmup

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Layout",
    "Names",
    "StoredAverage",
    "StoredContents",
    "build_schedule",
    "count_of",
    "decay_of",
    "entries_under",
    "has_warmup",
    "import_torch",
    "index_tensors",
    "is_decay_or_warmup",
    "prefixed",
    "scalar",
    "with_keys",
    "with_prefix",
]

Names = Literal["full", "without dots", "places"]
"""How tensors are named: as in the model, as in the model without dots, or by list position."""


class StoredContents(NamedTuple):
    """The contents of a layout: mappings of names to tensors that are not read yet."""

    averages: Mapping[Any, Any]
    names: Names = "full"
    num_updates: int | None = None
    schedule: Schedule | None = None
    options: Mapping[str, Any] = {}
    weights: Mapping[Any, Any] | None = None
    notes: tuple[str, ...] = ()
    parameters: list[str] | None = None
    state: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StoredAverage:
    """An average in a file or folder of any supported library.

    Attributes
    ----------
    path : Path
        The file or folder.
    library : str
        "fastema", "fastema.posthoc", "fastema.average", or another library: "torch_ema",
        "diffusers", "swa_utils", "mmengine" and others, see docs/checkpoints.md. "model" if the
        file holds only a model's weights, and "state dict" if an average is next to them under a
        key such as "ema".
    checkpoint : Checkpoint
        The averaged tensors by name; its ``opened()`` reads them.
    names : {"full", "without dots", "places"}
        How the tensors are named: as in the model; as in the model but without dots (LitEma); or
        "0", "1", ... in the order of ``model.parameters()`` (torch_ema, diffusers, NeMo).
    num_updates : int or None
        The number of updates, if the library saves it.
    schedule : Schedule or None
        The schedule with which fastema would continue; None if the file does not record one, or
        fastema has no matching rule.
    options : dict
        The library's saved schedule options, under their original names.
    weights : Checkpoint or None
        The weights in training, if the file holds them too.
    notes : list of str
        Remarks for the user.
    parameters : list of str or None
        The names of ``model.parameters()`` in order, if the file tells them from buffers.
    state : Checkpoint or None
        fastema's own state, for ``load_state_dict``. None for other libraries.
    """

    path: Path
    library: str
    checkpoint: Checkpoint
    names: Names = "full"
    num_updates: int | None = None
    schedule: Schedule | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)
    parameters: list[str] | None = None
    state: Checkpoint | None = field(default=None, repr=False)


_Mapping = Mapping[Any, Any]
Tensors: TypeAlias = Mapping[str, "Tensor"]


class Layout(NamedTuple):
    """A library's layout.

    Attributes
    ----------
    what : str
        What such a mapping is, for messages: "the state of ...".
    find : callable
        Return the state of an average in a mapping, which may be that state itself or a whole
        checkpoint; None if there is none. The mapping's tensors may be unread.
    read : callable
        Return the contents of a state, without reading tensors other than numbers.
    reads : str
        The call that reads such a state, besides ``load_into``, for messages. Default none.
    write : callable, optional
        Return what ``torch.save`` shall write, for an average, its tensors and those of the weights
        in training (empty if unknown). By default the layout cannot be written.
    stores : {"full", "parameters", "places"}
        Which tensors it stores: all by name, parameters by name, or parameters as a list.
    counts, weights : bool
        Whether it stores the number of updates; whether also the weights in training.
    keeps : callable
        Return whether it stores a schedule. By default it stores none.
    weak : bool
        Whether a model's state may look like this too: then it is taken only if the whole
        checkpoint does, and holds nothing else that may be an average.
    read_folder : callable, optional
        Return the contents of a folder of weights if another file in it says that they are an
        average, otherwise None.
    """

    what: str
    find: Callable[[_Mapping], _Mapping | None]
    read: Callable[[Content, _Mapping], StoredContents]
    reads: str = ""
    write: Callable[[StoredAverage, Tensors, Tensors], dict[str, Any]] | None = None
    stores: Literal["full", "parameters", "places"] = "full"
    counts: bool = False
    weights: bool = False
    keeps: Callable[[Schedule], bool] = lambda schedule: False
    weak: bool = False
    read_folder: Callable[[Content], StoredContents | None] | None = None


# -- find ------------------------------------------------------------------------------------------


def with_keys(*keys: str) -> Callable[[_Mapping], _Mapping | None]:
    """Return a function that returns a mapping that has these keys, and None for any other."""
    return lambda state: state if all(key in state for key in keys) else None


def with_prefix(prefix: str, *keys: str) -> Callable[[_Mapping], _Mapping | None]:
    """Do as :func:`with_keys`; all other names, at least one, must begin with the prefix."""

    def find(state: _Mapping) -> _Mapping | None:
        others = [name for name in state if name not in keys]
        fits = all(key in state for key in keys) and all(_begins(one, prefix) for one in others)
        return state if fits and others else None

    return find


def _begins(name: Any, prefix: str) -> bool:
    return isinstance(name, str) and name.startswith(prefix)


# -- read ------------------------------------------------------------------------------------------


def entries_under(mapping: _Mapping, prefix: str) -> dict[str, Any]:
    """Return the entries whose names begin with a prefix, with the prefix removed."""
    return {k.removeprefix(prefix): v for k, v in mapping.items() if _begins(k, prefix)}


def build_schedule(rule: Callable[[], Rule], every: int = 1, start: int = 0) -> Schedule | None:
    """Return a schedule, or None if a saved number is out of range."""
    try:
        return Schedule(rule(), every, start)
    except (ArgumentError, ZeroDivisionError, OverflowError):
        return None


def index_tensors(content: Content, found: Any, name: str) -> dict[str, Any]:
    """Return the tensors of a list by position, as strings.

    A mapping is returned unchanged: a safetensors file already names its tensors by position.
    """
    if isinstance(found, Mapping):
        return dict(found)
    if not isinstance(found, list | tuple):
        raise CheckpointError(f"{content.path}: {name!r} is not a list of tensors")
    return {str(i): one for i, one in enumerate(found)}


# -- write -----------------------------------------------------------------------------------------


def import_torch(needs: str) -> Any:
    """Return PyTorch's module; raise an ArgumentError that says what needs it if it is missing."""
    try:
        import torch
    except ImportError:
        raise ArgumentError(f"{needs} needs PyTorch: pip install torch") from None
    return torch


def scalar(value: float, dtype: str = "int64") -> Tensor:
    """Return a PyTorch tensor of shape () with this value."""
    import torch

    return torch.tensor(value, dtype=getattr(torch, dtype))


def count_of(source: StoredAverage) -> Tensor:
    """Return the number of updates, or 0 if it is unknown, as a tensor."""
    return scalar(source.num_updates or 0)


def decay_of(source: StoredAverage, to: str) -> float:
    """Return the decay of one update, or the limit that the decay approaches."""
    schedule = source.schedule
    rule = schedule.rules[0] if schedule is not None else None
    limit = getattr(rule, "limit", getattr(rule, "value", None))
    if limit is None:
        found = source.options.get("decay")
        if not isinstance(found, int | float):
            raise ArgumentError(
                f"{to} stores a decay, which {source.path} ({source.library}) does not record: "
                "pass decay"
            )
        return float(found)
    return float(limit) ** (schedule.update_every if schedule is not None else 1)


def has_warmup(source: StoredAverage) -> bool:
    """Return whether the decay of an average warms up as ``(1 + n) / (10 + n)``."""
    return source.schedule is not None and isinstance(source.schedule.rules[0], Warmup)


def is_decay_or_warmup(schedule: Schedule) -> bool:
    """Return whether a schedule is a constant decay or torch_ema's warm-up at every step."""
    rule, later = schedule.rules[0], schedule.start_after
    if type(rule) is Warmup:
        return rule == Warmup(rule.limit) and not later and schedule.update_every == 1
    return isinstance(rule, Constant) and schedule.update_every == 1


def prefixed(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """Return tensors under names with a prefix."""
    return {f"{prefix}{name}": one for name, one in tensors.items()}
