"""An exponential moving average in host memory, updated on a thread beside the training step."""

from __future__ import annotations

import glob
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from functools import partial
from typing import Any, NamedTuple

from fastema.average.drift import DRIFT_OF_PARTS, Drift
from fastema.average.ema import EMA
from fastema.average.entries import select
from fastema.average.matching import (
    frozen_states,
    names_of_state,
    pair_with_model,
    refuse_other_holder,
    refuse_other_model,
)
from fastema.average.options import (
    OnNonFinite,
    Policy,
    WhenBehind,
    check_flag,
    parse_destination,
)
from fastema.average.views import Shadow
from fastema.binding.binding import Binding, Match
from fastema.binding.policies import Policies
from fastema.binding.sides import NO_LEAVES
from fastema.binding.swap import WriteWatch
from fastema.bridges.names import describe_named
from fastema.bridges.registry import (
    bridge_of,
    describe,
    leaves_of,
    link_of,
    list_iterators,
    reshard,
    state_of,
)
from fastema.engine.blocks import BlockSteps
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError, BridgeError, LayoutError, format_problems
from fastema.layout.spec import Leaves, TensorSpec
from fastema.rules import Rule
from fastema.rules.checks import MAX_STEPS, validate_int

__all__ = ["OffloadStats", "OffloadedEMA"]


class OffloadStats(NamedTuple):
    """Costs of an offloaded average so far.

    Attributes
    ----------
    queue_depth : int
        Updates that have not finished: 0 or 1.
    seconds_waited : float
        Time that training waited for copies of the weights and for updates.
    bytes_moved : int
        Bytes copied between the host and the model's devices, in both directions.
    steps_skipped : int
        Updates skipped because the previous one had not finished (``offload="skip"``).
    """

    queue_depth: int
    seconds_waited: float
    bytes_moved: int
    steps_skipped: int


_offloaded: weakref.WeakSet[Any] = weakref.WeakSet()
"""All offloaded averages. A fork waits for their updates: the child would see half of one."""


def _wait_before_fork() -> None:
    for one in list(_offloaded):
        job = one._job  # read once: another thread may be taking its result
        if job is not None:
            futures_wait([job])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_before_fork)


