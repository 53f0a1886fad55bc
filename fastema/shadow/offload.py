"""The exponential moving average in memory of the host, updated beside the training step."""

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

from fastema.binding.binding import Binding, Match
from fastema.binding.sides import NOTHING, Trained
from fastema.binding.swap import WriteWatch
from fastema.bridges.registry import leaves_of, link_of, materialised, reshard, state_of
from fastema.engine.blocks import Steps
from fastema.engine.interrupts import defer_signals
from fastema.errors import ArgumentError
from fastema.layout.spec import Leaves, TensorSpec
from fastema.rules import Rule
from fastema.rules.checks import MOST, checked_whole
from fastema.shadow.ema import EMA
from fastema.shadow.entries import select
from fastema.shadow.matching import (
    names_of_state,
    pairs_to,
    refuse_other_holder,
    refuse_other_model,
)
from fastema.shadow.options import (
    OnNonFinite,
    Policy,
    WhenBehind,
    checked,
    destination,
    patterns_of,
)
from fastema.shadow.views import Shadow

__all__ = ["OffloadStats", "OffloadedEMA"]


class OffloadStats(NamedTuple):
    """What an average on the host has cost so far.

    Attributes
    ----------
    queue_depth : int
        Updates that are not done yet: 0 or 1.
    seconds_waited : float
        That training waited, for the weights to be copied or for an update to be done.
    bytes_moved : int
        Over the link, in both directions.
    steps_skipped : int
        Updates left out because the one before was not done (``offload="skip"``).
    """

    queue_depth: int
    seconds_waited: float
    bytes_moved: int
    steps_skipped: int


_offloaded: weakref.WeakSet[Any] = weakref.WeakSet()
"""All averages on the host: a fork waits until what is under way is done, or half would be seen."""


def _wait_before_fork() -> None:
    for one in list(_offloaded):
        if one._job is not None:
            futures_wait([one._job])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_before_fork)


