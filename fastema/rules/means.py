"""Plain means of all weights (stochastic weight averaging) and of the last W weights."""

from __future__ import annotations

from dataclasses import dataclass

from fastema.rules.checks import validate_int
from fastema.rules.rule import Rule

__all__ = ["CumulativeMean", "Window", "cumulative_mean", "window"]


@dataclass(frozen=True, slots=True)
class CumulativeMean(Rule):
    """Mean of all weights; see :func:`cumulative_mean`."""

    def decay(self, n: int) -> float:
        """Return ``1 - 1/n``."""
        return 1.0 - 1.0 / n

    def weight(self, n: int, every: int = 1) -> float:
        """Return ``every / n``: one over the number of updates, at most 1."""
        return min(every / n, 1.0)


@dataclass(frozen=True, slots=True)
class Window(Rule):
    """Mean of the weights of the last ``size`` updates; see :func:`window`."""

    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", validate_int(self.size, "window", 1))

    def decay(self, n: int) -> float:
        """Return ``1 - 1/min(n, size)``: the total weight of the older values."""
        return 1.0 - 1.0 / min(n, self.size)

    def weight(self, n: int, every: int = 1) -> float:
        """Return ``1 / min(n / every, size)``: one over the number of values in the window."""
        return 1.0 / self.filled(n, every)

    def filled(self, n: int, every: int = 1) -> int:
        """Return the number of values in the window after the update at ``n``: 1 to ``size``."""
        return min(max(n // every, 1), self.size)

    def slot(self, n: int, every: int = 1) -> int:
        """Return the ring slot, from 0, that the update at ``n`` overwrites: the oldest one."""
        return (max(n // every, 1) - 1) % self.size


def cumulative_mean() -> CumulativeMean:
    """Return the rule for the mean of all weights since the average began.

    ``avg_n = avg_(n-1) + (x_n - avg_(n-1)) / n``, in closed form ``sum_k x_k / n``. The first
    update copies the weights. With ``update_every=k`` it is the mean of the weights at every k-th
    step; weights that are averaged in for several updates at once count that many times.

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


def window(size: int = 10) -> Window:
    """Return the rule for the mean of the weights of the last ``size`` updates.

    ``avg_n = avg_(n-1) + (x_n - x_(n-size)) / size`` with a ring of the last ``size`` weights, and
    the cumulative mean while the ring fills. The rule's ``weight`` is the weight of each value in
    the window. A decay alone cannot express the mean, since the oldest value leaves the window.

    Parameters
    ----------
    size : int
        Updates in the window, at least 1; 10 by default.

    Raises
    ------
    ArgumentError
        If ``size`` is not a whole number of at least 1.

    Examples
    --------
    >>> rule = window(3)
    >>> [rule.filled(n) for n in (1, 2, 3, 4, 5)], [rule.slot(n) for n in (1, 2, 3, 4, 5)]
    ([1, 2, 3, 3, 3], [0, 1, 2, 0, 1])

    References
    ----------
    J. Kaddour, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
    Averaging, 2022, https://arxiv.org/abs/2209.14981
    """
    return Window(size)
