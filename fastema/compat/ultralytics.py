"""``ModelEMA`` of Ultralytics YOLO, its schedule, and the averages in its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastema.checkpoint.transfer import load_modules, mapping_in, whole_in
from fastema.compat.modules import ModuleAverager, frozen_copy
from fastema.compat.shares import refuse_no_share
from fastema.engine.interrupts import defer_signals
from fastema.errors import CheckpointError
from fastema.rules import Rule
from fastema.rules.checks import checked_positive

__all__ = ["ModelEMA", "Ramp", "export", "load"]

_TEACHER = "teacher_model"
"""The attribute of a distillation model that is not averaged: its teacher."""


@dataclass(frozen=True, slots=True)
class Ramp(Rule):
    """A decay that grows as ``limit * (1 - exp(-n / tau))``: the schedule of Ultralytics.

    The first step has nearly none, and ``n = 3 * tau`` 95 % of the limit. It is for
    ``fastema.EMA(model, decay=Ramp())`` too; calling it with a step gives the decay, as the
    attribute of the peer's class does.

    Parameters
    ----------
    limit : float
        In [0, 1].
    tau : float
        Steps, above 0.

    Examples
    --------
    >>> [round(Ramp(0.9999, 2000)(n), 4) for n in (1, 2000, 20_000)]
    [0.0005, 0.6321, 0.9999]
    """

    limit: float = 0.9999
    tau: float = 2000.0

    def __post_init__(self) -> None:
        refuse_no_share(self.limit, "decay")
        object.__setattr__(self, "tau", checked_positive(self.tau, "tau"))

    def decay(self, n: int) -> float:
        """``limit * (1 - exp(-n / tau))``."""
        return self.limit * -math.expm1(-n / self.tau)

    def __call__(self, n: int) -> float:
        """The same as :meth:`decay`."""
        return self.decay(n)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in what compiles it or shares it out."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return model


class ModelEMA:
    """Average of a whole model: the ``ModelEMA`` of Ultralytics.

    ``v += (1 - d) * (x - v)`` for all floating-point parameters and buffers at the n-th call of
    :meth:`update`, with ``d = decay * (1 - exp(-n / tau))``.

    Parameters
    ----------
    model : torch.nn.Module
        Copied to ``ema``, in evaluation mode and without gradients, without what compiles it or
        shares it out, and without a ``teacher_model``.
    decay, tau : float
        Of a :class:`Ramp`; else an ArgumentError. The attribute ``decay`` is a callable, of the
        number of updates, that may be replaced.
    updates : int
        Calls of :meth:`update` so far.

    Attributes
    ----------
    enabled : bool
        Where False, :meth:`update` and :meth:`update_attr` do nothing.

    Notes
    -----
    The interface and the numbers are those of ``ultralytics/utils/torch_utils.py``, version 8.4.
    Where it differs, ``docs/drop-in.md`` aside: the model that is given is followed, there that of
    the first update as it was then; the devices of average and model may differ; it can be pickled.
    Random bits are a function of ``updates``, the name and the element.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> ema = ModelEMA(model)
    >>> ema.update(model)                           # after each optimizer step
    >>> ema.updates
    1
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, tau: float = 2000, updates: int = 0
    ) -> None:
        self.decay: Callable[[int], float] = Ramp(decay, tau)
        inner = _unwrapped(model)
        teacher = getattr(inner, _TEACHER, None)
        memo = {} if teacher is None else {id(teacher): None}
        self.ema = frozen_copy(inner, memo).eval()
        if hasattr(inner, _TEACHER):
            setattr(self.ema, _TEACHER, None)
        self.updates = updates
        self.enabled = True
        self._averager = ModuleAverager(left_out=f"{_TEACHER}.")

    def update(self, model: nn.Module) -> None:
        """Take a model into the average; call it after each optimizer step.

        A LayoutError names the tensors that only one of the two has, or whose shapes differ;
        nothing was written or counted then.
        """
        if not self.enabled:
            return
        step = self.updates + 1
        averager = self._averager.of(self.ema)
        weight = 1.0 - self.decay(step)
        with defer_signals():  # an update is done and counted, or neither
            averager.update(_unwrapped(model), weight, step)
            self.updates = step

    def update_attr(
        self,
        model: nn.Module,
        include: Iterable[str] = (),
        exclude: Iterable[str] = ("process_group", "reducer"),
    ) -> None:
        """Copy a model's attributes to :attr:`ema`, but for those that begin with an underscore.

        ``include`` names the only ones to copy, all if it is empty; ``exclude`` those to leave out,
        by default what belongs to ``DistributedDataParallel``.
        """
        if not self.enabled:
            return
        wanted, unwanted = set(include), set(exclude)
        for name, value in vars(_unwrapped(model)).items():
            if name.startswith("_") or name in unwanted or (wanted and name not in wanted):
                continue
            setattr(self.ema, name, value)


def export(ema: ModelEMA) -> dict[str, Any]:
    """Return Ultralytics' checkpoint of an average: ``"ema"`` and ``"updates"``.

    The averaged model is in float16 there, as Ultralytics saves it. Keep ``ema.ema.state_dict()``
    beside it to resume without the loss of 13 bits of each weight.
    """
    return {"ema": deepcopy(ema.ema).half(), "updates": ema.updates}


def load(ema: ModelEMA, checkpoint: Mapping[str, Any]) -> None:
    """Take over the average of a checkpoint of Ultralytics; the dtypes stay those of ``ema``.

    Parameters
    ----------
    ema : ModelEMA
        Of the same model.
    checkpoint : mapping
        With ``"ema"``, a module or a state dict, and ``"updates"``. A CheckpointError if one is
        missing, or tensors are not those of the model, naming them; nothing was changed then.
    """
    whole = mapping_in(checkpoint, "the checkpoint")
    saved, updates = whole.get("ema"), whole.get("updates")
    if saved is None or updates is None:
        raise CheckpointError(
            "the checkpoint holds no average with its number of updates under 'ema' and 'updates' "
            "(one that was stripped at the end of training has none)"
        )
    state = mapping_in(saved.state_dict() if isinstance(saved, nn.Module) else saved, "'ema'")
    done = whole_in(updates, "updates")
    load_modules((ema.ema, state))
    ema.updates = done
