"""The decay that follows from how far an average has come."""

from __future__ import annotations

import math

import torch

__all__ = ["grown_decay", "weight_of"]


def grown_decay(
    epoch: int, beta: float, inv_gamma: float, power: float, min_value: float, *, single: bool
) -> float:
    """``1 - (1 + epoch / inv_gamma) ** -power``, between ``min_value`` and ``beta``; 0 at epoch 0.

    Parameters
    ----------
    epoch : int
        Steps since the average began.
    beta, inv_gamma, power, min_value : float
    single : bool
        Computed by torch in float32, to the bit as ema_pytorch does. At ``beta = 0.9999`` that is
        off by 0.02 % in ``1 - decay``.

    Returns
    -------
    float
    """
    if epoch <= 0:
        return 0.0
    if single:
        grown = 1 - (1 + torch.tensor(float(epoch), dtype=torch.float32) / inv_gamma) ** -power
        return grown.clamp(min=min_value, max=beta).item()
    return min(max(1.0 - float((1.0 + epoch / inv_gamma) ** -power), min_value), beta)


def weight_of(decay: float, steps: int) -> float:
    """Weight of the new value where the old one decays for so many steps, ``1 - decay**steps``."""
    if steps == 1 or decay <= 0.0:
        return 1.0 - decay
    # Near 1 the power is too close to 1 for the difference to keep its digits.
    return -math.expm1(steps * math.log(decay))
