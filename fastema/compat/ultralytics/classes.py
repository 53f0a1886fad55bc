"""The classes and functions of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import nn

from fastema.checkpoint.transfer import check_integer, check_mapping, load_modules
from fastema.compat.modules import ModuleAverager, copy_frozen
from fastema.compat.ultralytics.schedule import Ramp
from fastema.engine.interrupts import defer_signals
from fastema.errors import CheckpointError

__all__ = ["ModelEMA", "export", "load"]

_TEACHER = "teacher_model"
"""Attribute of a distillation model that holds its teacher, which is not averaged."""


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of ``torch.compile`` and data parallelism."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _unwrap(inner)
    return model


class ModelEMA:
    """Average of a whole model: the ``ModelEMA`` of Ultralytics.

    ``v += (1 - d) * (x - v)`` for all floating-point parameters and buffers at the n-th call of
    :meth:`update`, with ``d = decay * (1 - exp(-n / tau))``.

    Parameters
    ----------
    model : torch.nn.Module
        Model to average; deep-copied to ``ema``, in evaluation mode and without gradients, without
        wrappers of ``torch.compile`` and data parallelism, and without its ``teacher_model``.
    decay, tau : float
        Limit and time constant of a :class:`Ramp`, otherwise an ArgumentError. Defaults 0.9999 and
        2000. The attribute ``decay`` is a callable of the number of updates; it may be replaced.
    updates : int
        Number of calls of :meth:`update` so far. Default 0.

    Attributes
    ----------
    enabled : bool
        If False, :meth:`update` and :meth:`update_attr` do nothing.

    Notes
    -----
    The interface and the numbers are those of ``ultralytics/utils/torch_utils.py``, version 8.4.
    Differences beyond those in ``docs/drop-in.md``: each update uses the model that it gets, while
    the peer keeps the tensors of the first update's model; average and model may be on different
    devices; the average can be pickled. Random bits are a function of ``updates``, the name and the
    element.

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
        inner = _unwrap(model)
        teacher = getattr(inner, _TEACHER, None)
        memo = {} if teacher is None else {id(teacher): None}
        self.ema = copy_frozen(inner, memo).eval()
        if hasattr(inner, _TEACHER):
            setattr(self.ema, _TEACHER, None)
        self.updates = updates
        self.enabled = True
        self._averager = ModuleAverager(left_out=f"{_TEACHER}.")

    def update(self, model: nn.Module) -> None:
        """Update the average from a model; call it after each optimizer step.

        Raise a LayoutError that names tensors that only one of the two has, or whose shapes differ.
        Nothing is written or counted then.
        """
        if not self.enabled:
            return
        step = self.updates + 1
        averager = self._averager.of(self.ema)
        weight = 1.0 - self.decay(step)
        with defer_signals():  # an interrupt never separates an update from its count
            averager.update(_unwrap(model), weight, step)
            self.updates = step

    def update_attr(
        self,
        model: nn.Module,
        include: Iterable[str] = (),
        exclude: Iterable[str] = ("process_group", "reducer"),
    ) -> None:
        """Copy a model's attributes to ``ema``, except those that begin with an underscore.

        If ``include`` is not empty, copy only the attributes that it names. Skip the attributes in
        ``exclude``, by default those of ``DistributedDataParallel``.
        """
        if not self.enabled:
            return
        wanted, unwanted = set(include), set(exclude)
        for name, value in vars(_unwrap(model)).items():
            if name.startswith("_") or name in unwanted or (wanted and name not in wanted):
                continue
            setattr(self.ema, name, value)


def export(ema: ModelEMA) -> dict[str, Any]:
    """Return Ultralytics' checkpoint of an average: a dict with ``"ema"`` and ``"updates"``.

    Like Ultralytics, it stores the averaged model in float16. Save ``ema.ema.state_dict()`` too, to
    resume without losing 13 bits of each weight.
    """
    return {"ema": deepcopy(ema.ema).half(), "updates": ema.updates}


def load(ema: ModelEMA, checkpoint: Mapping[str, Any]) -> None:
    """Load the average of an Ultralytics checkpoint; the dtypes stay those of ``ema``.

    Parameters
    ----------
    ema : ModelEMA
        Average of the same model.
    checkpoint : mapping
        Mapping with ``"ema"``, a module or a state dict, and ``"updates"``.

    Raises
    ------
    CheckpointError
        If an entry is missing, or tensors do not match the model. The error names them; nothing is
        changed.
    """
    whole = check_mapping(checkpoint, "the checkpoint")
    saved, updates = whole.get("ema"), whole.get("updates")
    if saved is None or updates is None:
        raise CheckpointError(
            "the checkpoint holds no average with its number of updates under 'ema' and 'updates' "
            "(a checkpoint that was stripped at the end of training has neither)"
        )
    state = check_mapping(saved.state_dict() if isinstance(saved, nn.Module) else saved, "'ema'")
    done = check_integer(updates, "updates")
    load_modules((ema.ema, state))
    ema.updates = done
