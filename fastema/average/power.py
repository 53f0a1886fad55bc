"""Power-function averages, from which averages of any width are synthesized after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastema.average.average import Average, Weights
from fastema.average.options import AverageOptions, expand_options
from fastema.rules import power

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PowerEMA"]


@expand_options
class PowerEMA(Average[Weights]):
    """Power-function averages of model weights, whose width grows in proportion to training.

    At step ``n`` of a run ``avg += w * (x - avg)`` with ``w = 1 - (1 - k/n)**(gamma + 1)``, where
    ``k`` is the number of steps since the previous update (``update_every``). The weights of step
    ``t`` then contribute in proportion to ``t**gamma``. The relative standard deviation of this
    profile is ``sigma_rel = sqrt((gamma + 1) / ((gamma + 2)**2 * (gamma + 3)))``. From snapshots of
    two such averages, :func:`fastema.posthoc.synthesize` builds an average of another width after
    training.

    Parameters
    ----------
    weights : torch module, array, or list, tuple, dict or iterator of arrays
        The tensors to average; see :class:`fastema.EMA`.
    sigma_rels : float or sequence of float
        Width of each average: standard deviation of its profile divided by the steps so far, in
        (0, 0.2887], (0.05, 0.10) by default. Synthesis needs two. One pass over the weights updates
        all of them.
    into, overwrite
        See :class:`fastema.EMA`. ``into`` holds one average, and the first update copies
        the weights: it needs one width and ``overwrite=True``.
    **options : AverageOptions
        Options that all averages share; see :class:`fastema.average.AverageOptions`.

    Raises
    ------
    ArgumentError
        If a width or another parameter is invalid, or a pattern matches no name.
    LayoutError, DTypeError, BridgeError
        See :class:`fastema.EMA`.

    See Also
    --------
    fastema.posthoc.save_snapshot, fastema.posthoc.synthesize

    Examples
    --------
    >>> import numpy as np, fastema
    >>> w = np.array([1.0])
    >>> ema = fastema.PowerEMA([w], sigma_rels=(0.05, 0.10))
    >>> for value in (2.0, 3.0):
    ...     w[:] = value
    ...     ema.update()
    >>> [bool(2.9 < shadow["0"][0] < 3.0) for shadow in ema.shadows]
    [True, True]

    References
    ----------
    T. Karras et al., Analyzing and improving the training dynamics of diffusion models, 2023,
    https://arxiv.org/abs/2312.02696, section 3
    """

    def __init__(
        self,
        weights: Weights,
        sigma_rels: float | Sequence[float] = (0.05, 0.10),
        *,
        into: Any = None,
        overwrite: bool = False,
        **options: Unpack[AverageOptions],
    ) -> None:
        several = sigma_rels if isinstance(sigma_rels, Sequence) else (sigma_rels,)
        rules = [power(sigma) for sigma in several]
        super().__init__(weights, rules, into=into, overwrite=overwrite, **options)
