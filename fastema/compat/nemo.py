"""NeMo's averages of models: their schedule as a rule, and the states of its ``EMAOptimizer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastema.checkpoint.transfer import (
    averages_of,
    by_plain_name,
    mapping_in,
    take_over,
    unfit,
    whole_in,
)
from fastema.errors import CheckpointError, listed
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


def _ordered(model: nn.Module, optimizer: Optimizer | None) -> list[tuple[str | None, Tensor]]:
    """Parameters in the order of the optimizer, with their names in the model."""
    named = by_plain_name(dict(model.named_parameters()))
    names = {id(one): name for name, one in named.items()}
    if optimizer is None:
        return list(named.items())
    groups = (group["params"] for group in optimizer.param_groups)
    return [(names.get(id(one)), one) for group in groups for one in group]


def _state_of(checkpoint: Any) -> Mapping[str, Any]:
    """The state of the ``EMAOptimizer`` in a checkpoint, or the one that it is."""
    whole = mapping_in(checkpoint, "the checkpoint")
    states = whole.get("optimizer_states", [whole])
    if not isinstance(states, list | tuple):
        raise CheckpointError(
            f"'optimizer_states' is of type {type(states).__name__}, expected a list"
        )
    found = [one for one in states if isinstance(one, Mapping) and "ema" in one]
    if len(found) != 1:
        raise CheckpointError(
            f"the checkpoint holds {len(found)} states of an EMAOptimizer, expected one; NeMo "
            "writes them to the file whose name ends in -EMA. Of several optimizers, pass the "
            "state of each"
        )
    missing = [name for name in ("current_step", "every_n_steps") if name not in found[0]]
    if missing:
        raise CheckpointError(f"the state of the EMAOptimizer lacks {', '.join(missing)}")
    return found[0]


def _ahead_of(ema: EMA, every: int) -> int:
    """Return the lead of its count over NeMo's, which updates with steps 1, 1 + every, ..."""
    return (ema.schedule.phase - 1) % every


def load(
    ema: EMA, checkpoint: Mapping[str, Any], model: nn.Module, optimizer: Optimizer | None = None
) -> None:
    """Take over the average in the state of NeMo's ``EMAOptimizer``.

    The schedule is that of ``ema``: build it with ``rule(state["decay"], state["every_n_steps"])``
    and ``update_every=state["every_n_steps"]`` to continue with the same numbers. The count of its
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
    state = _state_of(checkpoint)
    ordered, saved = _ordered(model, optimizer), state["ema"]
    if not isinstance(saved, list | tuple):
        raise CheckpointError(f"'ema' is of type {type(saved).__name__}, expected a tuple")
    if len(ordered) != len(saved):
        raise CheckpointError(
            f"the state holds {len(saved)} averages, but there are {len(ordered)} parameters: pass "
            "the optimizer that it was saved with"
        )
    problems = unfit(
        (name or f"number {at}", one, parameter)
        for at, ((name, parameter), one) in enumerate(zip(ordered, saved, strict=True))
    )
    if problems:
        raise CheckpointError(
            "the averages, by the parameters at their places, do not fit; pass the optimizer that "
            "they were saved with, in whose order they are:\n" + listed(problems)
        )
    every = whole_in(state["every_n_steps"], "every_n_steps", 1)
    done = whole_in(state["current_step"], "current_step")
    names = (name for name, _ in ordered)
    averages = {name: one for name, one in zip(names, saved, strict=True) if name is not None}
    take_over(ema, averages, done + _ahead_of(ema, every))


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
    averages, every, done = averages_of(ema), ema.schedule.update_every, ema.num_updates
    step = done - _ahead_of(ema, every)
    return {
        "opt": optimizer.state_dict(),
        "ema": tuple(
            averages[name] if name is not None and name in averages else one.detach().clone()
            for name, one in _ordered(model, optimizer)
        ),
        "current_step": step if step >= 0 else step + every,
        "decay": ema.schedule.decays(max(done, 1))[0] ** every,
        "every_n_steps": every,
    }
