"""D2Go's model averages: the schedule as a rule, and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn

from fastema.checkpoint.transfer import (
    averages_or_copies,
    check_mapping,
    copy_averages,
    load_averages,
)
from fastema.rules import Constant, Rule
from fastema.rules.checks import validate_at_least, validate_decay
from fastema.shadow import EMA

__all__ = ["WarmUp", "export", "load", "rule"]


@dataclass(frozen=True, slots=True)
class WarmUp(Rule):
    """A decay that grows to ``limit``, the schedule of D2Go; see :func:`rule`."""

    limit: float
    factor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", validate_decay(self.limit))
        factor = validate_at_least(self.factor, "decay_warm_up_factor", 0)
        object.__setattr__(self, "factor", factor)

    def decay(self, n: int) -> float:
        """Return ``min(limit, (1 + n) / (factor + n))``."""
        return min(self.limit, (1 + n) / (self.factor + n))


def rule(decay: float = 0.999, decay_warm_up_factor: float = -1) -> Rule:
    """Return the schedule of D2Go's ``EMAUpdater``: ``min(decay, (1 + n) / (factor + n))``.

    Pass it to ``fastema.EMA(model, decay=rule(...), frozen="average", buffers="average")``. D2Go
    averages frozen parameters and buffers by default; pass ``"skip"`` instead if
    ``INCLUDE_FROZEN`` or ``INCLUDE_BUFFER`` is off.

    Parameters
    ----------
    decay : float
        ``MODEL_EMA.DECAY``, in [0, 1), otherwise an ArgumentError. Default 0.999.
    decay_warm_up_factor : float
        ``MODEL_EMA.DECAY_WARM_UP_FACTOR``. Below 0 (default -1) the decay is constant. A factor
        up to 1 has no effect either: the fraction is then never below 1.

    Examples
    --------
    >>> [round(rule(0.999, 10).decay(n), 3) for n in (1, 100, 100_000)]
    [0.182, 0.918, 0.999]
    """
    if isinstance(decay_warm_up_factor, Real) and decay_warm_up_factor < 0:
        return Constant(decay)
    return WarmUp(decay, decay_warm_up_factor)


def load(ema: EMA, checkpoint: Mapping[str, Any], num_updates: int | None = None) -> None:
    """Load the average of a D2Go checkpoint into ``ema``.

    D2Go averages integers and truncates them, so counters lag behind. They are loaded unchanged,
    and copied exactly from the next update on.

    Parameters
    ----------
    ema : EMA
        Average of the same model.
    checkpoint : mapping
        Mapping with ``"ema_state"``, a mapping of names to tensors, or the latter itself.
    num_updates : int, optional
        Steps of the run. D2Go does not save them and repeats its warm-up when a run is resumed.
        Default: the number of ``ema``.

    Raises
    ------
    CheckpointError
        If tensors do not fit. The error names each of them; nothing is changed.
    ArgumentError, StateError
        If ``ema`` has several averages, one split into two halves, or a window; if ``ema`` is
        applied. If the next update would replace the loaded average, or the schedule depends on an
        unknown number of updates: pass ``num_updates``.
    """
    whole = check_mapping(checkpoint, "the checkpoint")
    state = whole.get("ema_state", whole)
    load_averages(ema, check_mapping(state, "the average ('ema_state', or by itself)"), num_updates)


def export(ema: EMA, model: nn.Module | None = None) -> dict[str, dict[str, Tensor]]:
    """Return D2Go's checkpoint of an average, ``{"ema_state": {name: tensor}}``, with copies.

    D2Go requires every name that it averages: build the average with ``frozen="average",
    buffers="average"`` for its default configuration.

    Parameters
    ----------
    ema : EMA
        Average to export. Several averages, or one split into two halves, raise an ArgumentError.
    model : torch.nn.Module, optional
        Also export this model's buffers that ``ema`` skips, such as those with
        ``persistent=False``.
    """
    averages = copy_averages(ema)
    buffers = {} if model is None else averages_or_copies(averages, dict(model.named_buffers()))
    left_out = {name: one for name, one in buffers.items() if name in ema.skipped_names}
    return {"ema_state": {**left_out, **averages}}