class OffloadedEMA(EMA[Any]):
    """Exponential moving average in host memory, built by ``fastema.EMA(model, offload=True)``.

    The weights are copied to a host buffer of their own size and averaged there on a thread, while
    training continues. Before its next step a PyTorch optimizer waits until the weights are copied;
    loops that write the weights in another way call :meth:`wait` first.

    :meth:`update` returns at once, unless the previous update has not finished: then it waits, or,
    with ``offload="skip"``, skips this update and lets the next one count for its steps too. If an
    update fails, the next call raises its error and does nothing else. See :class:`fastema.EMA` for
    the formula and the parameters.

    Examples
    --------
    >>> import torch, fastema
    >>> model = torch.nn.Linear(2, 1)
    >>> ema = fastema.EMA(model, decay=0.9, offload=True)
    >>> ema.update()
    >>> ema.offload_stats.steps_skipped
    0
    """

    def __init__(
        self,
        weights: Any,
        decay: float | Rule | Sequence[float | Rule] = 0.999,
        *,
        when_behind: WhenBehind = "wait",
        frozen: Policy = "skip",
        buffers: Policy = "copy",
        policy: Mapping[str, Policy] | None = None,
        on_nonfinite: OnNonFinite = "propagate",
        capturable: bool = False,
        **options: Any,
    ) -> None:
        if check_flag(capturable, "capturable"):
            raise ArgumentError("capturable=True counts on the GPU, and offload=True on the host")
        module = list_iterators(weights)
        reshard(module)
        leaves = leaves_of(module)
        chosen = select(leaves, Policies.of(frozen, buffers, policy))
        kept: dict[str, Policy] = {leaf.name: "average" for leaf in chosen.averaged}
        kept |= {leaf.name: "copy" for leaf in chosen.copied}
        if on_nonfinite != "propagate" and any(
            leaf.spec.division is not None for leaf in leaves.items if leaf.name in kept
        ):
            raise ArgumentError(
                f"on_nonfinite={on_nonfinite!r} needs a decision of all ranks that share DTensors, "
                "which the offload thread cannot ask for; leave it or offload=True out"
            )
        self._kept, self._module = list(kept), module
        tensors = self._owners(leaves)
        self._link = link_of(tensors)
        self._end_fences = self._link.call_before_steps(self, "wait")
        self._fetch: Any = None
        self._job: Future[int] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self._target: int | None = None  # number of updates after the running one
        self._seconds_waited, self._bytes_moved = 0.0, 0
        self._submitted_pending_steps = 0  # pending steps that the running update counts
        self._skip_when_behind, self._num_steps_skipped = when_behind == "skip", 0
        self._writes: WriteWatch | None = None  # while the model holds the average
        self._link.fetch(tensors).complete()
        exactly = {glob.escape(name): what for name, what in kept.items()}
        super().__init__(
            self._link.staging, decay, policy=exactly, on_nonfinite=on_nonfinite, **options
        )
        self._names = chosen.names  # of the model, not of the staged copies
        self._model = Binding(
            None, module, partial(self._match, False), leaves=leaves, transient=False
        )
        _offloaded.add(self)

    @property
    def _kind(self) -> str:
        return "EMA"  # both load each other's states

    # -- the model --------------------------------------------------------------------------------

    def _owners(self, leaves: Leaves) -> dict[str, Any]:
        """Return the model's averaged and copied tensors by name."""
        found = {leaf.name: leaf.spec.owner for leaf in leaves.items}
        return {name: found[name] for name in self._kept}

    def _match(self, match_subset: bool, _: Leaves, model: Leaves) -> Match:
        """Check that a model still fits. Pair nothing: no kernel reads the model."""
        names = self._names
        refuse_other_model(model, self._memory.sets[0], names, match_subset=match_subset)
        watched = model.select_names({*self._kept, *names.aliases})
        return Match({}, NO_LEAVES, watched, frozen_states(model, names))

    def _leaves(self, model: Any = None, *, write: bool = False, restore: bool = False) -> Leaves:
        """Return the model's tensors; look them up again only if one has moved."""
        match = partial(self._match, True) if restore else None
        with self._model.current(
            self._module if model is None else model, write=write, match=match
        ):
            return self._model.watched[1]

    def _tensors(self, model: Any = None) -> dict[str, Any]:
        leaves = self._leaves(model)
        found: dict[str, Any] = self._model.cached("tensors", lambda: self._owners(leaves))
        return found

    # -- the worker -------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until the latest update has copied the weights, so that they may be written.

        On a GPU the current stream waits and the host continues. PyTorch optimizers call this
        before each step; call it yourself before other writes to the weights.
        """
        if self._fetch is not None:
            began = time.perf_counter()
            if self._fetch.fence():
                self._seconds_waited += time.perf_counter() - began

    def _drain(self) -> None:
        """Wait for the running update; raise its error, if any."""
        job = self._job
        if job is None:
            return
        began = time.perf_counter()
        try:
            self._clock.pending += job.result()
        except BaseException:
            if job.done():  # the steps skipped before it still count
                self._clock.pending += self._submitted_pending_steps
            raise
        finally:
            self._seconds_waited += time.perf_counter() - began
            if job.done():  # not after an interrupt: the next call waits again
                self._job, self._fetch, self._submitted_pending_steps = None, None, 0

    def _drain_and_sync(self) -> None:
        """Wait for the running update. Before start_after, copy the current weights."""
        self._drain()
        if self._applied is None and self._clock.is_before_start:
            self._link.fetch(self._tensors()).complete()

    def _submit(self, steps: int) -> None:
        if self._pool is None or self._pid != os.getpid():  # a fork copies no threads
            self._pool, self._pid = ThreadPoolExecutor(1, "fastema-offload"), os.getpid()
        fetch = self._fetch

        def work() -> int:
            try:
                fetch.complete()
                # no lock: other calls hold it and wait for this job
                return self._update(None, steps)
            finally:
                self._target = None

        self._target = self._clock.done + steps
        try:
            self._job = self._pool.submit(work)
        except BaseException:  # the thread did not start
            self._target, self._fetch = None, None
            raise

    @property
    def offload_stats(self) -> OffloadStats:
        """Costs so far, an :class:`OffloadStats`: queue, waits, bytes moved, skipped steps."""
        depth = int(self._job is not None and not self._job.done())
        return OffloadStats(depth, self._seconds_waited, self._bytes_moved, self._num_steps_skipped)

    # -- training ---------------------------------------------------------------------------------

    def _advance(self, model: Any, steps: int) -> None:
        with self._lock:
            self._refuse_applied("update")
            clock = self._clock
            steps = validate_int(steps, "steps", 1, MAX_STEPS - self.num_updates - clock.pending)
            if self._skip_when_behind and self._is_behind():
                self._num_steps_skipped += steps
                clock.pending += steps
                return
            self._drain()
            tensors = self._tensors(model)
            with defer_signals():  # fetched weights must be averaged and counted
                self._fetch = self._link.fetch(tensors)
                self._submit(steps + clock.pending)
                self._bytes_moved += self._link.nbytes
                clock.pending, self._submitted_pending_steps = 0, clock.pending

    def _is_behind(self) -> bool:
        """Return whether the previous update is still running, here or on any other rank."""
        behind = self._job is not None and not self._job.done()
        ranks = self._deciding_ranks()
        return behind if ranks is None else ranks.any(behind)

    @property
    def num_updates(self) -> int:
        """Number of steps averaged so far, including those of the running update."""
        target = self._target
        return self._clock.done if target is None else target

    @property
    def version(self) -> int:
        """Number that grows with every write of the averages; waits for the latest update."""
        with self._lock:
            self._drain()
            return super().version

    @property
    def num_skipped(self) -> int:
        """Updates skipped because a weight was not finite; waits for the latest update."""
        with self._lock:
            self._drain()
            return super().num_skipped

    def update_from_host(self, tensors: Mapping[str, Any]) -> None:
        """Update the average from copies of the weights in host memory.

        Use it when a trainer already keeps such copies, to save or send them: nothing is copied
        from the device. The tensors may be overwritten after the call. For master weights of
        another dtype build the average of them: ``EMA(masters)``.

        Parameters
        ----------
        tensors : mapping of str to tensor
            The weights by the model's names, in the model's dtypes. Other names are ignored.

        Raises
        ------
        StateError
            While the average is applied, or while it follows optimizers.
        ArgumentError
            If ``tensors`` is not a mapping.
        BridgeError
            If an entry is not a tensor with plain memory: a sparse or meta tensor, a string.
        LayoutError
            If a tensor is missing, or differs from the model's in shape, dtype or division.
        """
        self._refuse_following("update_from_host")
        with self._lock:
            self._drain()
            self._refuse_applied("update_from_host")
            self._link.fetch(self._check_host_tensors(tensors)).complete()
            clock = self._clock
            clock.pending = self._update(None, 1 + clock.pending)

    def _check_host_tensors(self, tensors: Any) -> dict[str, Any]:
        """Return the tensors of :meth:`update_from_host` that are averaged or copied."""
        call = "update_from_host()"
        if not isinstance(tensors, Mapping):
            raise ArgumentError(
                f"{call}: expected a mapping of the model's names to tensors in host memory, got a "
                f"{type(tensors).__name__}"
            )
        missing = [f"{name!r} is missing" for name in self._kept if name not in tensors]
        if missing:
            raise LayoutError(
                f"{call} needs all averaged and copied tensors:\n{format_problems(missing)}\n"
                "Pass them by the names that ema.shadow has."
            )
        found = {name: tensors[name] for name in self._kept}
        for name, one in found.items():
            if not bridge_of(self._link.staging[name]).owns(one):
                raise BridgeError(
                    f"{call}: {name!r} is a {type(one).__name__}, expected a PyTorch tensor"
                )
            describe_named(f"{call}: {name}", describe, one)
        self._link.check(found, f"{call}: the tensors do not match the model")
        return found

    def sync(self) -> None:
        """Copy the weights into the average now; see :meth:`fastema.EMA.sync`."""
        with self._lock:
            self._drain()
            self._refuse_applied("sync")
            self._link.fetch(self._tensors()).complete()
            super().sync()

    # -- evaluation -------------------------------------------------------------------------------

    def apply_shadow(self, model: Any = None, *, which: int | None = None) -> None:
        """Put the average into the model, in place; see :meth:`fastema.EMA.apply_shadow`."""
        with self._lock:
            self._drain_and_sync()
            self._refuse_applied("apply_shadow")
            leaves = self._leaves(model, write=True)
            tensors, writes = self._owners(leaves), self._write_watch(leaves)
            self._link.fetch(tensors).complete()  # keeps the raw weights exactly
            with defer_signals():
                super().apply_shadow(which=which)
                try:
                    self._link.send(tensors)
                    writes.begin()
                except BaseException:
                    super()._restore(None)
                    self._link.send(tensors)
                    raise
                self._writes = writes
            self._bytes_moved += 2 * self._link.nbytes

    def _specs(self, leaves: Leaves) -> dict[str, TensorSpec]:
        found = {leaf.name: leaf.spec for leaf in leaves.items}
        return {name: found[name] for name in self._kept}

    def _write_watch(self, leaves: Leaves) -> WriteWatch:
        return WriteWatch(self._specs(leaves), self.averaged_names)

    def _restore(self, model: Any) -> tuple[list[str], list[str]]:
        if self._applied is None or self._writes is None:
            return super()._restore(None)
        writes = self._writes
        if model is not None:
            refuse_other_holder(list_iterators(model), self._model.container, writes.weights)
        reshard(self._model.container, interrupted=True)
        leaves = self._leaves(self._model.container, write=True, restore=True)
        tensors, specs = self._owners(leaves), self._specs(leaves)
        self._link.check(tensors)
        written = writes.written()
        with defer_signals():
            super()._restore(None)
            self._link.send(tensors)
            writes.now = specs
            writes.end()
            self._writes = None
        self._bytes_moved += self._link.nbytes
        return written, []

    def _swap_steps(self, model: Any, which: int | None) -> BlockSteps[Any]:
        steps: BlockSteps[Any] = super()._swap_steps(model, which)

        def apply() -> Any:
            steps.apply()
            return self._module if model is None else model

        return BlockSteps(apply, steps.restore, steps.verify)

    def copy_to(self, model: Any, *, which: int | None = None) -> None:
        """Overwrite a model's weights with the average; see :meth:`fastema.EMA.copy_to`."""
        with self._lock:
            self._drain_and_sync()
            container = list_iterators(model)
            reshard(container)
            pairs = pair_with_model(leaves_of(container), self._memory.sets[0], self._names)
            tensors = {pair.name: pair.src.owner for pair in pairs}
            link = link_of(tensors)
            super().copy_to(link.staging, which=which)
            link.send(tensors)

    def model_state_dict(self, model: Any = None, *, which: int | None = None) -> dict[str, Any]:
        """Return the model's state dict with the average, in new tensors on the model's devices.

        See :meth:`fastema.EMA.model_state_dict`.
        """
        container = self._module if model is None else list_iterators(model)
        reshard(container)
        found = state_of(container)
        names = names_of_state(found, self._memory.sets[0], self._names)
        theirs = {name: found[key].value for key, name in names.items() if name in self._kept}
        with self._lock:
            self._drain_and_sync()
            staged = self._link.staging
            if any(one.dtype != staged[name].dtype for name, one in theirs.items()):
                staged = {**staged, **link_of(theirs).staging}  # round once, to their dtypes
            held = super().model_state_dict(staged, which=which)
        return {
            found[key].key: (
                held[name].to(found[key].value.device) if name in held else found[key].value
            )
            for key, name in names.items()
        }

    @property
    def shadows(self) -> tuple[Shadow, ...]:
        """The mapping of names to tensors of every average, in host memory."""
        with self._lock:
            self._drain_and_sync()
            return super().shadows

    def _tensor(self, index: int, name: str) -> Any:
        with self._lock:
            self._drain()
            return super()._tensor(index, name)

    # -- saving -----------------------------------------------------------------------------------

    def to(self, *target: Any, device: Any = None, dtype: Any = None, **options: Any) -> Any:
        """Change the average's dtype; it stays on the host. See :meth:`fastema.EMA.to`."""
        there, _ = parse_destination(target, device, dtype)
        if there is not None and not str(there).startswith("cpu"):
            raise ArgumentError(f"to({there!r}): an average with offload=True stays on the CPU")
        with self._lock:
            self._drain()
            return super().to(*target, device=device, dtype=dtype, **options)

    def _measure_drift(self, model: Any, index: int) -> Drift:
        if any(leaf.spec.division is not None for leaf in self._leaves(model).items):
            raise ArgumentError(DRIFT_OF_PARTS)
        self._drain()
        self._link.fetch(self._tensors(model)).complete()
        return super()._measure_drift(None, index)

    def state_dict(self, *, copy: bool = True, tensors: bool = True) -> dict[str, Any]:
        """Return the state needed to resume the run; see :meth:`fastema.EMA.state_dict`."""
        with self._lock:
            self._drain_and_sync()
            return super().state_dict(copy=copy, tensors=tensors)

    def load_state_dict(self, state: Mapping[str, Any], **options: Any) -> None:
        """Load a saved average; see :meth:`fastema.EMA.load_state_dict`."""
        with self._lock:
            self._drain()
            super().load_state_dict(state, **options)


EMA._on_host = OffloadedEMA
