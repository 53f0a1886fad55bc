"""The mean of all weights since a step: stochastic weight averaging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastema.average.average import Average, Weights
from fastema.average.options import OnNonFinite, Policy, Rounding, select_shared_options
from fastema.hints import check_options
from fastema.rules import CumulativeMean

__all__ = ["SWA"]


class SWA(Average[Weights]):
    """Stochastic weight averaging (SWA): the plain mean of the weights of all updates.

    At the n-th update ``avg += (x - avg) / n``; the first update copies the weights. With
    ``start_after=s`` and ``update_every=k`` it is the mean of every k-th step after step ``s``.

    Parameters
    ----------
    weights : torch module, array, or list, tuple, dict or iterator of arrays
        The tensors to average; see :class:`fastema.EMA`.
    shadow_dtype : dtype or str, optional
        Dtype of the mean, by default that of the weights; see :class:`fastema.EMA`. ``"float64"``
        keeps long means exact enough for :func:`fastema.mean_between`.
    rounding, seed, update_every, start_after
        See :class:`fastema.EMA`.
    frozen, buffers, policy, on_nonfinite, capturable
        See :class:`fastema.EMA`.

    Raises
    ------
    ArgumentError, LayoutError, DTypeError, BridgeError
        See :class:`fastema.EMA`.

    Notes
    -----
    The running statistics of BatchNorm do not fit averaged weights. Recompute them with
    ``with swa.swapped(): fastema.update_bn(loader, model)``.

    Examples
    --------
    >>> import numpy as np, fastema
    >>> w = np.array([1.0])
    >>> swa = fastema.SWA([w])
    >>> for value in (2.0, 3.0, 7.0):
    ...     w[:] = value
    ...     swa.update()
    >>> swa.shadow["0"]
    array([4.])

    References
    ----------
    P. Izmailov et al., Averaging weights leads to wider optima and better generalization, 2018,
    https://arxiv.org/abs/1803.05407
    """

    @check_options
    def __init__(
        self,
        weights: Weights,
        *,
        shadow_dtype: Any = None,
        rounding: Rounding | None = None,
        seed: int = 0,
        update_every: int = 1,
        start_after: int = 0,
        frozen: Policy = "skip",
        buffers: Policy = "copy",
        policy: Mapping[str, Policy] | None = None,
        on_nonfinite: OnNonFinite = "propagate",
        capturable: bool = False,
    ) -> None:
        options = select_shared_options(locals())
        super().__init__(weights, CumulativeMean(), **options)
