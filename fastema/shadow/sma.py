"""The mean of the last W weights, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastema.errors import ArgumentError
from fastema.layout.device_context import LaunchArgs
from fastema.rules import Window
from fastema.shadow.average import Average, Weights
from fastema.shadow.options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SMA"]


class SMA(Average[Weights]):
    """Mean of the weights of the last ``window`` updates, at a cost that does not depend on it.

    ``avg += (x - oldest) / W`` over flat buffers, the oldest slot of a ring of W copies of the
    weights being overwritten by the newest; until there are W it is the mean of those there are.
    The mean is kept as a sum of two floats, and every update computes one W-th of its elements
    afresh from the whole ring: no error is older than ``2 * W`` updates, and it is below
    ``8 * W * u**2`` of the largest weight among those (``u = 2**-24`` in float32), which is far
    below the last place of the mean.

    Parameters
    ----------
    weights : torch module, array, or list, tuple, dict or iterator of arrays
        See :class:`Average`.
    window : int
        Updates, at least 1. With ``update_every=k`` it reaches back ``k * window`` steps.
    ring_dtype : dtype or str, optional
        Of the ring, by default that of the weights. A narrower one, such as ``"bfloat16"``, takes
        less memory; the mean is then that of the weights as they are stored there.
    ring_device : {"cpu"}, optional
        Keep the ring in the memory of the host, for weights on a GPU that has no room for so many
        copies of them. The kernel reads and writes one slot of it per update, over the bus. (Torch
        takes a power of two of such memory: 70 GB become 128.)
    **options
        See :class:`Average`, without ``drift``.

    Notes
    -----
    Memory: ``window + 2`` times that of the weights. Bytes moved per element and update, in
    float32: 4 of the weights, 8 of the slot, 16 of the mean, 4 of what is computed afresh.

    A NaN or an infinity stays in the mean while it is in the window, and for at most ``window``
    updates more; ``on_nonfinite="skip"`` keeps it out.

    Examples
    --------
    >>> import numpy as np, fastema
    >>> w = np.array([0.0])
    >>> sma = fastema.SMA([w], window=2)
    >>> for value in (1.0, 2.0, 5.0):
    ...     w[:] = value
    ...     sma.update()
    >>> sma.shadow["0"]
    array([3.5])

    References
    ----------
    J. Kaddour, Stop wasting my time! Saving days of ImageNet and BERT training with latest weight
    averaging, 2022, https://arxiv.org/abs/2209.14981
    """

    _operation: ClassVar[str] = "window"

    def __init__(
        self,
        weights: Weights,
        window: int = 10,
        *,
        ring_dtype: Any = None,
        ring_device: Literal["cpu"] | None = None,
        **options: Unpack[Options],
    ) -> None:
        if options.get("drift"):
            raise ArgumentError("drift=True: a windowed mean measures no drift")
        if ring_device not in (None, "cpu"):
            raise ArgumentError(
                f"ring_device={ring_device!r}: expected 'cpu', or None for that of the weights"
            )
        rule = Window(window)
        ring = window, ring_dtype, ring_device == "cpu"
        super().__init__(weights, rule, ring=ring, **options)

    def _launch_args(self, step: int, weights: tuple[float, ...]) -> LaunchArgs:
        schedule = self._schedule
        (rule,) = schedule.rules
        assert isinstance(rule, Window)
        n, every = step - schedule.start_after, schedule.update_every
        if not n:
            return LaunchArgs()
        filled = float(rule.filled(n, every))
        return LaunchArgs((filled,), self._seed, step, rule.size, rule.slot(n, every), n // every)
