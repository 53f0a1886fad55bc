"""Plain means: of all weights (stochastic weight averaging), and of the last W of them."""

from __future__ import annotations

from dataclasses import dataclass

from fastema.rules.checks import checked_whole
from fastema.rules.rule import Rule

__all__ = ["CumulativeMean", "Window", "cumulative_mean", "window"]


@dataclass(frozen=True, slots=True)
class CumulativeMean(Rule):
    """See :func:`cumulative_mean`."""

    def decay(self, n: int) -> float:
        """``1 - 1/n``."""
        return 1.0 - 1.0 / n

    def weight(self, n: int, every: int = 1) -> float:
        """``every / n``: one over the number of updates."""
        return min(every / n, 1.0)


@dataclass(frozen=True, slots=True)
class Window(Rule):
    """See :func:`window`."""

    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", checked_whole(self.size, "window", 1))

    def decay(self, n: int) -> float:
        """``1 - 1/min(n, size)``: the share that the mean keeps of its last value."""
        return 1.0 - 1.0 / min(n, self.size)

    def weight(self, n: int, every: int = 1) -> float:
        """``1 / min(n / every, size)``: one over the number of values in the window."""
        return 1.0 / self.filled(n, every)

    def filled(self, n: int, every: int = 1) -> int:
        """Number of values in the window after the update at a step, from 1 to ``size``."""
        return min(max(n // every, 1), self.size)

    def slot(self, n: int, every: int = 1) -> int:
        """Slot of the ring, from 0, that the update at a step overwrites: the oldest value's."""
        return (max(n // every, 1) - 1) % self.size


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


def window(size: int = 10) -> Window:
    """The mean of the weights of the last ``size`` updates, all that there are until then.

    ``avg_n = avg_(n-1) + (x_n - x_(n-size)) / size`` with a ring of the last ``size`` weights, and
    the cumulative mean while the ring fills. The rule's ``weight`` is that of each value in the
    window; the value that leaves it has to be taken out of the ring, which a decay cannot say.

    Parameters
    ----------
    size : int
        Updates, at least 1.

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
