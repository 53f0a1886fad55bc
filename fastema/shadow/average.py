"""What every average of weights does: update, apply for evaluation, take back, save and load."""

from __future__ import annotations

import math

from fastema.engine.program import Program
from fastema.errors import StateError
from fastema.shadow.reports import report
from fastema.shadow.saving import Saveable
from fastema.shadow.updating import Weights
from fastema.shadow.views import Drift

__all__ = ["Average", "Weights"]


class Average(Saveable[Weights]):
    """Averages of weights in flat buffers, updated in one call: what all kinds have in common.

    At the n-th update ``avg += w(n) * (x - avg)``, computed in float32 (float64 where either side
    is). An average begins as a copy of the weights, so build it when the weights are as training
    starts from them.

    Parameters
    ----------
    weights : torch module, Keras model, JAX pytree, array, or list, tuple, dict of arrays
        What is averaged. A module's own structure is watched: a parameter that was re-pointed
        (``p.data = ...``, ``.to()``, ``load_state_dict(assign=True)``) is found again, one that was
        added, removed, renamed, reshaped or untied is an error. Tied weights are averaged once. A
        list of torch modules is one model, such as the stages of a pipeline. Of DTensors (FSDP2,
        tensor parallel) each rank averages its part; all ranks of their mesh have to build the
        average, which compares what they have, as :meth:`state_dict` does.
    rules : rule or sequence of rules
        Of :mod:`fastema.rules`; several are followed in one pass over the weights.
    shadow_dtype : dtype or str, optional
        Of the averaged tensors, such as ``torch.float32`` or ``"float32"``; by default that of the
        weights. ``"bf16+16"`` is a float32 in two halves: ``shadow`` holds the nearest bfloat16,
        ready to be used or saved as it is, another buffer the 16 bits that complete it; a swap with
        bfloat16 weights touches the first alone.
    rounding : {"stochastic", "nearest"}, optional
        Of 16-bit averages, stochastic by default: to nearest, an average stops moving once
        ``w * |x - avg|`` is below half its last place. The random bits are a function of ``seed``,
        the step, the tensor's name and the element's index in it (not its place in memory), so that
        a run gives the same bits however it is resumed or divided. Averages of other dtypes round
        to nearest even.
    seed : int
        Of the random bits, at least 0.
    update_every : int
        Work only at every k-th call, as the rule says for steps of length k: the same horizon.
    start_after : int
        Until this many calls the average is the weights themselves.
    frozen : {"skip", "copy", "average"}
        What is done with parameters that need no gradient. Skipped ones take no memory and no time,
        and are not part of the average; one that is unfrozen later is then an error.
    buffers : {"copy", "average", "skip"}
        What is done with buffers, such as BatchNorm statistics: ``copy`` keeps those of the latest
        update that did work, ``average`` averages floats. Integers and booleans are always copied
        exactly, and floats of 8 bits copied or refused. Buffers registered with
        ``persistent=False`` are skipped in any case, as in the model's ``state_dict()``: they may
        change their shape, come and go.
    policy : mapping of str to {"average", "copy", "skip"}, optional
        What is done with names that match a pattern, such as ``{"*.expert_bias": "average",
        "visual.*": "skip"}``, in the place of what ``frozen`` and ``buffers`` say. The first match
        wins; see :mod:`fnmatch` for patterns.
    on_nonfinite : {"propagate", "skip", "raise"}
        What is done with a NaN or an infinity in the weights, or in floats that are copied, such as
        BatchNorm statistics: take it in, leave out the whole call and count it in ``num_skipped``,
        or raise. The last two read the tensors once more first, but for copies that hold such a
        number already, such as a mask of infinities. Of DTensors all ranks decide together, by an
        all-reduce of one number.
    drift : bool
        Measure in the same pass how far the weights are from the average, see :attr:`drift`. Not
        for DTensors.
    capturable : bool
        Count the updates on the GPU, where the weights have to be: :meth:`update` can then be
        captured in a CUDA graph, whose replays follow the schedule, warm-ups and random bits
        included. Costs one small kernel more per update; reading :attr:`num_updates` waits for the
        GPU. Call :meth:`update` once on the capturing stream before, or build the average there.
    watch : {"all", "sample"}
        At which tensors :meth:`update` looks for those that moved: at all of them, about 40
        nanoseconds each for torch, or at a sixteenth of them in turn. What moves every tensor
        (``.to()``, ``load_state_dict(assign=True)``) is then noticed at once all the same, a single
        ``p.data = ...`` up to 15 updates late; until then the average follows the memory that the
        tensor had, which is kept. Do not use it where storage is freed and filled again (FSDP).
    ring : (int, dtype, bool), optional
        Slots and dtype of the ring that a windowed mean needs, and whether it is on the host.

    Raises
    ------
    ArgumentError
        For a parameter without a valid value, and a pattern that matches no name.
    LayoutError
        If there is nothing to average, or a tensor is expanded, read-only or partly shares memory
        with another; if ranks do not agree.
    DTypeError, BridgeError
        For tensors that no kernel can average: integers as weights, sparse, on the meta device.

    Examples
    --------
    >>> import numpy as np, fastema
    >>> w = np.array([1.0, 2.0])
    >>> mean = Average([w], fastema.rules.cumulative_mean())
    >>> for _ in range(3):
    ...     w += 1
    ...     mean.update()
    >>> mean.shadow["0"]
    array([3., 4.])

    Notes
    -----
    Two objects that average one model are independent of each other, but only one can be applied at
    a time: the second would average, or keep, the first one's average.

    A call on other threads while one runs waits; weights must not be re-pointed by another thread
    during a call. Denormal values cost up to a hundred times as much as normal ones, in any
    package.
    """

    @property
    def averaged_names(self) -> set[str]:
        """Names of the tensors that are averaged; the others are copied."""
        return {name for name, entry in self._store.sets[0].items() if entry.averaged}

    @property
    def skipped_names(self) -> set[str]:
        """Names of the tensors that the average leaves out."""
        return set(self._names.skipped)

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied weights, to the name that their average has."""
        return dict(self._names.aliases)

    @property
    def drifts(self) -> tuple[Drift, ...]:
        """:attr:`drift` of every average."""
        program = self._measured
        if program is None:
            raise StateError("no drift was measured: build with drift=True, and update first")
        return tuple(self._drift(program, index) for index in range(len(self._store.sets)))

    @property
    def drift(self) -> Drift:
        """How the average stood to the weights after the latest update.

        Raises
        ------
        StateError
            If it was not built with ``drift=True``, or before the first update.
        """
        return self.drifts[self._average_index(None)]

    def _drift(self, program: Program, index: int) -> Drift:
        distance, size, still = program.measured(index)
        entries = self._store.sets[index].values()
        reals = sum(e.spec.size * e.spec.kind.parts for e in entries if e.averaged)
        relative = distance / size if size else math.inf if distance else 0.0
        return Drift(distance, relative, still / max(reals, 1))

    def report(self) -> str:
        """In words, what the average averages over at this point of the run."""
        return report(type(self).__name__, self._schedule, self.num_updates, self._num_skipped)

    def __repr__(self) -> str:
        averaged = [entry for entry in self._store.sets[0].values() if entry.averaged]
        elements = sum(entry.spec.size for entry in averaged)
        dtypes = "/".join(sorted({e.form.strip("~") or e.spec.dtype for e in averaged}))
        updates = self.num_updates
        decays = self._schedule.decays(max(updates, 1))
        decay = ", ".join(f"{one:g}" for one in decays)
        state = ", applied" if self.applied else ""
        return (
            f"{type(self).__name__}({elements:,} weights in {len(averaged)} tensors, {dtypes}, "
            f"decay {decay}, {updates:,} updates{state})"
        )
