"""The exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastema.errors import ArgumentError
from fastema.rules import Constant, Rule, Window, debiased
from fastema.shadow.average import Average, Weights
from fastema.shadow.options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EMA"]


class EMA(Average[Weights]):
    """Exponential moving average of weights, kept in flat buffers and updated in one call.

    At the n-th update ``avg += w(n) * (x - avg)`` with ``w(n) = 1 - decay(n)``.

    Parameters
    ----------
    weights : torch module, array, or list, tuple, dict or iterator of arrays
        See :class:`Average`.
    decay : float or rule, or a sequence of them
        Weight of the old average, in [0, 1), or a schedule of :mod:`fastema.rules`. Several are
        averages of their own that are updated in one pass over the weights; ``shadows`` holds them,
        and ``which=`` names one of them in a call.
    zero_debias : bool
        Begin with nothing and correct the bias, as Adam does: the weights of the start have no
        share in the average, which is that of the weights seen so far.
    **options
        ``shadow_dtype``, ``rounding``, ``seed``, ``update_every``, ``start_after``, ``frozen``,
        ``buffers``, ``policy``, ``on_nonfinite``, ``drift``, ``capturable`` and ``watch``, see
        :class:`Average`.

    Attributes
    ----------
    shadow : Mapping of str to array
        The averaged tensors.
    num_updates : int
        Calls of :meth:`update` so far.

    Raises
    ------
    ArgumentError, LayoutError, DTypeError, BridgeError
        See :class:`Average`.

    Notes
    -----
    Bytes moved per element and update: the weights once, each average twice (12 for float32, 10 for
    bfloat16 weights with a float32 average, ``4 + 8 * K`` for K averages in float32).

    Examples
    --------
    >>> import numpy as np, fastema
    >>> w = np.array([1.0, 2.0], np.float32)
    >>> ema = fastema.EMA([w], decay=0.5)
    >>> w += 1
    >>> ema.update()
    >>> with ema.swapped():
    ...     w.copy()
    array([1.5, 2.5], dtype=float32)
    >>> w
    array([2., 3.], dtype=float32)

    References
    ----------
    B. Polyak and A. Juditsky, Acceleration of stochastic approximation by averaging, 1992,
    https://doi.org/10.1137/0330046
    """

    def __init__(
        self,
        weights: Weights,
        decay: float | Rule | Sequence[float | Rule] = 0.999,
        *,
        zero_debias: bool = False,
        **options: Unpack[Options],
    ) -> None:
        several = decay if isinstance(decay, Sequence) else (decay,)
        rules = [one if isinstance(one, Rule) else Constant(one) for one in several]
        if any(isinstance(rule, Window) for rule in rules):
            raise ArgumentError("a windowed mean needs a ring: build fastema.SMA(weights, window)")
        if zero_debias:
            rules = [debiased(rule) for rule in rules]
        super().__init__(weights, rules, **options)
