"""The exponential moving average of numbers, one by one and as a series."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from fastema.engine import series
from fastema.errors import ArgumentError
from fastema.rules.checks import checked_decay
from fastema.tracking.scalar import SCALE, Floats, MovingAverage, OnNonFinite, Run

__all__ = ["ExponentialMovingAverage"]

_State: TypeAlias = "tuple[float, float, float, float]"


class ExponentialMovingAverage(MovingAverage):
    """The average ``avg_n = decay * avg_(n-1) + (1 - decay) * x_n``, which begins at ``x_1``.

    With ``debias=True`` it begins with nothing: ``avg_n = (1 - decay) * sum_k decay**(n-k) x_k /
    (1 - decay**n)``, the bias correction of Adam (D. Kingma and J. Ba, 2014,
    https://arxiv.org/abs/1412.6980), in which the first value does not weigh more than others; in
    pandas these are ``ewm(adjust=False)`` and ``ewm(adjust=True)``. With weights it is the average
    of ``w_k x_k`` over that of ``w_k``. What each step rounds off is carried to the next, so that
    no error builds up. To be used by one thread at a time.

    Parameters
    ----------
    decay : float
        Weight of the old average, in [0, 1); it averages over about ``1 / (1 - decay)`` values.
    debias : bool
        Begin with nothing rather than with the first value.
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        What a NaN or an infinity does, see :class:`MovingAverage`. With ``"propagate"`` the average
        never recovers.

    Raises
    ------
    ArgumentError
        If an argument has no valid value.

    Examples
    --------
    >>> loss = ExponentialMovingAverage(decay=0.5)
    >>> [loss.update(x) for x in (4.0, 2.0, 2.0)]
    [4.0, 3.0, 2.5]
    """

    __slots__ = ("_debias", "_decay", "_state")

    def __init__(
        self, decay: float = 0.9, debias: bool = False, *, on_nonfinite: OnNonFinite = "show"
    ) -> None:
        self._decay = checked_decay(decay)
        if not isinstance(debias, bool):
            raise ArgumentError(f"debias={debias!r}: expected True or False")
        self._debias = debias
        super().__init__(on_nonfinite)

    def _begin(self) -> None:
        super()._begin()
        # Averages of products and of weights, each with what was rounded off.
        self._state: _State = (0.0, 0.0, 0.0, 0.0)

    @property
    def decay(self) -> float:
        """Weight of the old average."""
        return self._decay

    @property
    def debias(self) -> bool:
        """Whether it begins with nothing, and is corrected for that."""
        return self._debias

    @property
    def count(self) -> int:
        """Values in the average."""
        return self.num_updates

    def _settings(self) -> dict[str, Any]:
        return {"decay": self._decay, "debias": self._debias, "on_nonfinite": self._on_nonfinite}

    def _before(self, x: float, weight: float) -> _State:
        """Return the past that the next value meets: uncorrected, the first value is all of it.

        Weights are scaled but for ``weight = 1`` after a past of such alone, whose total is 1.
        """
        if not (self._num_updates or self._debias):
            return weight * x, 0.0, weight, 0.0
        state = self._state
        if weight != 1.0 == state[2]:
            average, residual, total, rest = state
            state = average * SCALE, residual * SCALE, total * SCALE, rest * SCALE
        return state

    def _is_plain(self) -> bool:
        """Return whether no weight but 1 was seen, and no bias is corrected."""
        return self._state[2] == 1.0 or not (self._num_updates or self._debias)

    def _push(self, x: float, weight: float) -> float:
        if weight == 1.0 and self._is_plain():
            average, residual, total, rest = self._before(x, 1.0)
            average, residual = _step(average, residual, x, self._decay)
            self._state = (average, residual, total, rest)
            return average
        weight *= SCALE
        average, residual, total, rest = self._before(x, weight)
        average, residual = _step(average, residual, weight * x, self._decay)
        total, rest = _step(total, rest, weight, self._decay)
        self._state = (average, residual, total, rest)
        # To first order in what was rounded off: without it the quotient would be off by both.
        ratio = average / total
        return ratio + (residual - ratio * rest) / total

    def _run(self, x: Floats, weights: Floats | None) -> Run:
        given = np.ones(len(x)) if weights is None else weights
        plain = self._is_plain() and bool((given == 1.0).all())
        if not plain:
            given = given * SCALE
        product, residual, total, rest = self._before(float(x[0]), float(given[0]))
        average, (product, residual) = series.ewm_mean(
            x if plain else given * x, self._decay, (product, residual)
        )
        finite = math.isfinite(average[-1])
        if not plain:
            weight, (total, rest) = series.ewm_mean(given, self._decay, (total, rest))
            average /= weight
        state = product, residual, total, rest
        return average, finite, lambda: setattr(self, "_state", state)

    def _memory(self) -> dict[str, Any]:
        return {"state": list(self._state)}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        product, residual, total, weight_residual = map(float, memory["state"])
        self._state = (product, residual, total, weight_residual)


def _step(average: float, residual: float, x: float, decay: float) -> tuple[float, float]:
    """``decay (average + residual) + (1 - decay) x``, and what that rounds off."""
    # From the side that weighs more: 1 - decay is exact then, and the step is the smaller part.
    if decay >= 0.5:
        share, here, here_rest, there, there_rest = 1.0 - decay, average, residual, x, 0.0
    else:
        share, here, here_rest, there, there_rest = decay, x, 0.0, average, residual
    apart = there - here
    took = apart - there
    rest = ((there - (apart - took)) - (here + took)) + (there_rest - here_rest)
    step = share * apart
    after = here + step
    took = after - here
    residual = here_rest + ((here - (after - took)) + (step - took) + share * rest)
    result = after + residual
    if result - result != 0.0:  # differences of the largest floats, or infinities, are none
        return decay * average + (1.0 - decay) * x, 0.0
    return result, residual - (result - after)
