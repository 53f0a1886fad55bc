"""NeMo's averages of models: their schedule as a rule, and the states of its ``EMAOptimizer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastema.compat.layouts import LAYOUTS
from fastema.rules import Aligned
from fastema.rules.checks import checked_decay, checked_whole
from fastema.shadow import EMA

__all__ = ["export", "load", "rule"]


def rule(decay: float = 0.9999, every_n_steps: int = 1) -> Aligned:
    """The schedule of NeMo's ``EMA``: a constant decay at every ``every_n_steps``-th step.

    NeMo uses ``decay`` at each update, so that its average looks back over ``every_n_steps`` times
    as many steps. The rule says what that is per step, ``decay ** (1 / every_n_steps)``, for
    ``fastema.EMA(model, decay=rule(decay, k), update_every=k)``. As in NeMo the first step updates
    the average, then every k-th.

    Parameters
    ----------
    decay : float
        Of an update, in [0, 1); else an ArgumentError.
    every_n_steps : int
        At least 1; else an ArgumentError.

    Examples
    --------
    >>> rule(0.999).decay(1)
    0.999
    >>> round(rule(0.999, 10).decay(1), 5)
    0.9999
    """
    every = checked_whole(every_n_steps, "every_n_steps", 1)
    return Aligned(checked_decay(decay) ** (1.0 / every), phase=1)


def load(
    ema: EMA, checkpoint: Mapping[str, Any], model: nn.Module, optimizer: Optimizer | None = None
) -> None:
    """Take over the average in the state of NeMo's ``EMAOptimizer``.

    The schedule is that of ``ema``: build it with ``rule(state["decay"], state["every_n_steps"])``
    and ``update_every=state["every_n_steps"]`` to go on with the same numbers. The count of its
    updates is set so that those that do work fall on the same steps.

    Parameters
    ----------
    ema : EMA
        Of ``model``. Several averages, or one in two halves, are an ArgumentError; an applied one
        is a StateError.
    checkpoint : mapping
        With one such state under ``"optimizer_states"``, or the state itself. NeMo writes it to the
        file whose name ends in ``-EMA``. A CheckpointError names what does not fit; nothing was
        changed then.
    model : torch.nn.Module
        Its parameters' names go with the tensors, which NeMo saves without.
    optimizer : torch.optim.Optimizer, optional
        The tensors were saved in the order of its parameters; by default that of the model.
    """
    LAYOUTS["nemo"].load(ema, checkpoint, model, optimizer)


def export(ema: EMA, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of NeMo's ``EMAOptimizer`` with the average of a model.

    It holds ``opt``, the optimizer's own state; ``ema``, a tuple of copies in the order of its
    parameters, of the weights themselves where they are not averaged; ``current_step``, ``decay``
    (of an update) and ``every_n_steps``.

    Parameters
    ----------
    ema : EMA
        Several averages, or one in two halves, are an ArgumentError.
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer
        The one within NeMo's.
    """
    return LAYOUTS["nemo"].export(ema, model, optimizer)
