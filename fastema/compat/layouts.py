"""Where the checkpoints of other trainers hold an average: a row of one table for each of them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from fastema.compat.transfer import (
    averages_of,
    by_plain_name,
    mapping_in,
    take_over,
    unfit,
    whole_in,
)
from fastema.errors import CheckpointError, listed
from fastema.shadow import EMA

__all__ = ["COMPOSER_PARTS", "LAYOUTS", "Layout"]

COMPOSER_PARTS: Final = ("named_parameters_dict", "named_buffers_dict")
"""The two dicts of Composer's ``EMAParameters``."""


class Layout(NamedTuple):
    """How a trainer's checkpoint holds an average.

    ``read(ema, checkpoint, *context)`` gives the averages by name, and the updates so far, None
    where they are not saved; ``write(ema, averages, *context)`` the state with these copies.
    """

    read: Callable[..., tuple[Mapping[str, Any], int | None]]
    write: Callable[..., dict[str, Any]]

    def load(
        self, ema: EMA, checkpoint: Any, *context: Any, num_updates: int | None = None
    ) -> None:
        """Take over the average of a checkpoint."""
        averages, done = self.read(ema, checkpoint, *context)
        take_over(ema, averages, done if num_updates is None else num_updates)

    def export(self, ema: EMA, *context: Any) -> dict[str, Any]:
        """The state of the trainer with this average."""
        return self.write(ema, averages_of(ema), *context)


def _held(averages: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages of these tensors, or copies of the tensors where they are not averaged."""
    found = by_plain_name(named)
    return {name: averages.get(name, one.detach().clone()) for name, one in found.items()}


# -- NeMo -----------------------------------------------------------------------------------------


def _nemo_order(model: nn.Module, optimizer: Optimizer | None) -> list[tuple[str | None, Tensor]]:
    """Parameters in the order of the optimizer, with their names in the model."""
    named = by_plain_name(dict(model.named_parameters()))
    names = {id(one): name for name, one in named.items()}
    if optimizer is None:
        return list(named.items())
    groups = (group["params"] for group in optimizer.param_groups)
    return [(names.get(id(one)), one) for group in groups for one in group]


def _nemo_state(checkpoint: Any) -> Mapping[str, Any]:
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


def _nemo_ahead(ema: EMA, every: int) -> int:
    """By how much its count is ahead of NeMo's, which updates with steps 1, 1 + every, ..."""
    return (ema.schedule.phase - 1) % every


def _read_nemo(
    ema: EMA, checkpoint: Any, model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, Any], int]:
    state = _nemo_state(checkpoint)
    ordered, saved = _nemo_order(model, optimizer), state["ema"]
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
    return averages, done + _nemo_ahead(ema, every)


def _write_nemo(
    ema: EMA, averages: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer
) -> dict[str, Any]:
    every, done = ema.schedule.update_every, ema.num_updates
    step = done - _nemo_ahead(ema, every)
    return {
        "opt": optimizer.state_dict(),
        "ema": tuple(
            averages[name] if name is not None and name in averages else one.detach().clone()
            for name, one in _nemo_order(model, optimizer)
        ),
        "current_step": step if step >= 0 else step + every,
        "decay": ema.schedule.decays(max(done, 1))[0] ** every,
        "every_n_steps": every,
    }


# -- Composer -------------------------------------------------------------------------------------


def _composer_state(checkpoint: Any) -> tuple[Mapping[str, Any], Any, int | None]:
    """The algorithm's state; the model's and the batches of the run, where they are there."""
    whole = mapping_in(checkpoint, "the checkpoint")
    state = mapping_in(whole.get("state", whole), "'state' of the checkpoint")
    if "ema_model" in state:
        return state, None, None
    algorithms = state.get("algorithms", ())
    if isinstance(algorithms, Mapping):  # as in old checkpoints
        algorithms = list(algorithms.items())
    if not isinstance(algorithms, list | tuple) or not all(
        isinstance(one, list | tuple) and len(one) == 2 for one in algorithms
    ):
        raise CheckpointError(
            f"'algorithms' is {reprlib.repr(algorithms)}, expected a list of pairs of a name and "
            "a state"
        )
    found = [one for name, one in algorithms if name == "EMA"]
    if len(found) != 1:
        raise CheckpointError(
            f"the checkpoint holds {len(found)} states of Composer's EMA, expected one: under "
            "'algorithms', or by itself with 'ema_model'"
        )
    algorithm = mapping_in(found[0], "the state of Composer's EMA")
    if "ema_model" not in algorithm:
        raise CheckpointError("the state of Composer's EMA lacks 'ema_model'")
    batches = None
    if state.get("timestamp") is not None:
        outer = mapping_in(state["timestamp"], "'timestamp' of the checkpoint")
        inner = outer.get("Timestamp", {})
        inner = mapping_in(inner, "'Timestamp' of the checkpoint's 'timestamp'")
        batches = whole_in(inner["batch"], "the timestamp's batch") if "batch" in inner else None
    return algorithm, state.get("model"), batches


def _read_composer(ema: EMA, checkpoint: Any) -> tuple[dict[str, Any], int | None]:
    state, model, batches = _composer_state(checkpoint)
    if state["ema_model"] is None:
        raise CheckpointError(
            "'ema_model' is None: the run was saved before its average began, at ema_start"
        )
    averages = dict(mapping_in(state["ema_model"], "'ema_model'"))
    if averages.keys() >= set(COMPOSER_PARTS):  # else a state dict, from before Composer 0.13
        parts = [mapping_in(averages[part], f"{part!r} of 'ema_model'") for part in COMPOSER_PARTS]
        averages = {name: one for part in parts for name, one in part.items()}
    if state.get("ema_weights_active") and "training_model" not in state:
        if model is None:
            raise CheckpointError(
                "the state holds the weights in place of the average (ema_weights_active), which "
                "is in the model's: pass the whole checkpoint of the Trainer"
            )
        weights = by_plain_name(mapping_in(model, "'model' of the checkpoint"))
        averages = {name: weights[name] for name in by_plain_name(averages) if name in weights}
    return averages, batches


def _write_composer(ema: EMA, averages: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    names = list(by_plain_name(trained))
    missing = [name for name in names if name not in averages]
    if missing:
        raise CheckpointError(f"these parameters are not averaged: {', '.join(missing)}")
    held = {name: averages[name] for name in names}, _held(averages, dict(model.named_buffers()))
    return {
        "ema_model": dict(zip(COMPOSER_PARTS, held, strict=True)),
        "ema_weights_active": False,
        "ema_started": True,
    }


# -- D2Go -----------------------------------------------------------------------------------------


def _read_d2go(ema: EMA, checkpoint: Any) -> tuple[Mapping[str, Any], None]:
    whole = mapping_in(checkpoint, "the checkpoint")
    state = whole.get("ema_state", whole)
    return mapping_in(state, "the average ('ema_state', or by itself)"), None


def _write_d2go(
    ema: EMA, averages: Mapping[str, Tensor], model: nn.Module | None
) -> dict[str, dict[str, Tensor]]:
    buffers = {} if model is None else _held(averages, dict(model.named_buffers()))
    left_out = {name: one for name, one in buffers.items() if name in ema.skipped_names}
    return {"ema_state": {**left_out, **averages}}


LAYOUTS: Final = {
    "nemo": Layout(_read_nemo, _write_nemo),
    "composer": Layout(_read_composer, _write_composer),
    "d2go": Layout(_read_d2go, _write_d2go),
}
"""By the name of the module with the public functions."""
