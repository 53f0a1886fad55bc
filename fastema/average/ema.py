"""The exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastema.average.average import Average, Weights
from fastema.average.options import AverageOptions, expand_options, parse_rules
from fastema.errors import ArgumentError
from fastema.rules import Rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EMA"]


@expand_options
class EMA(Average[Weights]):
    """Exponential moving average (EMA) of model weights, kept in flat buffers, updated in one call.

    At the n-th update ``avg += w(n) * (x - avg)`` with ``w(n) = 1 - decay(n)``, computed in float32
    (in float64 if the average or the weights are float64). The average begins as a copy of the
    weights: build it after loading them.

    Parameters
    ----------
    weights : torch module, Keras model, JAX pytree, array, or list, tuple, dict of arrays
        The tensors to average. A module's structure is watched: a re-pointed parameter (``p.data =
        ...``, ``.to()``, ``load_state_dict(assign=True)``) is found again; a parameter that was
        added, removed, renamed, reshaped or untied is an error. Tied weights are averaged once. A
        list of torch modules counts as one model, such as the stages of a pipeline. With DTensors
        (FSDP2, tensor parallel) each rank averages its shard; all ranks of the mesh must build the
        average.
    decay : float or rule, or a sequence of them
        Weight of the old average, in [0, 1), 0.999 by default, or a schedule of
        :mod:`fastema.rules`. A sequence builds one average per item; one pass over the weights
        updates all of them. ``shadows`` holds them, and methods take ``which=`` to select one.
    zero_debias : bool
        Start from zero and correct the bias, as Adam does: the initial weights then have no share
        in the average. By default they have one, which decays.
    offload : bool or "skip"
        Keep the average in host memory and update it there on a thread, beside the training step;
        for PyTorch models. If the thread falls behind, :meth:`update` waits for it; with ``"skip"``
        it skips updates instead, and the next one counts for their steps too (ranks decide
        together, by an all-reduce of one number). False by default. See ``docs/offload.md``.
    into : module, list or dict of tensors, optional
        Tensors of yours that hold the average, such as a target network or a teacher: a second
        module with the model's names and shapes, in any dtypes, on the same devices. Nothing is
        written at first: the average begins with what they hold, and :meth:`sync` copies the
        weights. Tensors that both share are left alone. If there are buffers, ``buffers=`` must be
        given. See ``docs/teachers.md``.
    overwrite : bool
        Whether an update may replace what ``into`` holds by the weights, as the first one does with
        ``zero_debias`` and up to ``start_after``. False by default.
    **options : AverageOptions
        Options that all averages share; see :class:`fastema.average.AverageOptions`.

    Attributes
    ----------
    shadow : Mapping of str to array
        The averaged and copied tensors by name.
    num_updates : int
        Number of steps counted by :meth:`update` so far, without skipped calls.

    Raises
    ------
    ArgumentError
        If a parameter has an invalid value, or a pattern matches no name.
    LayoutError
        If there is nothing to average; if a tensor is expanded, read-only or partly overlaps
        another one; if ranks disagree.
    DTypeError, BridgeError
        For tensors that no kernel can average: integer weights, sparse or meta tensors.

    Notes
    -----
    An update reads the weights once and reads and writes each average: 12 bytes per element in
    float32, 10 for bfloat16 weights with a float32 average, ``4 + 8 * K`` for K float32 averages.

    Examples
    --------
    >>> import numpy as np, fastema
    >>> w = np.array([1.0, 2.0], np.float32)
    >>> ema = fastema.EMA([w], decay=0.5)
    >>> w += 1
    >>> ema.update()
    >>> with ema.swapped():
    ...     w.copy()
    array([1.5, 2.5], dtype=float32)
    >>> w
    array([2., 3.], dtype=float32)

    References
    ----------
    B. Polyak and A. Juditsky, Acceleration of stochastic approximation by averaging, 1992,
    https://doi.org/10.1137/0330046
    """

    _on_host: ClassVar[Any] = None
    """Class that ``offload=True`` builds; set by :mod:`fastema.average.offload`."""

    def __init__(
        self,
        weights: Weights,
        decay: float | Rule | Sequence[float | Rule] = 0.999,
        *,
        zero_debias: bool = False,
        offload: bool | Literal["skip"] = False,
        into: Any = None,
        overwrite: bool = False,
        **options: Unpack[AverageOptions],
    ) -> None:
        rules = parse_rules(decay, zero_debias)
        if offload is False:
            super().__init__(weights, rules, into=into, overwrite=overwrite, **options)
            return
        if into is not None:
            raise ArgumentError("into= holds the average in your tensors, and offload=True in ours")
        self._become_offloaded(weights, decay, zero_debias, offload, options)

    def _become_offloaded(
        self, weights: Any, decay: Any, zero_debias: bool, offload: Any, options: Any
    ) -> None:
        # Not by __new__: signatures and type checkers would then report that method's.
        if type(self) is not EMA:
            raise ArgumentError(f"offload=True is for fastema.EMA, not for {type(self).__name__}")
        if offload is not True and not (isinstance(offload, str) and offload == "skip"):
            raise ArgumentError(f"offload={offload!r}: expected True, False or 'skip'")
        self.__class__ = self._on_host
        options["when_behind"] = "wait" if offload is True else "skip"
        self._on_host.__init__(self, weights, decay, zero_debias=zero_debias, **options)
