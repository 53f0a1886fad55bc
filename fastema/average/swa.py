"""The mean of all weights since a step: stochastic weight averaging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastema.average.average import Average, Weights
from fastema.average.options import AverageOptions, expand_options
from fastema.rules import CumulativeMean

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SWA"]


@expand_options
class SWA(Average[Weights]):
    """Stochastic weight averaging (SWA): the plain mean of the weights of all updates.

    At the n-th update ``avg += (x - avg) / n``; the first update copies the weights. With
    ``start_after=s`` and ``update_every=k`` it is the mean of every k-th step after step ``s``.

    Parameters
    ----------
    weights : torch module, array, or list, tuple, dict or iterator of arrays
        The tensors to average; see :class:`fastema.EMA`.
    into, overwrite
        See :class:`fastema.EMA`. The first update copies the weights, so ``into`` needs
        ``overwrite=True``.
    **options : AverageOptions
        Options that all averages share; see :class:`fastema.average.AverageOptions`.

    Raises
    ------
    ArgumentError, LayoutError, DTypeError, BridgeError
        See :class:`fastema.EMA`.

    Notes
    -----
    ``shadow_dtype="float64"`` keeps long means exact enough for :func:`fastema.mean_between`.

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

    def __init__(
        self,
        weights: Weights,
        *,
        into: Any = None,
        overwrite: bool = False,
        **options: Unpack[AverageOptions],
    ) -> None:
        super().__init__(weights, CumulativeMean(), into=into, overwrite=overwrite, **options)
