"""Averages of weights that take in a model's weights at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic

from fastema.binding.sides import Sampled, Watched
from fastema.bridges.registry import leaves_of, materialised, ranks_of, reshard, world_of
from fastema.engine.collector import uncollected
from fastema.engine.interrupts import defer_signals
from fastema.engine.locks import rlock
from fastema.engine.program import Program
from fastema.errors import ArgumentError, NonFiniteError, StateError, listed
from fastema.layout.device_context import LaunchArgs, checked_seed
from fastema.layout.spec import Leaves
from fastema.rules import Rule, Schedule
from fastema.rules.checks import MOST, checked_whole
from fastema.shadow.binding import SYNC, ShadowBinding, ShadowSwap
from fastema.shadow.entries import select
from fastema.shadow.following import Follower
from fastema.shadow.options import (
    OnNonFinite,
    Policy,
    Rounding,
    WatchMode,
    checked,
    dtype_of,
    format_of,
    patterns_of,
)
from fastema.shadow.reports import named
from fastema.shadow.schedule_counter import ScheduleCounter
from fastema.shadow.store import Store

__all__ = ["Updating", "Weights"]

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Weights = TypeVar("Weights", default=Any)
else:
    from typing import TypeVar

    Weights = TypeVar("Weights")


_WATCHES: Final[dict[WatchMode, type[Watched]]] = {"all": Watched, "sample": Sampled}

_ONCE: Final = "ema.update(params)"
"""How to pass new arrays where arrays never change."""


class Updating(Generic[Weights]):
    """Averages in flat buffers and the update of all in one call; see :class:`Average`."""

    _operation: ClassVar[str] = "lerp"
    """Kernel operation for the averaged tensors."""

    @property
    def _kind(self) -> str:
        """The class that states and reports name."""
        return type(self).__name__

    @uncollected
    def __init__(
        self,
        weights: Weights,
        rules: Rule | Sequence[Rule],
        *,
        shadow_dtype: Any = None,
        rounding: Rounding | None = None,
        seed: int = 0,
        update_every: int = 1,
        start_after: int = 0,
        frozen: Policy = "skip",
        buffers: Policy = "copy",
        on_nonfinite: OnNonFinite = "propagate",
        drift: bool = False,
        capturable: bool = False,
        watch: WatchMode = "all",
        policy: Mapping[str, Policy] | None = None,
        ring: tuple[int, Any, bool] | None = None,
    ) -> None:
        self._schedule = Schedule(rules, update_every, start_after)
        frozen = checked(frozen, "frozen", Policy)
        buffers = checked(buffers, "buffers", Policy)
        self._watch = _WATCHES[checked(watch, "watch", WatchMode)]
        self._on_nonfinite = checked(on_nonfinite, "on_nonfinite", OnNonFinite)
        if capturable and on_nonfinite == "raise":
            raise ArgumentError(
                "on_nonfinite='raise' is decided by the host, which a captured graph does not ask; "
                "with capturable=True 'skip' leaves the update out"
            )
        self._seed = checked_seed(seed)
        self._measures = drift
        averaged = "lerp_measured" if drift else self._operation
        self._operations = {"averaged": averaged, "copied": "copy"}
        self._format = format_of(shadow_dtype, rounding, len(self._schedule.rules))
        if ring is not None:
            window, dtype, on_host = ring
            self._format = self._format._replace(
                window=window, ring=dtype_of(dtype), ring_on_host=on_host
            )
        container = materialised(weights)
        reshard(container)
        leaves = leaves_of(container)
        selection = select(leaves, frozen, buffers, patterns_of(policy))
        self._store = Store.of(selection, self._format)
        self._names = selection.names
        self._done = self._num_skipped = 0
        self._ranks = ranks_of(leaf.spec.owner for leaf in (*selection.averaged, *selection.copied))
        if self._ranks is not None:
            if drift:
                raise ArgumentError(
                    "drift=True measures what one rank holds, and these weights are divided among "
                    "several; build the average without it"
                )
            self._ranks.compare(self._common_settings())
        self._log_decays = self._schedule.log_decays(0)
        self._version = 0
        self._follower: Follower | None = None
        self._lock = rlock()
        self._applied: ShadowSwap | None = None
        self._measured: Program | None = None
        self._binding = self._bind(container, self._store, leaves)
        # Arrays that never change are not kept: those that came last are the model.
        self._own_model = None if self._binding.model.fixed else container
        with self._binding.current(once=_ONCE) as program:
            program.run(SYNC)
        self._count: ScheduleCounter | None = None
        self._captured = False
        if capturable:
            self._refuse_several_deciders()
            self._count = ScheduleCounter(self._binding.contexts, self._schedule, self._seed)
            self._warm_up(self._count, self._binding)

    def _refuse_several_deciders(self) -> None:
        """Refuse devices, or ranks, that would each skip updates by what they see themselves."""
        several = len(self._binding.contexts) > 1 or self._ranks is not None
        if self._on_nonfinite == "skip" and several:
            raise ArgumentError(
                "on_nonfinite='skip' with capturable=True is decided on the device, and these "
                "weights are divided among several; leave one of the two out"
            )

    def _bind(self, container: Any, store: Store, leaves: Leaves | None = None) -> ShadowBinding:
        return ShadowBinding(container, store, self._names, self._watch, leaves)

    def _common_settings(self) -> dict[str, str]:
        """Return the settings that all ranks have to share, by name."""
        facts = {
            "class": self._kind,
            "schedule": str(self._schedule),
            "num_updates": str(self._done),
            "num_skipped": str(self._num_skipped),
            "seed": str(self._seed),
            "stored as": str(self._format),
            "on_nonfinite": self._on_nonfinite,
        }
        for name, entry in self._store.sets[0].items():
            spec = entry.spec
            division = "" if spec.division is None else f", {spec.division}"
            how = "averaged" if entry.averaged else "copied"
            facts[repr(name)] = f"{how}, {spec.dtype}{list(spec.full_shape)}{division}"
        return facts

    def _warm_up(self, count: ScheduleCounter, binding: ShadowBinding) -> None:
        """Run one update that changes nothing, so that every kernel is loaded.

        Raises
        ------
        StateError
            Where something slower stands in for one of them.
        """
        with binding.current() as program:
            program.run(self._operations, count.args)
        if self._on_nonfinite == "skip":
            binding.prepare_flag()

    # -- the weights ------------------------------------------------------------------------------

    def _current(
        self, model: Any, *, write: bool = False, once: str = ""
    ) -> AbstractContextManager[Program]:
        """Bind the model's tensors as they lie now; all checks, nothing written."""
        model = self._own_model if model is None else model
        return self._binding.current(model, write=write, once=once)

    @property
    def _container(self) -> Any:
        """The model the average was built from; of arrays that never change the latest ones."""
        return self._binding.container if self._own_model is None else self._own_model

    # -- training ---------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """Calls of :meth:`update` so far, without those that were skipped."""
        return self._done if self._count is None else self._count.done()

    @property
    def num_skipped(self) -> int:
        """Calls of :meth:`update` that changed nothing because a weight was not finite."""
        return self._num_skipped if self._count is None else self._count.skipped()

    @property
    def decay(self) -> float | tuple[float, ...]:
        """Decay per step in force at the latest update (at the first, before any)."""
        decays = self._schedule.decays(max(self.num_updates, 1))
        return decays[0] if len(decays) == 1 else decays

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held by every call; in a ``with`` block of one's own the calls of other threads wait."""
        lock: AbstractContextManager[Any] = self._lock
        return lock

    @property
    def schedule(self) -> Schedule:
        """When the average is updated and with what weight."""
        return self._schedule

    def update(self, model: Any = None, *, steps: int = 1) -> None:
        """Take the current weights into the average; call it after ``optimizer.step()``.

        Parameters
        ----------
        model : optional
            The weights, where they are not those the average was built from: the same names and
            shapes. Names may differ by what wrappers add (``module.``, ``_orig_mod.``). Users of
            JAX give the new arrays at every step: those that were averaged never change, and are
            refused if this is left out.
        steps : int
            Steps of training since the previous call, where not every one can be seen: they are
            taken in at once, with ``decay ** steps``.

        Raises
        ------
        StateError
            While the average is applied, while it follows optimizers (each step would count twice),
            or in a capture without ``capturable=True``.
        ArgumentError
            For more than one step of a windowed mean, or of an average that counts on the GPU; for
            more than 2**63 - 1 updates in all; if no new arrays are given and the latest ones never
            change.
        LayoutError
            If the model's tensors are no longer the same by name and shape; nothing was written.
        BridgeError
            Inside a function that JAX or TensorFlow traces; for arrays that were donated.
        DeviceError
            If the GPU's driver refuses, or in a process forked after CUDA was used.
        NonFiniteError
            With ``on_nonfinite="raise"``, naming the tensors; nothing was written.
        """
        self._refuse_following("update")
        self._advance(model, steps)

    def _advance(self, model: Any, steps: int) -> None:
        """Do what :meth:`update` does, whoever calls it."""
        with self._lock:
            self._take_in(model, steps)

    def _take_in(self, model: Any, steps: int) -> None:
        """Do what :meth:`update` does; the caller sees to it that nobody else calls meanwhile."""
        steps = checked_whole(steps, "steps", 1, MOST - self._done)
        self._refuse_applied("update")
        if steps != 1:
            self._refuse_long_steps(steps)
        with self._current(model, once=_ONCE) as program:
            self._update(program, steps)
        if self._binding.model.fixed:
            self._own_model = None

    def follow(self, *optimizers: Any, update_if: Callable[[], bool] | None = None) -> None:
        """Update after each step of these optimizers, by their own hooks; call no ``update()``.

        Once after all of them have stepped: with accumulated gradients, closures, schedulers, and
        ``GradScaler``, whose skipped steps do not count. Where a fused optimizer is stepped by
        ``GradScaler``, whether it did is read from the device.

        Parameters
        ----------
        *optimizers : torch.optim.Optimizer
            All that train the averaged weights; also as Lightning or Accelerate wrap them.
        update_if : function, optional
            Called after each step; where it returns False, the weights of this step are left out,
            and the next that are averaged count for the steps since the latest update
            (``steps=``; a windowed mean has one entry fewer). With several ranks they are left out
            if any of them says so, by one all-reduce of a number.

        Raises
        ------
        StateError
            If it follows optimizers already.
        ArgumentError
            If one is no optimizer of PyTorch, is given twice, or there is none; for ``update_if``
            of an average that counts on the GPU.

        Notes
        -----
        Steps that were left out since the latest update are not saved. An optimizer that steps
        several times before another one does counts once.

        Examples
        --------
        >>> import torch, fastema
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = fastema.EMA(model, decay=0.9)
        >>> ema.follow(optimizer)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> ema.num_updates
        1
        """
        if self._follower is not None:
            raise StateError("follow() was called already: unfollow() first, or give all at once")
        if update_if is not None and self._count is not None:
            raise ArgumentError(
                "update_if= is decided by the host, which a captured graph does not ask; leave it "
                "or capturable=True out"
            )
        together = self._deciding_ranks()

        def is_wanted() -> bool:
            assert update_if is not None
            left_out = not update_if()
            return not (left_out if together is None else together.any(left_out))

        def update(steps: int) -> None:
            self._advance(None, 1 if self._format.window else steps)

        self._follower = Follower(optimizers, update, None if update_if is None else is_wanted)

    def _refuse_following(self, method: str) -> None:
        if self._follower is not None:
            raise StateError(
                "this average follows optimizers and is updated after each of their steps: leave "
                f"{method}() out, or call unfollow() first"
            )

    def _deciding_ranks(self) -> Any:
        """All ranks that hold parts or replicas of the weights; None where there is one process."""
        if self._ranks is not None:
            return self._ranks
        return world_of(spec.owner for spec in self._binding.weights.values())

    def unfollow(self) -> None:
        """Follow no optimizers any more; nothing happens if it follows none."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    @property
    def version(self) -> int:
        """A number that grows whenever the averages were written: by updates and by loading.

        What was computed with the average, such as a teacher's targets, is up to date while it is
        the same. Reading it waits for the GPU if the average counts there.
        """
        return self._version if self._count is None else self._version + self._count.done()

    def _refuse_long_steps(self, steps: int) -> None:
        if self._count is not None or self._format.window:
            reason = "counts on the GPU" if self._count is not None else "holds one entry per step"
            raise ArgumentError(f"steps={steps}: this average {reason}; call update() each step")

    def _update(self, program: Program, steps: int) -> None:
        if self._count is not None:
            self._update_by(self._count, program)
            return
        if self._binding.capturing():
            raise StateError(
                "update() while the stream is captured: the step and the decay would be those "
                "of now at every replay; build the average with capturable=True"
            )
        step = self._done + steps
        weights, log_decays = self._schedule.weigh(step, steps, self._log_decays)
        if not weights:
            self._done = step
            return
        if self._on_nonfinite != "propagate" and not self._check_finite(step):
            return
        begins = step <= self._schedule.start_after
        # The weights are 1 then: rounded as on a device that counts by itself. Only a mean of
        # none has no slot yet.
        operations = SYNC if begins and self._format.window else self._operations
        args = self._launch_args(step, weights)
        with defer_signals():
            program.run(operations, args)
            self._done, self._log_decays = step, log_decays
            self._version += 1
            self._measured = None if begins or not self._measures else program

    def _update_by(self, count: ScheduleCounter, program: Program) -> None:
        """Update by the step and weights that the device looks up, now or in a replay."""
        program.prepare(self._operations)
        self._captured = self._captured or self._binding.capturing()
        with defer_signals():
            if self._on_nonfinite == "skip":
                self._binding.flag_nonfinite(count.args)
            count.advance()
            program.run(self._operations, count.args)
            self._measured = program if self._measures else None

    def _launch_args(self, step: int, weights: tuple[float, ...]) -> LaunchArgs:
        return LaunchArgs(weights, self._seed, step)

    def _check_finite(self, step: int) -> bool:
        """Check that all weights are finite; else do what ``on_nonfinite`` says."""
        names = self._binding.not_finite()
        if not (names if self._ranks is None else self._ranks.any(bool(names))):
            return True
        if self._on_nonfinite == "raise":
            found = [f"{name!r} holds a NaN or an infinity" for name in names]
            raise NonFiniteError(
                f"weights are not finite at update {step}; the average is as it was:\n"
                + listed(found or ["those of another rank, which names them"])
            )
        self._num_skipped += 1
        return False

    # -- before start_after -----------------------------------------------------------------------

    def _sync(self) -> None:
        """Until ``start_after`` the average is the weights: bring it up to date where seen."""
        if self._applied is None and self._is_synced():
            with self._binding.current() as program:
                self._sync_by(program)

    def _sync_by(self, program: Program) -> None:
        if self._binding.capturing():
            raise StateError(
                "until start_after the average is the weights, and a graph that copies them now "
                "would do so at every replay: capture it after that, or without the average"
            )
        program.run(SYNC)
        self._version += 1

    def _is_synced(self) -> bool:
        # Where nothing is waited for, the count need not be fetched from a device.
        return self._schedule.start_after > 0 and self._schedule.follows(self.num_updates)

    # -- several averages -------------------------------------------------------------------------

    def _refuse_applied(self, call: str) -> None:
        if self._applied is not None:
            raise StateError(
                f"{call}() while the average is applied to the model: call restore() first, or "
                "leave the swapped() block"
            )

    def _average_index(self, which: int | None) -> int:
        """The average that a call is about."""
        count = len(self._store.sets)
        if which is None and count == 1:
            return 0
        if isinstance(which, bool) or not isinstance(which, int) or not -count <= which < count:
            rules = ", ".join(f"{i}: {named(rule)}" for i, rule in enumerate(self._schedule.rules))
            raise ArgumentError(
                f"which={which!r}: say which of the averages is meant ({rules}); `shadows` has all"
            )
        return which % count
