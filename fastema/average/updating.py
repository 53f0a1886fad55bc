"""Update averages from a model's weights, by calls or after optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic

from fastema.average.binding import SYNC, ShadowBinding, ShadowSwap
from fastema.average.entries import select
from fastema.average.following import StepHooks
from fastema.average.options import (
    OnNonFinite,
    dtype_of,
    parse_settings,
)
from fastema.average.progress import Progress
from fastema.average.reports import describe_rule
from fastema.average.schedule_counter import ScheduleCounter
from fastema.average.store import Store
from fastema.binding.steady import SteadyRun
from fastema.bridges.registry import leaves_of, list_iterators, ranks_of, reshard, world_of
from fastema.engine.collector import pause_gc
from fastema.engine.cpu import NO_STEP
from fastema.engine.interrupts import defer_signals
from fastema.engine.locks import rlock
from fastema.engine.program import Program
from fastema.errors import ArgumentError, NonFiniteError, StateError, format_problems
from fastema.layout.device_context import LaunchArgs
from fastema.layout.spec import Leaves
from fastema.rules import Rule, Schedule
from fastema.rules.checks import MAX_STEPS, validate_int

__all__ = ["UpdatableAverage", "Weights"]

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Weights = TypeVar("Weights", default=Any)
else:
    from typing import TypeVar

    Weights = TypeVar("Weights")


_ONE: Final = 1
"""The default of ``steps=``; True and 1.0 are equal to it, but not it."""

_ONCE: Final = "ema.update(params)"
"""How to pass new immutable arrays; quoted in errors."""


def _no_step() -> int:
    return NO_STEP


class UpdatableAverage(Generic[Weights]):
    """Averages in flat buffers, all updated in one call; see :class:`Average`."""

    _operation: ClassVar[str] = "lerp"
    """Kernel operation for the averaged tensors."""

    @property
    def _kind(self) -> str:
        """Class name in saved states and reports."""
        return type(self).__name__

    @pause_gc
    def __init__(
        self,
        weights: Weights,
        rules: Rule | Sequence[Rule],
        *,
        ring: tuple[int, Any, bool] | None = None,
        **options: Any,
    ) -> None:
        settings = parse_settings(rules, **options)
        self._schedule, self._format = settings.schedule, settings.format
        self._seed = settings.seed
        self._on_nonfinite: OnNonFinite = settings.on_nonfinite
        self._operations = {"averaged": self._operation, "copied": "copy"}
        if ring is not None:
            window, dtype, on_host = ring
            self._format = self._format._replace(
                window=window, ring=dtype_of(dtype, "ring_dtype"), ring_on_host=on_host
            )
        container = list_iterators(weights)
        reshard(container)
        leaves = leaves_of(container)
        selection = select(leaves, settings.policies)
        self._store = Store.of(selection, self._format)
        self._names = selection.names
        self._progress = Progress(self._schedule.log_decays(0))
        self._num_skipped = 0
        self._pending_steps = 0  # taken, but not averaged: the next update counts them
        self._ranks = ranks_of(leaf.spec.owner for leaf in (*selection.averaged, *selection.copied))
        if self._ranks is not None:
            self._ranks.compare(self._common_settings())
        self._steady: SteadyRun | None = None
        self._native: Callable[[], int] = _no_step  # of `_steady`; 0 if it took a step
        self._follower: StepHooks | None = None
        self._lock = rlock()
        self._applied: ShadowSwap | None = None
        self._binding = self._bind(container, self._store, leaves)
        # Do not keep immutable arrays: the arrays passed last are the model.
        self._own_model = None if self._binding.model.fixed else container
        with self._binding.current(once=_ONCE) as program:
            program.run(SYNC)
        self._count: ScheduleCounter | None = None
        self._was_captured = False
        if settings.capturable:
            self._refuse_several_deciders()
            self._count = ScheduleCounter(self._binding.contexts, self._schedule, self._seed)
            self._warm_up(self._count, self._binding)

    def _refuse_several_deciders(self) -> None:
        """Refuse several devices or ranks that would each decide on their own to skip an update."""
        several = len(self._binding.contexts) > 1 or self._ranks is not None
        if self._on_nonfinite == "skip" and several:
            raise ArgumentError(
                "on_nonfinite='skip' with capturable=True is decided on the device, and these "
                "weights are divided among several; leave one of the two out"
            )

    def _bind(self, container: Any, store: Store, leaves: Leaves | None = None) -> ShadowBinding:
        return ShadowBinding(container, store, self._names, leaves)

    def _common_settings(self) -> dict[str, str]:
        """Return the settings that all ranks must share, by name."""
        facts = {
            "class": self._kind,
            "schedule": str(self._schedule),
            "num_updates": str(self._progress.done),
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
            If a slower substitute runs in place of a kernel.
        """
        with binding.current() as program:
            program.run(self._operations, count.args)
        if self._on_nonfinite == "skip":
            binding.prepare_flag()

    # -- the weights ------------------------------------------------------------------------------

    def _current(
        self, model: Any, *, write: bool = False, once: str = ""
    ) -> AbstractContextManager[Program]:
        """Bind the model's tensors at their current addresses. Run all checks, write nothing."""
        model = self._own_model if model is None else model
        return self._binding.current(model, write=write, once=once)

    @property
    def _container(self) -> Any:
        """The model the average was built from; for immutable arrays, those passed last."""
        return self._binding.container if self._own_model is None else self._own_model

    # -- training ---------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """Number of steps counted by :meth:`update` so far, without skipped calls.

        Reading it waits for the GPU with ``capturable=True``.
        """
        return self._progress.done if self._count is None else self._count.done()

    @property
    def num_skipped(self) -> int:
        """Number of :meth:`update` calls skipped because a weight was not finite.

        Reading it waits for the GPU with ``capturable=True``.
        """
        return self._num_skipped if self._count is None else self._count.skipped()

    @property
    def decay(self) -> float | tuple[float, ...]:
        """Decay per step at the latest update (before any, at the first); a tuple for several."""
        decays = self._schedule.decays(max(self.num_updates, 1))
        return decays[0] if len(decays) == 1 else decays

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Lock that every call holds; ``with ema.lock:`` makes calls of other threads wait."""
        lock: AbstractContextManager[Any] = self._lock
        return lock

    @property
    def schedule(self) -> Schedule:
        """The rules, ``update_every`` and ``start_after`` of the average."""
        return self._schedule

    def update(self, model: Any = None, *, steps: int = 1) -> None:
        """Update the average with the current weights; call it after each ``optimizer.step()``.

        Parameters
        ----------
        model : optional
            The weights, by default those the average was built from. They must have the same names
            and shapes; names may have the prefixes of wrappers (``module.``, ``_orig_mod.``). JAX
            users pass the new arrays at every step: arrays are immutable, so averaging the previous
            ones again is an error.
        steps : int
            Training steps since the previous call, >= 1 (the default). Several are averaged at
            once, with the weight of that many steps, such as ``1 - decay ** steps``. If the update
            is skipped for a NaN, all but the latest of them count in the next update.

        Raises
        ------
        StateError
            While the average is applied, while it follows optimizers (each step would count twice),
            or in a CUDA graph capture without ``capturable=True``.
        ArgumentError
            If ``steps`` is invalid, or above 1 for a windowed mean or with ``capturable=True``; for
            more than 2**63 - 1 updates in all; if ``model`` is left out where its arrays are
            immutable.
        LayoutError
            If names or shapes of the model's tensors have changed; nothing was written.
        BridgeError
            Inside a function that JAX or TensorFlow traces; for donated arrays.
        DeviceError
            If the GPU's driver fails, or in a process forked after CUDA was used.
        NonFiniteError
            With ``on_nonfinite="raise"``, naming the tensors; nothing was written.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> w = np.array([1.0])
        >>> ema = fastema.EMA([w], decay=0.5)
        >>> w += 2
        >>> ema.update()
        >>> ema.shadow["0"]
        array([2.])
        """
        with self._lock:
            # The usual step is this one native call: in a training loop every Python function that
            # it walked through would cost microseconds, since the caches hold the model.
            if (
                steps is _ONE
                and (model is None or model is self._own_model)
                and self._follower is None
                and not self._native()
            ):
                return
            self._refuse_following("update")
            self._advance(model, steps)

    def _advance(self, model: Any, steps: int) -> None:
        """Update the average, also while it follows optimizers."""
        with self._lock:
            if steps is _ONE and (model is None or model is self._own_model) and self._step():
                return
            self._refuse_applied("update")
            pending = self._pending_steps
            steps = validate_int(steps, "steps", 1, MAX_STEPS - self._progress.done - pending)
            self._pending_steps = self._update_locked(model, steps + pending)
            self._begin_steady()

    def _step(self) -> bool:
        """Update the average in one native call; return False if anything is left to Python."""
        steady = self._steady
        if steady is None or self._applied is not None or self._pending_steps:
            return False
        if steady.run.finish(self._native()):
            return True
        return (
            self._binding.is_present(steady)
            and self._progress.ask_rules(self._schedule, self._launch_args)
            and steady.run.finish(self._native())
        )

    def _begin_steady(self) -> None:
        """Let native calls take the next steps, if they can."""
        if (
            self._count is None
            and self._on_nonfinite == "propagate"
            and not (self._format.window and self._schedule.follows(self._progress.done))
            and self._binding.is_matched_with(self._own_model)
        ):
            self._steady = self._binding.begin_steady(self._operations)
            if self._steady is not None:
                self._native = self._steady.call
                self._progress.begin(self._steady.run)

    def _update_locked(self, model: Any, steps: int) -> int:
        """Update the average; the caller must exclude concurrent calls.

        Return the steps that remain for the next update: none, or all but the latest if that was
        skipped for a NaN.
        """
        if steps != 1:
            self._refuse_long_steps(steps)
        with self._current(model, once=_ONCE) as program:
            averaged = self._update(program, steps)
        if self._binding.model.fixed:
            self._own_model = None
        return 0 if averaged else steps - 1

    def _leave_out(self) -> None:
        """Count a step that is not averaged in the next update."""
        with self._lock:
            # A windowed mean has an entry per averaged step, whatever was between them.
            self._pending_steps += not self._format.window
            self._progress.pause()

    def follow(self, *optimizers: Any, update_if: Callable[[], bool] | None = None) -> None:
        """Update the average automatically after each step of the given optimizers.

        The optimizers' hooks call :meth:`update` once after all of them have stepped; do not call
        it yourself. This works with accumulated gradients, closures, schedulers and ``GradScaler``,
        whose skipped steps do not count. For a fused optimizer under ``GradScaler``, reading from
        the device whether it stepped waits for the GPU.

        With several optimizers a step ends with the step of the last one passed. It is averaged if
        each of the others has stepped since the previous step of that one. So if ``GradScaler``
        skips one of them, this step is not averaged, and the next one is.

        Parameters
        ----------
        *optimizers : torch.optim.Optimizer
            All optimizers that train the averaged weights, at least one, in the order in which they
            step. Wrappers of Lightning and Accelerate are accepted, and others that run step hooks
            of their own, such as Lookahead of ``pytorch_optimizer``.
        update_if : function, optional
            Called after each step. If it returns False, the weights of this step are not averaged,
            and the next update counts for all steps since the latest one (``steps=``; a windowed
            mean has one entry fewer). With several ranks, one rank's False skips the step on all of
            them, by an all-reduce of one number. By default every step is averaged.

        Raises
        ------
        StateError
            If the average already follows optimizers.
        ArgumentError
            If an argument is not a PyTorch optimizer, runs no step hooks or is passed twice; if
            there is none; for ``update_if`` with ``capturable=True``.

        Notes
        -----
        Steps skipped since the latest update are not saved. If one optimizer steps several times
        before another one does, these steps count once.

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
            raise StateError("follow() was called already: unfollow() first, or pass all at once")
        if update_if is not None and self._count is not None:
            raise ArgumentError(
                "update_if= is called on the host, which a captured graph does not do; leave it "
                "or capturable=True out"
            )
        together = self._deciding_ranks()

        def is_wanted() -> bool:
            assert update_if is not None
            left_out = not update_if()
            return not (left_out if together is None else together.any(left_out))

        def stepped() -> None:
            if update_if is None or is_wanted():
                self._advance(None, 1)
            else:
                self._leave_out()

        self._follower = StepHooks(optimizers, stepped)

    def _refuse_following(self, method: str) -> None:
        if self._follower is not None:
            raise StateError(
                "this average follows optimizers and is updated after each of their steps: leave "
                f"{method}() out, or call unfollow() first"
            )

    def _deciding_ranks(self) -> Any:
        """Return all ranks that hold parts or replicas of the weights; None with one process."""
        if self._ranks is not None:
            return self._ranks
        return world_of(spec.owner for spec in self._binding.weights.values())

    def unfollow(self) -> None:
        """Stop updating after optimizer steps. Do nothing if :meth:`follow` is not in force."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    @property
    def version(self) -> int:
        """Number that grows with every write of the averages, by an update or by loading.

        Results computed with the average, such as a teacher's targets, are valid until it changes.
        Reading it waits for the GPU with ``capturable=True``.
        """
        version = self._progress.version
        return version if self._count is None else version + self._count.done()

    def _refuse_long_steps(self, steps: int) -> None:
        if self._count is not None or self._format.window:
            reason = "counts on the GPU" if self._count is not None else "holds one entry per step"
            raise ArgumentError(f"steps={steps}: this average {reason}; call update() each step")

    def _update(self, program: Program, steps: int) -> bool:
        """Return False if the update was skipped for a NaN."""
        if self._count is not None:
            self._update_by(self._count, program)
            return True
        if self._binding.capturing():
            raise StateError(
                "update() while the stream is captured: every replay would use the current step "
                "and decay; build the average with capturable=True"
            )
        progress = self._progress
        step = progress.done + steps
        weights, log_decays = self._schedule.weigh(step, steps, progress.log_decays)
        if not weights:
            progress.set(step, log_decays, written=False)
            return True
        if self._on_nonfinite != "propagate" and not self._check_finite(step):
            return False
        begins = step <= self._schedule.start_after
        # Until start_after, update with weight 1: capturable averages do, and rounding must agree.
        # A windowed mean has no slot yet, so copy.
        operations = SYNC if begins and self._format.window else self._operations
        args = self._launch_args(step, weights)
        with defer_signals():
            program.run(operations, args)
            progress.set(step, log_decays)
        return True

    def _update_by(self, count: ScheduleCounter, program: Program) -> None:
        """Update with the step and weights that the device reads, now and in replays."""
        program.prepare(self._operations)
        self._was_captured = self._was_captured or self._binding.capturing()
        with defer_signals():
            if self._on_nonfinite == "skip":
                self._binding.flag_nonfinite(count.args)
            count.advance()
            program.run(self._operations, count.args)

    def _launch_args(self, step: int, weights: tuple[float, ...]) -> LaunchArgs:
        return LaunchArgs(weights, self._seed, step)

    def _check_finite(self, step: int) -> bool:
        """Return whether all weights are finite; otherwise follow ``on_nonfinite``."""
        names = self._binding.find_nonfinite()
        if not (names if self._ranks is None else self._ranks.any(bool(names))):
            return True
        if self._on_nonfinite == "raise":
            found = [f"{name!r} holds a NaN or an infinity" for name in names]
            raise NonFiniteError(
                f"weights are not finite at update {step}; the average is unchanged:\n"
                + format_problems(found or ["on another rank, whose error names them"])
            )
        self._num_skipped += 1
        return False

    # -- before start_after -----------------------------------------------------------------------

    def _sync(self) -> None:
        """Before ``start_after``, copy the current weights into the average."""
        if self._applied is None and self._is_synced():
            with self._binding.current() as program:
                self._sync_by(program)

    def _sync_by(self, program: Program) -> None:
        if self._binding.capturing():
            raise StateError(
                "until start_after the average is a copy of the weights, and a captured graph "
                "would repeat the copy at every replay: capture after that, or without the average"
            )
        program.run(SYNC)
        self._progress.count_write()

    def _is_synced(self) -> bool:
        # Without start_after, do not fetch the count from a device.
        return self._schedule.start_after > 0 and self._schedule.follows(self.num_updates)

    # -- several averages -------------------------------------------------------------------------

    def _refuse_applied(self, call: str) -> None:
        if self._applied is not None:
            raise StateError(
                f"{call}() while the average is applied to the model: call restore() first, or "
                "leave the swapped() block"
            )

    def _average_index(self, which: int | None) -> int:
        """Return the index of the average that ``which`` selects."""
        count = len(self._store.sets)
        if which is None and count == 1:
            return 0
        if isinstance(which, bool) or not isinstance(which, int) or not -count <= which < count:
            rules = ", ".join(
                f"{i}: {describe_rule(rule)}" for i, rule in enumerate(self._schedule.rules)
            )
            raise ArgumentError(
                f"which={which!r}: choose one of the averages ({rules}); `shadows` has all of them"
            )
        return which % count
