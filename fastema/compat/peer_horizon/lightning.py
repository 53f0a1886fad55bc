"""Lightning's averaging callbacks, with Lightning's decay per update and choice of steps."""

from __future__ import annotations

from fastema.compat import lightning

__all__ = ["EMAWeightAveraging", "WeightAveraging"]


class WeightAveraging(lightning.WeightAveraging):
    """See :class:`fastema.compat.lightning.WeightAveraging`.

    As in Lightning, ``should_update`` is called only for the last step of a batch.
    """

    _uses_peer_horizon = True


class EMAWeightAveraging(lightning.EMAWeightAveraging, WeightAveraging):
    """See :class:`fastema.compat.lightning.EMAWeightAveraging`, with ``peer_exact=True``."""
