"""D2Go's averages of models: their schedule as a rule, and their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn

from fastema.checkpoint.transfer import averages_of, averages_or_copies, mapping_in, take_over
from fastema.rules import Constant, Rule
from fastema.rules.checks import checked_decay, checked_least
from fastema.shadow import EMA

__all__ = ["WarmUp", "export", "load", "rule"]


@dataclass(frozen=True, slots=True)
class WarmUp(Rule):
    """See :func:`rule`."""

    limit: float
    factor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", checked_decay(self.limit))
        factor = checked_least(self.factor, "decay_warm_up_factor", 0)
        object.__setattr__(self, "factor", factor)

    def decay(self, n: int) -> float:
        """``min(limit, (1 + n) / (factor + n))``."""
        return min(self.limit, (1 + n) / (self.factor + n))


def rule(decay: float = 0.999, decay_warm_up_factor: float = -1) -> Rule:
    """The schedule of D2Go's ``EMAUpdater``: ``min(decay, (1 + n) / (factor + n))``.

    It is for ``fastema.EMA(model, decay=rule(...), frozen="average", buffers="average")``: D2Go
    averages frozen parameters and buffers unless ``INCLUDE_FROZEN`` and ``INCLUDE_BUFFER`` say
    otherwise (``"skip"``).

    Parameters
    ----------
    decay : float
        ``MODEL_EMA.DECAY``, in [0, 1); else an ArgumentError.
    decay_warm_up_factor : float
        ``MODEL_EMA.DECAY_WARM_UP_FACTOR``; below 0 the decay is the same at every step. Up to 1
        it has no effect either: the fraction is then never below 1.

    Examples
    --------
    >>> [round(rule(0.999, 10).decay(n), 3) for n in (1, 100, 100_000)]
    [0.182, 0.918, 0.999]
    """
    if isinstance(decay_warm_up_factor, Real) and decay_warm_up_factor < 0:
        return Constant(decay)
    return WarmUp(decay, decay_warm_up_factor)


def load(ema: EMA, checkpoint: Mapping[str, Any], num_updates: int | None = None) -> None:
    """Take over the average of a checkpoint of D2Go.

    D2Go averages integers and cuts them off, so that counters lag behind. They are taken as they
    are, and copied exactly from the next update on.

    Parameters
    ----------
    ema : EMA
        Of the same model. Several averages, or one in two halves, are an ArgumentError; an applied
        one is a StateError.
    checkpoint : mapping
        With ``"ema_state"``, a mapping of names to tensors; or that mapping itself. A
        CheckpointError names every tensor that does not fit; nothing was changed then.
    num_updates : int, optional
        Steps of the run, which D2Go does not save: its warm-up begins again when a run is resumed.
        By default the number that ``ema`` has.
    """
    whole = mapping_in(checkpoint, "the checkpoint")
    state = whole.get("ema_state", whole)
    take_over(ema, mapping_in(state, "the average ('ema_state', or by itself)"), num_updates)


def export(ema: EMA, model: nn.Module | None = None) -> dict[str, dict[str, Tensor]]:
    """Return D2Go's checkpoint of an average: ``{"ema_state": {name: tensor}}``, copies.

    D2Go asks for every name that it averages: build the average with ``frozen="average",
    buffers="average"`` for its default configuration.

    Parameters
    ----------
    ema : EMA
        Several averages, or one in two halves, are an ArgumentError.
    model : torch.nn.Module, optional
        Adds its buffers that the average leaves out, such as those with ``persistent=False``.
    """
    averages = averages_of(ema)
    buffers = {} if model is None else averages_or_copies(averages, dict(model.named_buffers()))
    left_out = {name: one for name, one in buffers.items() if name in ema.skipped_names}
    return {"ema_state": {**left_out, **averages}}
