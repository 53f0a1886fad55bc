"""The exponential moving average of numbers, one at a time or as a series."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from fastema.engine import series
from fastema.errors import ArgumentError
from fastema.hints import check_options
from fastema.rules.checks import validate_decay
from fastema.tracking.scalar import SCALE, Floats, MovingAverage, OnNonFinite, Run

__all__ = ["ExponentialMovingAverage"]

_State: TypeAlias = "tuple[float, float, float, float]"


class ExponentialMovingAverage(MovingAverage):
    """Exponential moving average ``avg_n = decay * avg_(n-1) + (1 - decay) * x_n``, from ``x_1``.

    With ``debias=True`` the average has no initial value: ``avg_n = (1 - decay) * sum_k
    decay**(n-k) x_k / (1 - decay**n)``. This is the bias correction of Adam (D. Kingma and J. Ba,
    2014, https://arxiv.org/abs/1412.6980), which gives the first value no extra weight. pandas
    calls the two variants ``ewm(adjust=False)`` and ``ewm(adjust=True)``. With weights, the average
    of ``w_k x_k`` is divided by the average of ``w_k``. The rounding error of each step is carried
    to the next step, so errors do not accumulate. Use an instance from one thread at a time.

    With ``debias=True``, or once a weight is not 1, products ``(1 - decay) * w_k * x_k`` below
    1e-190 in magnitude lose digits, and below 1e-210 they count as 0.

    Parameters
    ----------
    decay : float
        Weight of the old average, in [0, 1); 0.9 by default. The average covers about
        ``1 / (1 - decay)`` values.
    debias : bool
        Correct the bias toward the first value; False by default.
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        How to treat a NaN or an infinity, see :class:`MovingAverage`; ``"show"`` by default. With
        ``"propagate"`` the average never recovers.

    Raises
    ------
    ArgumentError
        If an argument is invalid.

    Examples
    --------
    >>> loss = ExponentialMovingAverage(decay=0.5)
    >>> [loss.update(x) for x in (4.0, 2.0, 2.0)]
    [4.0, 3.0, 2.5]
    """

    __slots__ = ("_debias", "_decay", "_state")

    @check_options
    def __init__(
        self, decay: float = 0.9, debias: bool = False, *, on_nonfinite: OnNonFinite = "show"
    ) -> None:
        self._decay = validate_decay(decay)
        if not isinstance(debias, bool):
            raise ArgumentError(f"debias={debias!r}: expected True or False")
        self._debias = debias
        super().__init__(on_nonfinite)

    def _reset_values(self) -> None:
        super()._reset_values()
        # The averages of products and of weights, each with its residual.
        self._state: _State = (0.0, 0.0, 0.0, 0.0)

    @property
    def decay(self) -> float:
        """Weight of the old average."""
        return self._decay

    @property
    def debias(self) -> bool:
        """Whether the bias toward the first value is corrected."""
        return self._debias

    @property
    def count(self) -> int:
        """Number of values in the average."""
        return self.num_updates

    def _settings(self) -> dict[str, Any]:
        return {"decay": self._decay, "debias": self._debias, "on_nonfinite": self._on_nonfinite}

    def _prepare_state(self, x: float, weight: float) -> _State:
        """Return the state to which value ``x`` is added.

        Without bias correction, the first value is the initial average. An unscaled state is scaled
        by ``SCALE`` if ``weight`` is not 1, since that weight is scaled as well.
        """
        if not (self._num_updates or self._debias):
            return weight * x, 0.0, weight, 0.0
        state = self._state
        if weight != 1.0 == state[2]:
            average, residual, total, rest = state
            state = average * SCALE, residual * SCALE, total * SCALE, rest * SCALE
        return state

    def _is_plain(self) -> bool:
        """Return whether all weights so far were 1 and there is no bias correction."""
        return self._state[2] == 1.0 or not (self._num_updates or self._debias)

    def _push(self, x: float, weight: float) -> float:
        if weight == 1.0 and self._is_plain():
            average, residual, total, rest = self._prepare_state(x, 1.0)
            average, residual = _step(average, residual, x, self._decay)
            self._state = (average, residual, total, rest)
            return average
        weight *= SCALE
        average, residual, total, rest = self._prepare_state(x, weight)
        average, residual = _step(average, residual, weight * x, self._decay)
        total, rest = _step(total, rest, weight, self._decay)
        self._state = (average, residual, total, rest)
        # Correct the quotient for both residuals, to first order.
        ratio = average / total
        return ratio + (residual - ratio * rest) / total

    def _average_series(self, x: Floats, weights: Floats | None) -> Run:
        given = np.ones(len(x)) if weights is None else weights
        plain = self._is_plain() and bool((given == 1.0).all())
        if not plain:
            given = given * SCALE
        product, residual, total, rest = self._prepare_state(float(x[0]), float(given[0]))
        average, (product, residual) = series.ewm_mean(
            x if plain else given * x, self._decay, (product, residual)
        )
        finite = math.isfinite(average[-1])
        if not plain:
            weight, (total, rest) = series.ewm_mean(given, self._decay, (total, rest))
            average /= weight
        state = product, residual, total, rest
        return average, finite, lambda: setattr(self, "_state", state)

    def _get_state(self) -> dict[str, Any]:
        return {"state": list(self._state)}

    def _set_state(self, memory: Mapping[str, Any]) -> None:
        product, residual, total, weight_residual = map(float, memory["state"])
        self._state = (product, residual, total, weight_residual)


def _step(average: float, residual: float, x: float, decay: float) -> tuple[float, float]:
    """Return ``decay (average + residual) + (1 - decay) x``, rounded, and its residual."""
    # Start from the operand of larger weight: 1 - decay is then exact, and the step small.
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
    if result - result != 0.0:  # an infinity, or the difference of the largest floats
        return decay * average + (1.0 - decay) * x, 0.0
    return result, residual - (result - after)
