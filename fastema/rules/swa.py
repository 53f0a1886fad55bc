"""The cumulative mean: stochastic weight averaging."""

from __future__ import annotations

from dataclasses import dataclass

from fastema.rules.rule import Rule

__all__ = ["CumulativeMean", "cumulative_mean"]


@dataclass(frozen=True, slots=True)
class CumulativeMean(Rule):
    """See :func:`cumulative_mean`."""

    def decay(self, n: int) -> float:
        """``1 - 1/n``."""
        return 1.0 - 1.0 / n

    def weight(self, n: int, every: int = 1) -> float:
        """``every / n``: one over the number of updates."""
        return min(every / n, 1.0)


def cumulative_mean() -> CumulativeMean:
    """The mean of all weights since the average began, each counted once.

    ``avg_n = avg_(n-1) + (x_n - avg_(n-1)) / n``, in closed form ``sum_k x_k / n``. The first
    update copies the weights. Where only every k-th step updates, it is the mean of those it saw;
    weights that are taken in for several steps at once count as many times.

    Examples
    --------
    >>> [cumulative_mean().weight(n) for n in (1, 2, 4)]
    [1.0, 0.5, 0.25]
    >>> cumulative_mean().weight(20, every=10)  # the second update
    0.5

    References
    ----------
    P. Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018,
    https://arxiv.org/abs/1803.05407
    """
    return CumulativeMean()
