"""The decay that follows from how far an average has come."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastema.errors import ArgumentError

__all__ = ["checked_schedule", "finite", "grown_decay", "weight_of"]


def finite(number: Any, name: str) -> None:
    """Refuse what is no finite number.

    Raises
    ------
    ArgumentError
        Naming it.
    """
    try:
        if math.isfinite(number):
            return
    except (TypeError, ValueError):
        pass
    raise ArgumentError(f"{name}={number!r}: expected a finite number")


def checked_schedule(beta: Any, inv_gamma: Any, power: Any, min_value: Any) -> None:
    """Refuse what makes no decays.

    Raises
    ------
    ArgumentError
        For what is no finite number, but for None as ``beta``; for an ``inv_gamma`` not above 0.
    """
    numbers = {"inv_gamma": inv_gamma, "power": power, "min_value": min_value}
    for name, number in numbers.items() if beta is None else [("beta", beta), *numbers.items()]:
        finite(number, name)
    if not inv_gamma > 0:
        raise ArgumentError(f"inv_gamma={inv_gamma!r}: expected a number above 0")


def grown_decay(
    epoch: int,
    beta: float | None,
    inv_gamma: float,
    power: float,
    min_value: float,
    *,
    single: bool,
) -> float:
    """``1 - (1 + epoch / inv_gamma) ** -power``, between ``min_value`` and ``beta``; 0 at epoch 0.

    Parameters
    ----------
    epoch : int
        Steps since the average began.
    beta, inv_gamma, power, min_value : float
        None as ``beta`` is no bound.
    single : bool
        Computed by torch in float32, to the bit as ema_pytorch does. At ``beta = 0.9999`` that is
        off by 0.02 % in ``1 - decay``.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        As :func:`checked_schedule`.
    """
    checked_schedule(beta, inv_gamma, power, min_value)
    if epoch <= 0:
        return 0.0
    if single:
        grown = 1 - (1 + torch.tensor(float(epoch), dtype=torch.float32) / inv_gamma) ** -power
        return grown.clamp(min=min_value, max=beta).item()
    decay = max(1.0 - float((1.0 + epoch / inv_gamma) ** -power), min_value)
    return decay if beta is None else min(decay, beta)


def weight_of(decay: float, steps: int) -> float:
    """Weight of the new value where the old one decays for so many steps, ``1 - decay**steps``."""
    if steps == 1 or decay <= 0.0:
        return 1.0 - decay
    # Near 1 the power is too close to 1 for the difference to keep its digits.
    return -math.expm1(steps * math.log(decay))
