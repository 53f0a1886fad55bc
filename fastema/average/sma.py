"""The moving mean of the weights of the last W updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fastema.average.average import Average, Weights
from fastema.average.options import AverageOptions, expand_options
from fastema.errors import ArgumentError
from fastema.rules import Window

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SMA"]


@expand_options
class SMA(Average[Weights]):
    """Simple moving average: the mean of the weights of the last ``window`` updates.

    ``avg += (x - oldest) / W`` with ``W = window``: a ring holds the last W copies of the weights,
    and the newest overwrites the oldest. Before the W-th update it is the mean of all updates so
    far. The cost of an update does not depend on W.

    Parameters
    ----------
    weights : torch module, array, or list, tuple, dict or iterator of arrays
        The tensors to average; see :class:`fastema.EMA`.
    window : int
        Number of updates in the mean, >= 1, 10 by default. With ``update_every=k`` it covers the
        last ``k * window`` steps.
    ring_dtype : dtype or str, optional
        Dtype of the ring, by default that of the weights. A narrower dtype, such as ``"bfloat16"``,
        saves memory; the result is then the mean of the rounded weights.
    ring_device : {"cpu"}, optional
        Keep the ring in host memory, if the GPU has no room for ``window`` copies of the weights.
        The kernel reads and writes one slot per update over the bus. By default the ring is on the
        weights' device. (Torch rounds such memory up to a power of two: 70 GB become 128.)
    **options : AverageOptions
        Options that all averages share; see :class:`fastema.average.AverageOptions`.

    Raises
    ------
    ArgumentError
        If ``window``, ``ring_device`` or another parameter is invalid, or a pattern matches no
        name.
    DTypeError
        For ``shadow_dtype="bf16+16"``, which a windowed mean cannot have.
    LayoutError, BridgeError
        See :class:`fastema.EMA`.

    Notes
    -----
    The mean is kept as a sum of two floats, and every update recomputes one W-th of its elements
    from the whole ring. No rounding error is older than ``2 * W`` updates, and the error is below
    ``8 * W * u**2`` of the largest weight in them (``u = 2**-24`` in float32), far below the last
    place of the mean.

    It takes ``window + 2`` times the memory of the weights. Bytes moved per element and update, in
    float32: 4 for the weights, 8 for the slot, 16 for the mean, 4 for the recomputed elements.

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

    def __init__(
        self,
        weights: Weights,
        window: int = 10,
        *,
        ring_dtype: Any = None,
        ring_device: Literal["cpu"] | None = None,
        **options: Unpack[AverageOptions],
    ) -> None:
        if ring_device is not None and not (isinstance(ring_device, str) and ring_device == "cpu"):
            raise ArgumentError(
                f"ring_device={ring_device!r}: expected 'cpu', or None for the weights' device"
            )
        super().__init__(
            weights,
            Window(window),
            ring_dtype=ring_dtype,
            ring_on_host=ring_device == "cpu",
            **options,
        )
