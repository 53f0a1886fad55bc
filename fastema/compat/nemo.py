"""NeMo's model averages: the schedule as a rule, and the states of its ``EMAOptimizer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastema.checkpoint.transfer import (
    check_integer,
    check_mapping,
    copy_averages,
    describe_unfit,
    load_averages,
    strip_wrapper_prefixes,
)
from fastema.errors import CheckpointError, format_problems
from fastema.rules import Aligned
from fastema.rules.checks import validate_decay, validate_int
from fastema.shadow import EMA

__all__ = ["export", "load", "rule"]


def rule(decay: float = 0.9999, every_n_steps: int = 1) -> Aligned:
    """Return the schedule of NeMo's ``EMA``: a constant decay at every ``every_n_steps``-th step.

    NeMo uses ``decay`` at each update, so its average looks back over ``every_n_steps`` times as
    many steps. The rule has the equivalent decay per step, ``decay ** (1 / every_n_steps)``. Pass
    it to ``fastema.EMA(model, decay=rule(decay, k), update_every=k)``. As in NeMo, the first step
    updates the average, then every k-th.

    Parameters
    ----------
    decay : float
        Decay per update, in [0, 1), otherwise an ArgumentError. Default 0.9999.
    every_n_steps : int
        Steps between updates, at least 1, otherwise an ArgumentError. Default 1.

    Examples
    --------
    >>> rule(0.999).decay(1)
    0.999
    >>> round(rule(0.999, 10).decay(1), 5)
    0.9999
    """
    every = validate_int(every_n_steps, "every_n_steps", 1)
    return Aligned(validate_decay(decay) ** (1.0 / every), phase=1)


def _order_parameters(
    model: nn.Module, optimizer: Optimizer | None
) -> list[tuple[str | None, Tensor]]:
    """Return parameters in the optimizer's order, with their names in the model."""
    named = strip_wrapper_prefixes(dict(model.named_parameters()))
    names = {id(one): name for name, one in named.items()}
    if optimizer is None:
        return list(named.items())
    groups = (group["params"] for group in optimizer.param_groups)
    return [(names.get(id(one)), one) for group in groups for one in group]


def _state_of(checkpoint: Any) -> Mapping[str, Any]:
    """Return the state of an ``EMAOptimizer`` in a checkpoint, which may be that state itself."""
    whole = check_mapping(checkpoint, "the checkpoint")
    states = whole.get("optimizer_states", [whole])
    if not isinstance(states, list | tuple):
        raise CheckpointError(
            f"'optimizer_states' is of type {type(states).__name__}, expected a list"
        )
    found = [one for one in states if isinstance(one, Mapping) and "ema" in one]
    if len(found) != 1:
        raise CheckpointError(
            f"the checkpoint holds {len(found)} states of an EMAOptimizer, expected one; NeMo "
            "writes them to the file whose name ends in -EMA. With several optimizers, pass the "
            "state of each one"
        )
    missing = [name for name in ("current_step", "every_n_steps") if name not in found[0]]
    if missing:
        raise CheckpointError(f"the state of the EMAOptimizer lacks {', '.join(missing)}")
    return found[0]


def _lead_over_nemo(ema: EMA, every: int) -> int:
    """Return how far ``ema``'s count is ahead of NeMo's, which updates at 1, 1 + every, ..."""
    return (ema.schedule.phase - 1) % every


def load(
    ema: EMA, checkpoint: Mapping[str, Any], model: nn.Module, optimizer: Optimizer | None = None
) -> None:
    """Load the average in the state of NeMo's ``EMAOptimizer`` into ``ema``.

    ``ema`` keeps its schedule: build it with ``rule(state["decay"], state["every_n_steps"])`` and
    ``update_every=state["every_n_steps"]`` to continue with NeMo's numbers. Its update count is set
    so that the average changes at the same steps.

    Parameters
    ----------
    ema : EMA
        Average of ``model``.
    checkpoint : mapping
        Mapping with one state of an ``EMAOptimizer`` under ``"optimizer_states"``, or that state.
        NeMo writes it to the file whose name ends in ``-EMA``.
    model : torch.nn.Module
        Model that names the tensors, which NeMo saves without names.
    optimizer : torch.optim.Optimizer, optional
        Optimizer in whose parameter order the tensors were saved. Default: the model's order.

    Raises
    ------
    CheckpointError
        If something does not fit. The error names it; nothing is changed.
    ArgumentError, StateError
        If ``ema`` has several averages, or one split into two halves; if ``ema`` is applied.
    """
    state = _state_of(checkpoint)
    ordered, saved = _order_parameters(model, optimizer), state["ema"]
    if not isinstance(saved, list | tuple):
        raise CheckpointError(f"'ema' is of type {type(saved).__name__}, expected a tuple")
    if len(ordered) != len(saved):
        raise CheckpointError(
            f"the state holds {len(saved)} averages, but there are {len(ordered)} parameters: pass "
            "the optimizer that it was saved with"
        )
    problems = describe_unfit(
        (name or f"number {at}", one, parameter)
        for at, ((name, parameter), one) in enumerate(zip(ordered, saved, strict=True))
    )
    if problems:
        raise CheckpointError(
            "the averages do not fit the parameters at their places; pass the optimizer that they "
            "were saved with, which defines their order:\n" + format_problems(problems)
        )
    every = check_integer(state["every_n_steps"], "every_n_steps", 1)
    done = check_integer(state["current_step"], "current_step")
    names = (name for name, _ in ordered)
    averages = {name: one for name, one in zip(names, saved, strict=True) if name is not None}
    load_averages(ema, averages, done + _lead_over_nemo(ema, every))


def export(ema: EMA, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of NeMo's ``EMAOptimizer`` with the average of a model.

    It holds ``opt``, the optimizer's own state; ``ema``, a tuple of copies in the order of the
    optimizer's parameters: the averages, or the weights if they are not averaged; ``current_step``;
    ``decay``, per update; and ``every_n_steps``.

    Parameters
    ----------
    ema : EMA
        Average to export. Several averages, or one split into two halves, raise an ArgumentError.
    model : torch.nn.Module
        The averaged model.
    optimizer : torch.optim.Optimizer
        The optimizer that NeMo's ``EMAOptimizer`` wraps.
    """
    averages, every, done = copy_averages(ema), ema.schedule.update_every, ema.num_updates
    step = done - _lead_over_nemo(ema, every)
    return {
        "opt": optimizer.state_dict(),
        "ema": tuple(
            averages[name] if name is not None and name in averages else one.detach().clone()
            for name, one in _order_parameters(model, optimizer)
        ),
        "current_step": step if step >= 0 else step + every,
        "decay": ema.schedule.decays(max(done, 1))[0] ** every,
        "every_n_steps": every,
    }
