"""ema_pytorch's averages, where an update counts as one step regardless of ``update_every``."""

from __future__ import annotations

from fastema.compat import ema_pytorch

__all__ = ["EMA", "EMAPytree", "EMATensor", "KarrasEMA", "PostHocEMA"]


class EMAPytree(ema_pytorch.EMAPytree):
    """See :class:`fastema.compat.ema_pytorch.EMAPytree`; ``decay`` is per update, not per step."""

    _uses_peer_horizon = True


EMATensor = EMAPytree


class EMA(ema_pytorch.EMA):
    """See :class:`fastema.compat.ema_pytorch.EMA`; ``decay`` is per update, not per step."""

    _uses_peer_horizon = True
    _tree_class = EMAPytree


class KarrasEMA(ema_pytorch.KarrasEMA):
    """See :class:`fastema.compat.ema_pytorch.KarrasEMA`; an update counts as one step."""

    _uses_peer_horizon = True


class PostHocEMA(ema_pytorch.PostHocEMA):
    """See :class:`fastema.compat.ema_pytorch.PostHocEMA`; an update counts as one step.

    As in ema_pytorch, synthesis assumes that the averages have the requested widths.
    """

    _average_class = KarrasEMA
