"""The exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from fastema.errors import ArgumentError
from fastema.rules import Constant, Rule, Window, debiased
from fastema.shadow.average import Average, Weights
from fastema.shadow.options import OnNonFinite, Policy, Rounding, WatchMode, options_in

__all__ = ["EMA"]


class EMA(Average[Weights]):
    """Exponential moving average of weights, kept in flat buffers and updated in one call.

    At the n-th update ``avg += w(n) * (x - avg)`` with ``w(n) = 1 - decay(n)``.

    Parameters
    ----------
    weights : torch module, Keras model, JAX pytree, array, or list, tuple, dict of arrays
        What is averaged. A module's structure is watched: a parameter that was re-pointed
        (``p.data = ...``, ``.to()``, ``load_state_dict(assign=True)``) is found again; one that was
        added, removed, renamed, reshaped or untied is an error. Tied weights are averaged once. A
        list of torch modules is one model, such as the stages of a pipeline. With DTensors (FSDP2,
        tensor parallel) each rank averages its part; all ranks of the mesh must build the average.
    decay : float or rule, or a sequence of them
        Weight of the old average, in [0, 1), or a schedule of :mod:`fastema.rules`. Several are
        averages of their own that are updated in one pass over the weights; ``shadows`` holds them,
        and ``which=`` names one of them in a call.
    zero_debias : bool
        Begin with nothing and correct the bias, as Adam does: the weights of the start have no
        share in the average, which is that of the weights seen so far.
    shadow_dtype : dtype or str, optional
        Dtype of the average, such as ``torch.float32`` or ``"float32"``; by default that of the
        weights. ``"bf16+16"`` is a float32 in two halves: ``shadow`` holds the nearest bfloat16,
        ready to be used or saved, and another buffer the 16 bits that complete it.
    rounding : {"stochastic", "nearest"}, optional
        Rounding of 16-bit averages, stochastic by default. Rounded to nearest, an average stops
        moving once ``w * |x - avg|`` is below half of its last place. Random bits are a function of
        ``seed``, the step, the tensor's name and the element's index in the tensor, so that a run
        has the same bits however it is resumed or sharded. Other averages round to nearest even.
    seed : int
        Seed for stochastic rounding, >= 0.
    update_every : int
        Work at every k-th call only, as the rule says for steps of length k: the same horizon.
    start_after : int
        For this many calls the average is the weights themselves.
    frozen : {"skip", "copy", "average"}
        What to do with parameters that need no gradient. Skipped ones take no memory and no time
        and are no part of the average; unfreezing one later is then an error.
    buffers : {"copy", "average", "skip"}
        What to do with buffers, such as BatchNorm statistics: ``copy`` keeps those of the latest
        update, ``average`` averages floats. Integers and booleans are always copied exactly.
        Buffers registered with ``persistent=False`` are always skipped.
    policy : mapping of str to {"average", "copy", "skip"}, optional
        What to do with names that match a pattern (:mod:`fnmatch`), such as ``{"*.expert_bias":
        "average", "visual.*": "skip"}``, instead of ``frozen`` and ``buffers``. The first match
        wins. Tensors that match a ``"skip"`` may come and go later, as adapters do.
    on_nonfinite : {"propagate", "skip", "raise"}
        What to do with a NaN or an infinity in the weights or in copied floats: average it, leave
        out the whole call and count it in ``num_skipped``, or raise. The last two read the tensors
        once more first. Ranks that share DTensors decide together, by an all-reduce of one number.
        With ``capturable=True`` the GPU leaves updates out, and nothing waits; it cannot raise.
    drift : bool
        Measure in the same pass how far the weights are from the average, see :attr:`drift`. Not
        for DTensors.
    capturable : bool
        Count the updates on the GPU, so that :meth:`update` can be captured in a CUDA graph whose
        replays follow the schedule, warm-ups and random bits included. Costs one small kernel per
        update; reading :attr:`num_updates` or :attr:`num_skipped` waits for the GPU. Call
        :meth:`update` once on the capturing stream first, or build the average there.
    watch : {"all", "sample"}
        Which tensors :meth:`update` checks for having moved: all of them, about 40 nanoseconds each
        for torch, or a sixteenth of them in turn. What moves every tensor is then still noticed at
        once, a single ``p.data = ...`` up to 15 updates late; until then the average follows the
        memory that the tensor had, which is kept. Not for storage that is freed and filled again
        (FSDP).
    offload : bool or "skip"
        Keep the average in memory of the host and update it there on a thread, beside the training
        step; for PyTorch models. Where the thread falls behind, :meth:`update` waits for it; with
        ``"skip"`` updates are left out then, and the next one counts for their steps too (ranks
        decide together, by an all-reduce of one number). See ``docs/offload.md``.

    Attributes
    ----------
    shadow : Mapping of str to array
        The averaged tensors.
    num_updates : int
        Calls of :meth:`update` so far.

    Raises
    ------
    ArgumentError
        For a parameter without a valid value, and a pattern that matches no name.
    LayoutError
        If there is nothing to average, or a tensor is expanded, read-only or partly shares memory
        with another; if ranks do not agree.
    DTypeError, BridgeError
        For tensors that no kernel can average: integers as weights, sparse, on the meta device.

    Notes
    -----
    Bytes moved per element and update: the weights once, each average twice (12 for float32, 10 for
    bfloat16 weights with a float32 average, ``4 + 8 * K`` for K averages in float32).

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
    """The class of averages in memory of the host."""

    def __init__(
        self,
        weights: Weights,
        decay: float | Rule | Sequence[float | Rule] = 0.999,
        *,
        zero_debias: bool = False,
        shadow_dtype: Any = None,
        rounding: Rounding | None = None,
        seed: int = 0,
        update_every: int = 1,
        start_after: int = 0,
        frozen: Policy = "skip",
        buffers: Policy = "copy",
        policy: Mapping[str, Policy] | None = None,
        on_nonfinite: OnNonFinite = "propagate",
        drift: bool = False,
        capturable: bool = False,
        watch: WatchMode = "all",
        offload: bool | Literal["skip"] = False,
    ) -> None:
        options = options_in(locals())
        if offload is not False:
            self._become_offloaded(weights, decay, zero_debias, offload, options)
            return
        several = decay if isinstance(decay, Sequence) and not isinstance(decay, str) else (decay,)
        rules = [one if isinstance(one, Rule) else Constant(one) for one in several]
        if any(isinstance(rule, Window) for rule in rules):
            raise ArgumentError("a windowed mean needs a ring: build fastema.SMA(weights, window)")
        if zero_debias:
            rules = [debiased(rule) for rule in rules]
        super().__init__(weights, rules, **options)

    def _become_offloaded(
        self, weights: Any, decay: Any, zero_debias: bool, offload: Any, options: Any
    ) -> None:
        # With __new__ a class would show its parameters, and type checkers its result.
        if type(self) is not EMA:
            raise ArgumentError(f"offload=True is for fastema.EMA, not for {type(self).__name__}")
        if offload is not True and offload != "skip":
            raise ArgumentError(f"offload={offload!r}: expected True, False or 'skip'")
        self.__class__ = self._on_host
        options["when_behind"] = "wait" if offload is True else "skip"
        self._on_host.__init__(self, weights, decay, zero_debias=zero_debias, **options)
