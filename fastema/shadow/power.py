"""Power-function averages, from which any other is synthesised after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastema.rules import power
from fastema.shadow.average import Average, Weights
from fastema.shadow.options import OnNonFinite, Policy, Rounding, WatchMode, options_in

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
        See :class:`fastema.EMA`.
    sigma_rels : float or sequence of float
        Of each average, in (0, 0.288); two are needed to synthesise others. They are updated in one
        pass over the weights.
    shadow_dtype, rounding, seed, update_every, start_after
        See :class:`fastema.EMA`.
    frozen, buffers, policy, on_nonfinite, drift, capturable, watch
        See :class:`fastema.EMA`.

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
        drift: bool = False,
        capturable: bool = False,
        watch: WatchMode = "all",
    ) -> None:
        options = options_in(locals())
        several = sigma_rels if isinstance(sigma_rels, Sequence) else (sigma_rels,)
        super().__init__(weights, [power(sigma) for sigma in several], **options)