class OffloadedEMA(EMA[Any]):
    """What ``EMA(model, offload=True)`` builds; see :class:`fastema.EMA`.

    The weights are copied to memory of the host as large as they are, and averaged there on a
    thread, while training goes on. Before an optimizer of PyTorch steps again it waits until the
    weights are copied; :meth:`wait` does so for a loop that writes them in another way.

    :meth:`update` returns at once. If the update before is not done, it is waited for; with
    ``offload="skip"`` this one is left out instead, and the next one counts for its steps too. What
    an update raises, the next call raises, and does nothing else.
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
        if capturable:
            raise ArgumentError("capturable=True counts on the GPU, and offload=True on the host")
        module = materialised(weights)
        reshard(module)
        leaves = leaves_of(module)
        policies = checked(frozen, "frozen", Policy), checked(buffers, "buffers", Policy)
        chosen = select(leaves, *policies, patterns_of(policy))
        kept: dict[str, Policy] = {leaf.name: "average" for leaf in chosen.averaged}
        kept |= {leaf.name: "copy" for leaf in chosen.copied}
        if on_nonfinite != "propagate" and any(
            leaf.spec.division is not None for leaf in leaves.items if leaf.name in kept
        ):
            raise ArgumentError(
                f"on_nonfinite={on_nonfinite!r} is decided by all ranks that share DTensors, which "
                "a thread beside the training step cannot ask; leave it or offload=True out"
            )
        self._kept, self._module = list(kept), module
        tensors = self._owners(leaves)
        self._link = link_of(tensors)
        self._end_fences = self._link.before_steps(self, "wait")
        self._fetch: Any = None
        self._job: Future[None] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self._target: int | None = None  # number of updates once the one under way is done
        self._waited, self._moved = 0.0, 0
        # Steps that were left out, and those of them that the update under way counts for.
        self._behind, self._taken_behind = 0, 0
        self._skips_behind, self._num_behind = when_behind == "skip", 0
        self._writes: WriteWatch | None = None  # of the model that holds the average
        self._link.fetch(tensors).complete()
        exactly = {glob.escape(name): what for name, what in kept.items()}
        super().__init__(
            self._link.staging, decay, policy=exactly, on_nonfinite=on_nonfinite, **options
        )
        self._names = chosen.names  # as the user knows them
        self._model = Binding(None, module, partial(self._match, False), leaves=leaves)
        _offloaded.add(self)

    @property
    def _kind(self) -> str:
        return "EMA"  # states go from one to the other

    # -- the model --------------------------------------------------------------------------------

    def _owners(self, leaves: Leaves) -> dict[str, Any]:
        """The model's tensors that are kept, by name."""
        found = {leaf.name: leaf.spec.owner for leaf in leaves.items}
        return {name: found[name] for name in self._kept}

    def _match(self, match_subset: bool, _: Leaves, model: Leaves) -> Match:
        """Check that a model still fits; nothing is paired, since no kernel reads it."""
        names = self._names
        refuse_other_model(model, self._store.sets[0], names, match_subset=match_subset)
        frozen = [
            Trained(leaf.spec.owner, before=False)
            for leaf in model.items
            if leaf.name in names.still and leaf.role == "frozen"
        ]
        return Match({}, NOTHING, model.only({*self._kept, *names.aliases}), frozen)

    def _leaves(self, model: Any = None, *, write: bool = False, restore: bool = False) -> Leaves:
        """The model's tensors as they lie now, looked up again only where one is elsewhere."""
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
        """Return when the weights may be written: the latest update has its copy of them.

        On a GPU its stream waits, and the host goes on. Called before each step of an optimizer of
        PyTorch; call it where something else writes the weights.
        """
        if self._fetch is not None:
            began = time.perf_counter()
            if self._fetch.fence():
                self._waited += time.perf_counter() - began

    def _drain(self) -> None:
        """Wait until all updates are done; raise what one of them raised."""
        job = self._job
        if job is None:
            return
        began = time.perf_counter()
        try:
            job.result()
        except BaseException:
            if job.done():  # the steps that were left out before it still count
                self._behind += self._taken_behind
            raise
        finally:
            self._waited += time.perf_counter() - began
            if job.done():  # an interrupt leaves it to the next call
                self._job, self._fetch, self._taken_behind = None, None, 0

    def _settle(self) -> None:
        """Wait until all updates are done; until start_after the average is the weights of now."""
        self._drain()
        if self._applied is None and self._is_synced():
            self._link.fetch(self._tensors()).complete()

    def _submit(self, steps: int) -> None:
        if self._pool is None or self._pid != os.getpid():  # threads are not forked
            self._pool, self._pid = ThreadPoolExecutor(1, "fastema-offload"), os.getpid()
        fetch = self._fetch

        def work() -> None:
            try:
                fetch.complete()
                self._take_in(None, steps)  # all others wait for it, under the lock
            finally:
                self._target = None

        self._target = self._done + steps
        try:
            self._job = self._pool.submit(work)
        except BaseException:  # no thread could be started
            self._target, self._fetch = None, None
            raise

    @property
    def offload_stats(self) -> OffloadStats:
        """Updates under way, seconds waited, bytes moved over the link, steps skipped."""
        depth = int(self._job is not None and not self._job.done())
        return OffloadStats(depth, self._waited, self._moved, self._num_behind)

    # -- training ---------------------------------------------------------------------------------

    def _advance(self, model: Any, steps: int) -> None:
        with self._lock:
            self._refuse_applied("update")
            steps = checked_whole(steps, "steps", 1, MOST - self.num_updates - self._behind)
            if self._skips_behind and self._is_behind():
                self._num_behind += steps
                self._behind += steps
                return
            self._drain()
            tensors = self._tensors(model)
            with defer_signals():  # weights that are fetched are averaged and counted
                self._fetch = self._link.fetch(tensors)
                self._submit(steps + self._behind)
                self._moved += self._link.nbytes
                self._behind, self._taken_behind = 0, self._behind

    def _is_behind(self) -> bool:
        """Return whether the update before is not done; on any rank, where there are several."""
        behind = self._job is not None and not self._job.done()
        ranks = self._deciding_ranks()
        return behind if ranks is None else ranks.any(behind)

    @property
    def num_updates(self) -> int:
        """Steps taken in so far, with those of the update that is not done yet."""
        target = self._target
        return self._done if target is None else target

    @property
    def version(self) -> int:
        """See :attr:`fastema.EMA.version`; waits for the latest update."""
        with self._lock:
            self._drain()
            return super().version

    @property
    def num_skipped(self) -> int:
        """Updates that changed nothing because a weight was not finite; waits for the latest."""
        with self._lock:
            self._drain()
            return self._num_skipped

    def update_from_host(self, tensors: Mapping[str, Any]) -> None:
        """Take in weights that are on the host already, by name; nothing goes over the link.

        For trainers that keep copies in the weights' dtypes there, to save or to send them. The
        tensors may be written when this returns. Master weights of another dtype are averaged
        themselves: ``EMA(masters)``.

        Raises
        ------
        StateError
            While the average is applied, or while it follows optimizers.
        LayoutError
            If a tensor is missing, or differs from the model's in shape, dtype or division.
        """
        self._refuse_following("update_from_host")
        with self._lock:
            self._drain()
            self._refuse_applied("update_from_host")
            found = {name: tensors[name] for name in self._kept if name in tensors}
            self._link.fetch(found).complete()
            self._take_in(None, 1 + self._behind)
            self._behind = 0

    # -- evaluation -------------------------------------------------------------------------------

    def apply_shadow(self, model: Any = None, *, which: int | None = None) -> None:
        """Put the average into the model, in place; see :meth:`fastema.EMA.apply_shadow`."""
        with self._lock:
            self._settle()
            self._refuse_applied("apply_shadow")
            leaves = self._leaves(model, write=True)
            tensors, writes = self._owners(leaves), self._write_watch(leaves)
            self._link.fetch(tensors).complete()  # the raw weights, to the bit
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
            self._moved += 2 * self._link.nbytes

    def _specs(self, leaves: Leaves) -> dict[str, TensorSpec]:
        found = {leaf.name: leaf.spec for leaf in leaves.items}
        return {name: found[name] for name in self._kept}

    def _write_watch(self, leaves: Leaves) -> WriteWatch:
        return WriteWatch(self._specs(leaves), self.averaged_names)

    def _restore(self, model: Any) -> list[str]:
        if self._applied is None or self._writes is None:
            return super()._restore(None)
        writes = self._writes
        if model is not None:
            refuse_other_holder(materialised(model), self._model.container, writes.weights)
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
        self._moved += self._link.nbytes
        return written

    def _swap_steps(self, model: Any, which: int | None) -> Steps[Any]:
        steps: Steps[Any] = super()._swap_steps(model, which)

        def apply() -> Any:
            steps.apply()
            return self._module if model is None else model

        return Steps(apply, steps.restore, steps.verify)

    def copy_to(self, model: Any, *, which: int | None = None) -> None:
        """Write the average into a model; see :meth:`fastema.EMA.copy_to`."""
        with self._lock:
            self._settle()
            container = materialised(model)
            reshard(container)
            pairs = pairs_to(leaves_of(container), self._store.sets[0], self._names)
            tensors = {pair.name: pair.src.owner for pair in pairs}
            link = link_of(tensors)
            super().copy_to(link.staging, which=which)
            link.send(tensors)

    def model_state_dict(self, model: Any = None, *, which: int | None = None) -> dict[str, Any]:
        """Return the model's state with the average applied, on the model's devices."""
        container = self._module if model is None else materialised(model)
        reshard(container)
        found = state_of(container)
        names = names_of_state(found, self._store.sets[0], self._names)
        theirs = {name: found[key][1] for key, name in names.items() if name in self._kept}
        with self._lock:
            self._settle()
            staged = self._link.staging
            if any(one.dtype != staged[name].dtype for name, one in theirs.items()):
                staged = {**staged, **link_of(theirs).staging}  # to be rounded to their dtypes once
            held = super().model_state_dict(staged, which=which)
        return {
            key: held[name].to(found[key][1].device) if name in held else found[key][1]
            for key, name in names.items()
        }

    @property
    def shadows(self) -> tuple[Shadow, ...]:
        """The averaged tensors by name, on the host, of every average."""
        with self._lock:
            self._settle()
            return super().shadows

    def _tensor(self, index: int, name: str) -> Any:
        with self._lock:
            self._drain()
            return super()._tensor(index, name)

    # -- saving -----------------------------------------------------------------------------------

    def to(self, *target: Any, device: Any = None, dtype: Any = None, **options: Any) -> Any:
        """Change the dtype of the average; it stays on the host."""
        there, _ = destination(target, device, dtype)
        if there is not None and not str(there).startswith("cpu"):
            raise ArgumentError(f"to({there!r}): the average was built with offload=True; it stays")
        with self._lock:
            self._drain()
            return super().to(*target, device=device, dtype=dtype, **options)

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """Return what is needed to continue; see :meth:`fastema.EMA.state_dict`."""
        with self._lock:
            self._settle()
            return super().state_dict(copy=copy)

    def load_state_dict(self, state: Mapping[str, Any], **options: Any) -> None:
        """Take over a saved average; see :meth:`fastema.EMA.load_state_dict`."""
        with self._lock:
            self._drain()
            super().load_state_dict(state, **options)


EMA._on_host = OffloadedEMA
