"""NeMo's averages of models: their schedule as a rule, and the states of its ``EMAOptimizer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastema.bridges.names import plain_names
from fastema.compat.transfer import averages_of, mapping_in, take_over, unfit, whole_in
from fastema.errors import CheckpointError, listed
from fastema.rules import Aligned
from fastema.rules.checks import checked_decay, checked_whole
from fastema.shadow import EMA

__all__ = ["export", "load", "rule"]


def rule(decay: float = 0.9999, every_n_steps: int = 1) -> Aligned:
    """The schedule of NeMo's ``EMA``: a constant decay at every ``every_n_steps``-th step.

    NeMo uses ``decay`` at each update, however many steps lie between two, so that the average
    looks back over ``every_n_steps`` times as many steps. The rule says what that is per step.

    Parameters
    ----------
    decay : float
        Of an update, in [0, 1).
    every_n_steps : int
        At least 1.

    Returns
    -------
    Aligned
        ``decay ** (1 / every_n_steps)``, for ``fastema.EMA(model, decay=rule(decay, k),
        update_every=k)``. As in NeMo the first step updates the average, then every k-th.

    Raises
    ------
    ArgumentError
        For a number out of range.

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
    """Parameters in NeMo's order, which is the optimizer's, with their names in the model."""
    named = list(model.named_parameters())
    plain = plain_names([name for name, _ in named])
    names = {id(one): name for name, (_, one) in zip(plain, named, strict=True)}
    if optimizer is None:
        return [(names[id(one)], one) for _, one in named]
    return [
        (names.get(id(one)), one) for group in optimizer.param_groups for one in group["params"]
    ]


def _state(checkpoint: Any) -> Mapping[str, Any]:
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
    missing = [name for name in ("ema", "current_step", "every_n_steps") if name not in found[0]]
    if missing:
        raise CheckpointError(f"the state of the EMAOptimizer lacks {', '.join(missing)}")
    return found[0]


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
        Of ``model``.
    checkpoint : mapping
        With one such state under ``"optimizer_states"``, or the state itself. NeMo writes it to the
        file whose name ends in ``-EMA``.
    model : torch.nn.Module
        Whose parameters' names go with the tensors, which NeMo saves without.
    optimizer : torch.optim.Optimizer, optional
        In the order of whose parameters they were saved; by default that is ``model.parameters()``.

    Raises
    ------
    CheckpointError
        If there is no such state, or it holds another number of tensors, or others by name and
        shape, or counts that are none; nothing was changed.
    ArgumentError
        For an ``ema`` with several averages, or one in two halves.
    StateError
        While the average is applied.
    """
    state = _state(checkpoint)
    ordered, saved = _ordered(model, optimizer), state["ema"]
    if not isinstance(saved, list | tuple):
        raise CheckpointError(f"'ema' is of type {type(saved).__name__}, expected a tuple")
    if len(ordered) != len(saved):
        raise CheckpointError(
            f"the state holds {len(saved)} averages, but there are {len(ordered)} parameters: pass "
            "the optimizer that it was saved with"
        )
    pairs = list(zip(ordered, saved, strict=True))
    labels = [f"number {at}" if name is None else name for at, (name, _) in enumerate(ordered)]
    problems = unfit(
        (label, one, parameter) for label, ((_, parameter), one) in zip(labels, pairs, strict=True)
    )
    if problems:
        raise CheckpointError(
            "the averages, by the parameters at their places, do not fit; pass the optimizer that "
            "they were saved with, in whose order they are:\n" + listed(problems)
        )
    every = whole_in(state["every_n_steps"], "every_n_steps", 1)
    done = whole_in(state["current_step"], "current_step")
    averages = {name: one for (name, _), one in pairs if name is not None}
    take_over(ema, averages, done + _ahead(ema, every))


def _ahead(ema: EMA, every: int) -> int:
    """By how much its count is ahead of NeMo's, which updates with steps 1, 1 + every, ..."""
    return (ema.schedule.phase - 1) % every


def export(ema: EMA, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of NeMo's ``EMAOptimizer`` with this average.

    Parameters
    ----------
    ema : EMA
        Of ``model``. Its decay per update and ``update_every`` become ``decay`` and
        ``every_n_steps``.
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer
        The one within NeMo's, of ``model``.

    Returns
    -------
    dict
        ``opt`` (the optimizer's own state), ``ema`` (a tuple of copies, in the order of its
        parameters, with the weights themselves where they are not averaged), ``current_step``,
        ``decay`` and ``every_n_steps``.

    Raises
    ------
    ArgumentError
        For an ``ema`` with several averages, or one in two halves.
    """
    averages = averages_of(ema)
    tensors = tuple(
        averages[name] if name in averages else one.detach().clone()
        for name, one in _ordered(model, optimizer)
    )
    every, done = ema.schedule.update_every, ema.num_updates
    step = done - _ahead(ema, every)
    decay = ema.schedule.decays(max(done, 1))[0]
    return {
        "opt": optimizer.state_dict(),
        "ema": tensors,
        "current_step": step if step >= 0 else step + every,
        "decay": decay**every,
        "every_n_steps": every,
    }
