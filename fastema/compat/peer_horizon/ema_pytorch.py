"""ema_pytorch's averages, in which an update counts for one step whatever ``update_every``."""

from __future__ import annotations

from fastema.compat import ema_pytorch

__all__ = ["EMA", "EMAPytree", "EMATensor", "KarrasEMA", "PostHocEMA"]


class EMAPytree(ema_pytorch.EMAPytree):
    """See :class:`fastema.compat.ema_pytorch.EMAPytree`; ``decay`` is that of an update."""

    _as_peer = True


EMATensor = EMAPytree


class EMA(ema_pytorch.EMA):
    """See :class:`fastema.compat.ema_pytorch.EMA`; ``decay`` is that of an update."""

    _as_peer = True
    _of_tensors = EMAPytree


class KarrasEMA(ema_pytorch.KarrasEMA):
    """See :class:`fastema.compat.ema_pytorch.KarrasEMA`; an update counts for one step."""

    _as_peer = True


class PostHocEMA(ema_pytorch.PostHocEMA):
    """See :class:`fastema.compat.ema_pytorch.PostHocEMA`; an update counts for one step.

    A synthesis takes the averages for what they were asked to be, as ema_pytorch does.
    """

    _average_class = KarrasEMA
