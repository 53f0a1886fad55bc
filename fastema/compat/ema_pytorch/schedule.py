"""Step counting in module buffers, and the decay schedule that depends on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastema.compat.averager import ModelAverager
from fastema.compat.mirrored import MirroredNumber
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError

__all__ = ["ScheduledDecayModule", "StepCountingModule", "check_finite", "whole_number"]


def whole_number(number: Any, name: str, least: int = 1) -> int:
    """Return a number from Python, NumPy or a tensor, or a float with a whole value, as an int.

    Raise an ArgumentError for anything else, and for numbers below ``least``.
    """
    if type(number) is int and number >= least:
        return number
    if not isinstance(number, bool | str | bytes):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            found = int(number)
            if found == number and found >= least:
                return found
    raise ArgumentError(f"{name}={number!r}: expected a whole number of at least {least}")


def check_finite(number: Any, name: str) -> None:
    """Raise an ArgumentError that names the parameter if ``number`` is not a finite number."""
    with suppress(TypeError, ValueError):
        if math.isfinite(number):
            return
    raise ArgumentError(f"{name}={number!r}: expected a finite number")


class StepCountingModule(nn.Module):
    """Base module that counts steps in the buffers ``initted`` and ``step``, without GPU syncs."""

    initted: Tensor
    step: Tensor
    update_every: int

    _copy_weights: Callable[[], None]
    _update_average: Callable[[], None]

    def __init__(self, *, peer_exact: bool) -> None:
        super().__init__()
        self.peer_exact = peer_exact
        self._steps, self._started = MirroredNumber(), MirroredNumber()

    def _register_counters(self) -> None:
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))

    @property
    def _num_steps(self) -> int:
        return int(self._steps.read(self.step))

    @property
    def _has_begun(self) -> bool:
        return bool(self._started.read(self.initted))

    def _mark_begun(self) -> None:
        self._started.write(self.initted, True)

    @contextmanager
    def _next_step(self) -> Iterator[int]:
        """Count a step and yield its number, from 0; undo the count if the block raises.

        Ctrl-C takes effect after the block: a step is taken and counted, or neither.
        """
        with defer_signals():
            step = self._num_steps
            self._steps.write(self.step, step + 1)
            try:
                yield step
            except BaseException:
                self._steps.write(self.step, step)
                raise

    def update(self) -> None:
        """Count a step, and update the average if an update is due.

        Raises a LayoutError, DTypeError or BridgeError that names the tensors if the average and
        its source do not match, and an ArgumentError for an invalid hyperparameter. Nothing is
        written or counted in these cases.
        """
        with self._next_step() as step:
            if self._is_copy_step(step):
                self._copy_weights()
                self._mark_begun()
            else:
                self._update_if_due(step)

    def _is_copy_step(self, step: int) -> bool:
        """Return whether a step copies the weights into the average."""
        return not self._has_begun and self._is_due(step)

    def _is_due(self, step: int) -> bool:
        return step % whole_number(self.update_every, "update_every") == 0

    def _update_if_due(self, step: int) -> None:
        if self._is_due(step):
            self._update_average()

    @property
    def _rounding(self) -> str:
        return "nearest" if self.peer_exact else "stochastic"

    def inplace_copy(self, tgt: Tensor, src: Tensor) -> None:
        """Copy ``src`` into ``tgt``, in the dtype and on the device of ``tgt``."""
        ModelAverager([tgt.detach()]).copy([src.detach()])

    def inplace_lerp(self, tgt: Tensor, src: Tensor, weight: float) -> None:
        """Compute ``tgt += weight * (src - tgt)`` in place, in the dtype and device of ``tgt``."""
        ModelAverager([tgt.detach()], rounding=self._rounding).update(
            [src.detach()], float(weight), self._num_steps
        )


class ScheduledDecayModule(StepCountingModule):
    """Base module with a decay that grows with the steps since ``update_after_step``."""

    def _set_schedule(
        self,
        beta: float | None,
        update_after_step: int,
        update_every: int,
        inv_gamma: float,
        power: float,
        min_value: float,
    ) -> None:
        self.beta = beta
        self.is_frozen = beta == 1.0
        self.update_after_step = update_after_step
        self.update_every = whole_number(update_every, "update_every")
        self.inv_gamma = inv_gamma
        self.power = power
        self.min_value = min_value
        self._check_schedule()

    def _check_schedule(self) -> None:
        for name in ("beta", "inv_gamma", "power", "min_value"):
            if name != "beta" or self.beta is not None:
                check_finite(getattr(self, name), name)
        if not self.inv_gamma > 0:
            raise ArgumentError(f"inv_gamma={self.inv_gamma!r}: expected a number above 0")

    def get_current_decay(self) -> float:
        """Return the current decay per update, which is 0 until after ``update_after_step``."""
        self._check_schedule()
        epoch = self._num_steps - self.update_after_step - 1
        if epoch <= 0:
            return 0.0
        if self.peer_exact:  # bit for bit, with its error of 0.02 % in 1 - decay at beta = 0.9999
            single = torch.tensor(float(epoch), dtype=torch.float32)
            grown = 1 - (1 + single / self.inv_gamma) ** -self.power
            return grown.clamp(min=self.min_value, max=self.beta).item()
        grown_to = 1.0 - float((1.0 + epoch / self.inv_gamma) ** -self.power)
        decay = max(grown_to, self.min_value)
        return decay if self.beta is None else min(decay, self.beta)

    def _is_copy_step(self, step: int) -> bool:
        return not self._has_begun or (self._is_due(step) and step <= self.update_after_step)

    def _weight(self, decay: float | None) -> float:
        """Return the weight of new values, from ``decay`` or, if it is None, the schedule."""
        return 1.0 - (self.get_current_decay() if decay is None else decay)
