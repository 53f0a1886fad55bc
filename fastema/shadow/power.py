"""Power-function averages, from which any other is synthesised after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastema.rules import power
from fastema.shadow.average import Average, Weights
from fastema.shadow.options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PowerEMA"]


class PowerEMA(Average[Weights]):
    """Averages whose profile is a power of time, so that their length grows with training.

    At step ``n`` of a run, ``avg += w * (x - avg)`` with ``w = 1 - (1 - k/n)**(gamma + 1)`` where
    ``k`` is the number of steps since the update before: the weight of the weights of step ``t`` is
    proportional to ``t**gamma``. ``gamma`` follows from the relative standard deviation of that
    profile, ``sigma_rel = sqrt((gamma + 1) / ((gamma + 2)**2 * (gamma + 3)))``.

    Parameters
    ----------
    weights : torch module, array, or list, tuple, dict or iterator of arrays
        See :class:`Average`.
    sigma_rels : float or sequence of float
        Of each average, in (0, 0.288); two are needed to synthesise others. They are updated in one
        pass over the weights.
    **options
        See :class:`Average`.

    See Also
    --------
    fastema.posthoc.save_snapshot, fastema.posthoc.synthesize

    References
    ----------
    T. Karras et al., Analyzing and improving the training dynamics of diffusion models, 2023,
    https://arxiv.org/abs/2312.02696, section 3
    """

    def __init__(
        self,
        weights: Weights,
        sigma_rels: float | Sequence[float] = (0.05, 0.10),
        **options: Unpack[Options],
    ) -> None:
        several = sigma_rels if isinstance(sigma_rels, Sequence) else (sigma_rels,)
        super().__init__(weights, [power(sigma) for sigma in several], **options)
