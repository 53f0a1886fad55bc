"""The schedule of Ultralytics, a rule for any average."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastema.compat.shares import check_fraction
from fastema.rules import Rule
from fastema.rules.checks import validate_positive

__all__ = ["Ramp"]


@dataclass(frozen=True, slots=True)
class Ramp(Rule):
    """A decay that grows as ``limit * (1 - exp(-n / tau))``: the schedule of Ultralytics.

    The decay is close to 0 at the first step, and 95 % of the limit at ``n = 3 * tau``. It also
    works as ``fastema.EMA(model, decay=Ramp())``. Calling it with a step returns the decay, like
    the attribute of the peer's class.

    Parameters
    ----------
    limit : float
        Limit of the decay, in [0, 1]. Default 0.9999.
    tau : float
        Time constant in steps, above 0. Default 2000.

    Examples
    --------
    >>> [round(Ramp(0.9999, 2000)(n), 4) for n in (1, 2000, 20_000)]
    [0.0005, 0.6321, 0.9999]
    """

    limit: float = 0.9999
    tau: float = 2000.0

    def __post_init__(self) -> None:
        check_fraction(self.limit, "decay")
        object.__setattr__(self, "tau", validate_positive(self.tau, "tau"))

    def decay(self, n: int) -> float:
        """Return ``limit * (1 - exp(-n / tau))``."""
        return self.limit * -math.expm1(-n / self.tau)

    def __call__(self, n: int) -> float:
        """Return :meth:`decay` of ``n``."""
        return self.decay(n)
