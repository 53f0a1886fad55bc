"""The mean of the last W weights, streamed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from fastema.errors import ArgumentError
from fastema.layout.device_context import LaunchArgs
from fastema.rules import Window
from fastema.shadow.average import Average, Weights
from fastema.shadow.options import OnNonFinite, Policy, Rounding, WatchMode, options_in

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
        See :class:`fastema.EMA`.
    window : int
        Updates, at least 1. With ``update_every=k`` it reaches back ``k * window`` steps.
    ring_dtype : dtype or str, optional
        Of the ring, by default that of the weights. A narrower one, such as ``"bfloat16"``, takes
        less memory; the mean is then that of the weights as they are stored there.
    ring_device : {"cpu"}, optional
        Keep the ring in the memory of the host, for weights on a GPU that has no room for so many
        copies of them. The kernel reads and writes one slot of it per update, over the bus. (Torch
        takes a power of two of such memory: 70 GB become 128.)
    shadow_dtype, rounding, seed, update_every, start_after
        See :class:`fastema.EMA`.
    frozen, buffers, policy, on_nonfinite, capturable, watch
        See :class:`fastema.EMA`.

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
        watch: WatchMode = "all",
    ) -> None:
        options = options_in(locals())
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
