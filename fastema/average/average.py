"""The one class of averages: update, apply and restore, save and load."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, overload

from fastema.average.clock import Clock, HostClock
from fastema.average.drift import DRIFT_OF_PARTS, Drift, measure
from fastema.average.entries import select
from fastema.average.evaluation import new_container, new_state, write_model
from fastema.average.following import StepHooks
from fastema.average.given import check_overwriting, claim
from fastema.average.matching import names_of_state, refuse_other_holder
from fastema.average.memory import SYNC, Averages, Entry, Owned, Tensors
from fastema.average.options import (
    Rounding,
    check_flag,
    check_literal,
    dtype_of,
    format_of,
    parse_destination,
    parse_settings,
)
from fastema.average.reports import describe_rule, report
from fastema.average.state import SavedOrMine, complete_state, pack, unpack
from fastema.average.views import Shadow
from fastema.average.weights import AppliedSwap, weights_of
from fastema.binding.swap import AppliedCopy, copy_applied, copy_applied_into
from fastema.bridges.registry import (
    leaves_of,
    list_iterators,
    ranks_of,
    reshard,
    state_of,
    world_of,
)
from fastema.engine.blocks import BlockSteps, RestoringBlock
from fastema.engine.collector import pause_gc
from fastema.engine.cpu import NO_STEP
from fastema.engine.interrupts import defer_signals
from fastema.engine.locks import rlock
from fastema.engine.program import Program
from fastema.errors import ArgumentError, StateError, format_problems
from fastema.hints import check_options
from fastema.layout.spec import StateEntry
from fastema.rules import Rule, Schedule

__all__ = ["Average", "Weights", "check_average"]

if TYPE_CHECKING:
    from typing_extensions import Self, TypeVar

    Weights = TypeVar("Weights", default=Any)
    Other = TypeVar("Other")
else:
    from typing import TypeVar

    Weights = TypeVar("Weights")

_ONE: Final = 1
"""The default of ``steps=``; True and 1.0 are equal to it, but not it."""


def _no_step() -> int:
    return NO_STEP


def check_average(value: Any, call: str) -> None:
    """Raise an ArgumentError unless a value is an average, such as :class:`fastema.EMA`."""
    if not isinstance(value, Average):
        raise ArgumentError(
            f"{call}: expected an average, such as fastema.EMA(model), as the first argument, got "
            f"a {type(value).__name__}"
        )


class Average(Generic[Weights]):
    """Base class of all averages of weights, kept in flat buffers and updated in one call.

    At the n-th update ``avg += w(n) * (x - avg)``, computed in float32 (in float64 if the average
    or the weights are float64). The average begins as a copy of the weights: build it after
    loading or initializing them.

    Parameters
    ----------
    weights, **options
        See :class:`EMA`.
    rules : rule or sequence of rules
        Rules of :mod:`fastema.rules`, which give ``w(n)``. Each rule has its own average; one pass
        over the weights updates all of them.
    ring_dtype : dtype or str, optional
        For a windowed mean, the dtype of its ring; by default that of the weights.
    ring_on_host : bool
        Whether the ring is in host memory.

    Raises
    ------
    ArgumentError
        If a parameter has an invalid value, or a pattern matches no name.
    LayoutError
        If there is nothing to average; if a tensor is expanded, read-only or partly overlaps
        another one; if ranks disagree.
    DTypeError, BridgeError
        For tensors that no kernel can average: integer weights, sparse or meta tensors.

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
    Several averages of one model are independent, but apply only one at a time: a second one
    would take the applied average for the weights.

    Calls are thread-safe: a call waits while another thread's call runs. During a call no other
    thread may re-point weights. Subnormal values cost up to a hundred times as much as normal
    ones, in any package.
    """

    _native: Callable[[], int] = staticmethod(_no_step)
    """Takes the next step in one native call; returns 0 if it did."""

    _root: Any = None
    _root_dict: Any = None
    """The model, if it is an object, and the attributes that the native call checks for it."""

    @pause_gc
    def __init__(
        self,
        weights: Weights,
        rules: Rule | Sequence[Rule],
        *,
        ring_dtype: Any = None,
        ring_on_host: bool = False,
        into: Any = None,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        settings = parse_settings(rules, **options)
        stored_as = settings.format._replace(
            window=settings.schedule.window,
            ring=dtype_of(ring_dtype, "ring_dtype"),
            ring_on_host=ring_on_host,
        )
        container = list_iterators(weights)
        reshard(container)
        leaves = leaves_of(container)
        chosen = select(leaves, settings.policies)
        memory: Averages
        check_overwriting(settings.schedule, into, overwrite)
        if into is None:
            memory = Owned.of(chosen, stored_as)
        else:
            memory, chosen = claim(
                into, leaves, chosen, stored_as, buffers_given="buffers" in options
            )
        self._names = chosen.names
        self._memory: Averages = memory
        self._ranks = ranks_of(leaf.spec.owner for leaf in (*chosen.averaged, *chosen.copied))
        self._on_nonfinite = settings.on_nonfinite
        self._clock: Clock = HostClock(
            settings.schedule, settings.seed, settings.on_nonfinite, self._ranks
        )
        if self._ranks is not None:
            self._ranks.compare(self._common_settings())
        self._lock = rlock()
        self._follower: StepHooks | None = None
        self._applied: AppliedSwap | None = None
        self._weights = weights_of(container, self._memory, self._names, leaves)
        with self._weights.current(use=True) as program:
            memory.begin(program)
        if settings.capturable:
            from fastema.average.device_clock import DeviceClock

            self._refuse_several_deciders()
            skips = settings.on_nonfinite == "skip"
            self._clock = DeviceClock(settings.schedule, settings.seed, skips, self._weights)

    def _refuse_several_deciders(self) -> None:
        """Refuse several devices or ranks that would each decide on their own to skip an update."""
        several = len(self._weights.binding.contexts) > 1 or self._ranks is not None
        if self._on_nonfinite == "skip" and several:
            raise ArgumentError(
                "on_nonfinite='skip' with capturable=True is decided on the device, and these "
                "weights are divided among several; leave one of the two out"
            )

    @property
    def _kind(self) -> str:
        """Class name in saved states and reports."""
        return type(self).__name__

    def _common_settings(self) -> dict[str, str]:
        """Return the settings that all ranks must share, by name."""
        clock = self._clock
        facts = {
            "class": self._kind,
            "schedule": str(clock.schedule),
            "num_updates": str(clock.done),
            "num_skipped": str(clock.skipped),
            "seed": str(clock.seed),
            "stored as": str(self._memory.format),
            "on_nonfinite": self._on_nonfinite,
        }
        for name, entry in self._memory.sets[0].items():
            spec = entry.spec
            division = "" if spec.division is None else f", {spec.division}"
            how = "averaged" if entry.averaged else "copied"
            facts[repr(name)] = f"{how}, {spec.dtype}{list(spec.full_shape)}{division}"
        return facts

    # -- training ---------------------------------------------------------------------------------

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
                and (model is None or model is self._weights.own)
                and self._follower is None
                and getattr(self._root, "__dict__", None) is self._root_dict
                and not self._native()
            ):
                return
            self._refuse_following("update")
            self._advance(model, steps)

    def _advance(self, model: Any, steps: int) -> None:
        """Update the average, also while it follows optimizers."""
        with self._lock:
            self._refuse_applied("update")
            clock, weights = self._clock, self._weights
            usual = steps is _ONE and (model is None or model is weights.own)
            if not (usual and clock.step(weights)):
                clock.pending = self._update(model, clock.check_steps(steps))
                self._native = _no_step  # first: the old run may be freed, and signals handled
                steady = clock.begin_native(weights)
                if steady is not None:
                    self._root, self._root_dict = next(iter(steady.roots), (None, None))
                    self._native = steady.native

    def _update(self, model: Any, steps: int) -> int:
        """Update the average; the caller must exclude concurrent calls.

        Return the steps that remain for the next update, see :meth:`Clock.update`.
        """
        weights = self._weights
        with weights.current(model, use=True) as program:
            left = self._clock.update(weights, program, steps)
        weights.forget_replaced()
        weights.notify()
        return left

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
        if update_if is not None:
            self._clock.check_leaving_out()
        together = self._deciding_ranks()

        def is_wanted() -> bool:
            assert update_if is not None
            left_out = not update_if()
            return not (left_out if together is None else together.any(left_out))

        def stepped() -> None:
            if update_if is None or is_wanted():
                self._advance(None, 1)
            else:
                with self._lock:
                    self._clock.leave_out()

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
        return world_of(spec.owner for spec in self._weights.binding.weights.values())

    def unfollow(self) -> None:
        """Stop updating after optimizer steps. Do nothing if :meth:`follow` is not in force."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None

    @property
    def num_updates(self) -> int:
        """Number of steps counted by :meth:`update` so far, without skipped calls.

        Reading it waits for the GPU with ``capturable=True``.
        """
        return self._clock.done

    @property
    def num_skipped(self) -> int:
        """Number of :meth:`update` calls skipped because a weight was not finite.

        Reading it waits for the GPU with ``capturable=True``.
        """
        return self._clock.skipped

    @property
    def decay(self) -> float | tuple[float, ...]:
        """Decay per step at the latest update (before any, at the first); a tuple for several."""
        decays = self.schedule.decays(max(self.num_updates, 1))
        return decays[0] if len(decays) == 1 else decays

    @property
    def schedule(self) -> Schedule:
        """The rules, ``update_every`` and ``start_after`` of the average."""
        return self._clock.schedule

    @property
    def version(self) -> int:
        """Number that grows with every write of the averages, by an update or by loading.

        Results computed with the average, such as a teacher's targets, are valid until it changes.
        Reading it waits for the GPU with ``capturable=True``.
        """
        return self._clock.version

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Lock that every call holds; ``with ema.lock:`` makes calls of other threads wait."""
        lock: AbstractContextManager[Any] = self._lock
        return lock

    # -- before reading the average ---------------------------------------------------------------

    def sync(self) -> None:
        """Copy the weights into the average now; the number of updates does not change.

        Raises
        ------
        StateError
            While the average is applied; for a windowed mean, which its next entries would correct.
        LayoutError
            If the model's tensors no longer match; nothing was written.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> online, target = {"w": np.ones(2)}, {"w": np.zeros(2)}
        >>> ema = fastema.EMA(online, decay=0.995, into=target)
        >>> ema.sync()
        >>> target["w"]
        array([1., 1.])
        """
        with self._lock:
            self._refuse_applied("sync")
            if self.schedule.window:
                raise StateError(
                    "sync(): a windowed mean is that of its entries; build another one"
                )
            with self._weights.current() as program:
                self._sync_by(program)

    def _settle(self) -> None:
        """Locate the average, and before ``start_after`` copy the current weights into it."""
        if self._applied is None and self._clock.is_before_start:
            with self._weights.current() as program:
                self._sync_by(program)
        else:
            self._weights.locate_averages()

    def _sync_by(self, program: Program) -> None:
        if self._weights.binding.capturing():
            raise StateError(
                "a captured graph would repeat the copy of the weights into the average at every "
                "replay: call sync() outside of it, and read the average there until start_after"
            )
        with defer_signals():
            program.run(SYNC)
            self._clock.count_write()
        self._weights.notify()

    # -- the average in the model -----------------------------------------------------------------

    @property
    def applied(self) -> bool:
        """Whether the model holds the average now, between apply and restore."""
        return self._applied is not None

    def _refuse_applied(self, call: str) -> None:
        if self._applied is not None:
            raise StateError(
                f"{call}() while the average is applied to the model: call restore() first, or "
                "leave the swapped() block"
            )

    def _average_index(self, which: int | None) -> int:
        """Return the index of the average that ``which`` selects."""
        count = len(self._memory.sets)
        if which is None and count == 1:
            return 0
        if isinstance(which, bool) or not isinstance(which, int) or not -count <= which < count:
            rules = ", ".join(
                f"{i}: {describe_rule(rule)}" for i, rule in enumerate(self.schedule.rules)
            )
            raise ArgumentError(
                f"which={which!r}: choose one of the averages ({rules}); `shadows` has all of them"
            )
        return which % count

    def apply_shadow(self, model: Any = None, *, which: int | None = None) -> None:
        """Put the average into the model, in place, and keep the raw weights for :meth:`restore`.

        Average and weights swap places without a copy if their dtypes agree, or if a float32
        average meets bfloat16 weights (the model then gets the nearest bfloat16, ties away from
        zero). For other pairs of dtypes a spare buffer keeps the raw weights. Before the first
        update the model gets the weights the average was built from; before ``start_after`` it
        keeps its current ones.

        Parameters
        ----------
        model : optional
            The model to write, by default the averaged one; see :meth:`update`.
        which : int, optional
            Index of the average among the rules, negative from the end; required if there are
            several.

        Raises
        ------
        StateError
            If an average is applied already.
        ArgumentError
            If ``which`` is out of range, or missing with several averages.
        LayoutError
            If the model's tensors no longer match the average, or its arrays are immutable;
            nothing was written.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> w = np.array([1.0])
        >>> ema = fastema.EMA([w], decay=0.5)
        >>> w += 2
        >>> ema.update(); ema.apply_shadow(); w.item()
        2.0
        >>> ema.restore(); w.item()
        3.0
        """
        with self._lock:
            self._refuse_applied("apply_shadow")
            index = self._average_index(which)
            with self._weights.current(model, write=True) as program:
                if self._clock.is_before_start:
                    self._sync_by(program)
                swap = self._weights.swap(index)
                with defer_signals():
                    self._clock.pause()
                    swap.apply()
                    self._applied = swap

    def restore(self, model: Any = None) -> None:
        """Put the raw weights back into the model, bit for bit, and take the average out of it.

        Do not train while the average is applied: the values in the model become the average.

        Parameters
        ----------
        model : optional
            The model given to :meth:`apply_shadow`, which is the default.

        Raises
        ------
        StateError
            If the average is not applied, is applied to another model, or the model's dtypes
            changed since. Also, after restoring the weights, if averaged PyTorch tensors were
            written while the average was applied, for example by an optimizer or
            ``load_state_dict``: the average now holds the written values. (Writing copied buffers
            is allowed, as :func:`fastema.update_bn` does.) The same if tensors of ``into=`` were
            written, which held the raw weights: those are lost.
        LayoutError
            If the model's tensors no longer match the average.
        """
        with self._lock:
            _refuse_written(*self._restore(model))

    def _restore(self, model: Any) -> tuple[list[str], list[str]]:
        """Put the raw weights back; return what was written since, :meth:`AppliedSwap.written`."""
        swap = self._applied
        if swap is None:
            raise StateError("restore() without apply_shadow(): the model holds its own weights")
        if model is not None:
            refuse_other_holder(list_iterators(model), swap.container, swap.watch.weights)
        reshard(swap.container, interrupted=True)
        with self._weights.holding(swap):
            written = swap.written()
            with defer_signals():
                swap.restore()
                self._applied = None
        return written

    @overload
    def swapped(self, model: None = None, *, which: int | None = None) -> RestoringBlock[Weights]:
        pass

    @overload
    def swapped(self, model: Other, *, which: int | None = None) -> RestoringBlock[Other]:
        pass

    def swapped(self, model: Any = None, *, which: int | None = None) -> RestoringBlock[Any]:
        """Return a context manager in which the model holds the average.

        The raw weights are restored on exit, also after an exception. ``with ema.swapped() as
        weights:`` binds the model, or, where arrays are immutable (JAX), the new container that
        :meth:`averaged` returns. The result also works as a decorator.

        Parameters
        ----------
        model : optional
            See :meth:`apply_shadow`.
        which : int, optional
            See :meth:`apply_shadow`.

        Raises
        ------
        StateError, ArgumentError, LayoutError
            On entry, as :meth:`apply_shadow`.
        StateError
            On exit, as :meth:`restore`, unless the block itself raised.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> w = np.array([1.0])
        >>> ema = fastema.EMA([w], decay=0.5)
        >>> w += 2
        >>> ema.update()
        >>> with ema.swapped() as weights:
        ...     weights[0].item()
        2.0
        """
        model = None if model is None else list_iterators(model)
        swap = partial(self._swap_steps, model, which)
        averaged = partial(self.averaged, which=which)
        return RestoringBlock(lambda: self._weights.block(swap, averaged))

    def _swap_steps(self, model: Any, which: int | None) -> BlockSteps[Any]:
        own: list[AppliedSwap | None] = []
        written: list[tuple[list[str], list[str]]] = []

        def apply() -> Any:
            self.apply_shadow(model, which=which)
            own.append(self._applied)
            return self._weights.container if model is None else model

        def restore() -> None:
            with self._lock:  # leave an average that an outer block applied
                if self._applied is not None and self._applied in own:
                    written.append(self._restore(model))

        def verify() -> None:
            for averages, weights in written:
                _refuse_written(averages, weights)

        return BlockSteps(apply, restore, verify)

    def averaged(self, *, which: int | None = None) -> Any:
        """Return the average as new arrays, in a container like that of the weights.

        Use it to evaluate and save with frameworks whose arrays are immutable (JAX). The average
        itself does not change.

        Parameters
        ----------
        which : int, optional
            See :meth:`apply_shadow`.

        Returns
        -------
        pytree, list, tuple, dict or array
            A container with the structure of the latest weights; its arrays have their dtypes.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            If ``which`` is out of range, or missing with several averages.
        BridgeError
            If the weights belong to a module or model, which cannot be duplicated.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> ema = fastema.EMA({"w": np.array([1.0])}, decay=0.5)
        >>> ema.averaged()
        {'w': array([1.])}
        """
        with self._lock:
            self._refuse_applied("averaged")
            index = self._average_index(which)
            self._settle()
            return new_container(self._weights, index, self._memory.sets[index], self._names)

    def copy_to(self, model: Any, *, which: int | None = None) -> None:
        """Overwrite a model's weights with the average, rounded to the model's dtypes.

        The previous weights are not kept; use :meth:`swapped` to get them back.

        Parameters
        ----------
        model : module, array, list, tuple or dict
            Must have the names and shapes of the average. Its other frozen tensors and buffers are
            left alone.
        which : int, optional
            See :meth:`apply_shadow`.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            If ``which`` is out of range, or missing with several averages.
        LayoutError
            If tensors are missing or differ in shape; the message names them, nothing was written.
        """
        with self._lock:
            self._refuse_applied("copy_to")
            index = self._average_index(which)
            self._settle()
            entries = self._memory.sets[index]
            container = list_iterators(model)
            reshard(container)
            write_model(container, entries, self._names)

    def model_state_dict(self, model: Any = None, *, which: int | None = None) -> dict[str, Any]:
        """Return what ``model.state_dict()`` would hold with the average applied, in new tensors.

        Use it with ``other.load_state_dict(ema.model_state_dict())``, ``torch.save``, safetensors
        or :func:`torch.func.functional_call`. The model is only read.

        Parameters
        ----------
        model : optional
            See :meth:`update`.
        which : int, optional
            See :meth:`apply_shadow`.

        Returns
        -------
        dict of str to tensor
            The keys are those of the model without wrappers, as in :attr:`shadow`: the components
            that DDP, ``torch.compile`` and activation checkpointing add, such as ``module.`` and
            ``_orig_mod.``, are left out. Load it into the unwrapped model. The values are averages
            rounded to the model's dtypes; tied weights share one tensor. Entries that the average
            leaves out (frozen weights, extra state) are the model's own, not copies. Containers
            without ``state_dict()`` give the names of :attr:`shadow` and of tied arrays.

        Raises
        ------
        StateError
            While an average is applied: call ``model.state_dict()`` instead.
        ArgumentError
            If ``which`` is out of range, or missing with several averages.
        LayoutError
            If a shape differs.

        Examples
        --------
        >>> import torch, fastema
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = fastema.EMA(model)
        >>> list(ema.model_state_dict())
        ['weight', 'bias']
        """
        with self._lock:
            self._refuse_applied("model_state_dict")
            return new_state(*self._state_of(model, which))

    def _state_of(
        self, model: Any, which: int | None
    ) -> tuple[Mapping[str, Entry], Mapping[str, StateEntry], dict[str, str]]:
        """Return an average's entries, the model's state, and for its keys the entries' names."""
        index = self._average_index(which)
        self._settle()
        entries = self._memory.sets[index]
        container = self._weights.container if model is None else list_iterators(model)
        reshard(container)
        found = state_of(container)
        return entries, found, names_of_state(found, entries, self._names)

    # -- the average's tensors --------------------------------------------------------------------

    @property
    def shadows(self) -> tuple[Shadow, ...]:
        """The mapping of names to tensors of every average, in the order of the rules."""
        # Not cached: a reference cycle with the average would keep GPU memory alive.
        return tuple(
            Shadow(list(entries), partial(self._tensor, index))
            for index, entries in enumerate(self._memory.sets)
        )

    @property
    def shadow(self) -> Shadow:
        """The averaged and copied tensors by name; with several averages use :attr:`shadows`."""
        return self.shadows[self._average_index(None)]

    def _tensor(self, index: int, name: str) -> Any:
        with self._lock:
            name = self._names.aliases.get(name, name)
            self._settle()
            entry = self._memory.sets[index][name]
            array, _ = entry.parts["shadow"]
            applied, weights = self._applied, self._weights
            # All averages share the copied tensors, which are swapped with any of them.
            if applied is None or (index != applied.index and entry.averaged):
                pass
            elif weights.is_unmoved(name):  # skip checking all other tensors
                (array,) = copy_applied([weights.pair(name, index)])
            else:
                with weights.holding(applied):
                    (array,) = copy_applied([weights.pair(name, index)])
            return entry.to_framework(array)

    @property
    def averaged_names(self) -> set[str]:
        """Names of the averaged tensors; all other tensors in :attr:`shadow` are copies."""
        return set(self._memory.averaged)

    @property
    def skipped_names(self) -> set[str]:
        """Names of the model's tensors that are neither averaged nor copied."""
        return set(self._names.skipped)

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied weights, each mapped to the name under which they are averaged."""
        return dict(self._names.aliases)

    # -- saving, loading and moving ---------------------------------------------------------------

    def to(
        self, *target: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False
    ) -> Self:
        """Move the average to a device, or change the dtype of its averaged tensors, in place.

        Takes the arguments of :meth:`torch.Tensor.to`: ``to(device)``, ``to(dtype)``, ``to(device,
        dtype)``, ``to(tensor)`` for the device and dtype of that tensor, and keywords. A narrower
        dtype rounds the values once; stochastic rounding stays on or off. A CUDA graph that
        captured an update keeps updating the old memory: capture it again.

        Parameters
        ----------
        *target : device, dtype, str or array
            A string counts as a dtype if ``shadow_dtype`` accepts it, otherwise as a device.
        device : str, int or device, optional
            By default the device does not change.
        dtype : dtype or str, optional
            See ``shadow_dtype``; by default the dtype does not change.
        non_blocking : bool
            Accepted and ignored: the copies are done when the call returns.

        Returns
        -------
        Average
            The average itself.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            If device or dtype is given twice; for the dtype of a windowed mean.
        DTypeError
            If the average cannot have this dtype.
        DeviceError, BridgeError
            If the weights' framework has no such device.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> ema = fastema.EMA([np.ones(2, np.float32)])
        >>> ema.to(np.float64).shadow["0"].dtype
        dtype('float64')
        """
        device, dtype = parse_destination(target, device, dtype)
        # A signal handler may update the average: not between the copy of its memory and its use.
        with self._lock, defer_signals():
            self._refuse_applied("to")
            memory, stored_as = self._memory, self._memory.format
            self._wait_for_the_ring()
            if dtype is not None and stored_as.window:
                raise ArgumentError(
                    f"dtype={dtype!r}: a windowed mean keeps its dtype; build another one"
                )
            if device is not None:
                memory = memory.on(device, ring_on_host=stored_as.ring_on_host)
            if dtype is not None:
                wanted = format_of(dtype, stored_as.rounding, stored_as.num_averages, "dtype")
                memory = memory.cast(stored_as._replace(dtype=wanted.dtype, split=wanted.split))
            weights = weights_of(self._weights.container, memory, self._names)
            clock = self._clock.on(weights)
            self._clock.retire(self._memory)
            self._weights, self._memory, self._clock = weights, memory, clock
            return self

    def _wait_for_the_ring(self) -> None:
        # The host reads a ring that kernels on the device write: nothing else orders the two.
        if self._memory.on_host:
            self._weights.binding.wait()

    def state_dict(self, *, copy: bool = True, tensors: bool = True) -> dict[str, Any]:
        """Return the state needed to resume the run: counters, schedule and averages by name.

        It consists of tensors by name, as :func:`safetensors.torch.save_file`, :func:`torch.save`
        and :mod:`torch.distributed.checkpoint` take them. It also holds the average while that is
        applied to the model, never the raw weights in its place. Averages of DTensors are DTensors:
        all ranks must call this method.

        Parameters
        ----------
        copy : bool
            True by default: row-major copies. False saves their memory and returns the average's
            own tensors, with the strides of the weights: write them out before calling anything
            else. (While an average is applied, the tensors are always copies.)
        tensors : bool
            False leaves the averages out, if they lie in tensors of your own (``into=``) that you
            save yourself: the state holds their digest, and loading it checks that they are back.
            True by default.

        Returns
        -------
        dict
            ``"shadow.<i>.<name>"`` is the i-th average of a tensor. ``"residual.<i>.<name>"`` and
            ``"ring.<i>.<name>"`` are the second half of a split average or the rounding error of a
            windowed mean, and the windowed mean's ring. ``"fastema"``, bytes of JSON, has the
            schedule, the counters, and the names of a PyTorch model's parameters in order
            (docs/reference/formats.md).

        Raises
        ------
        LayoutError
            If ranks that share DTensors disagree about the settings.
        ArgumentError
            For ``tensors=False`` with averages in fastema's memory, or divided among ranks.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> ema = fastema.EMA({"w": np.array([1.0])})
        >>> state = ema.state_dict()
        >>> list(state), state["shadow.0.w"]
        (['fastema', 'shadow.0.w'], array([1.]))
        """
        with self._lock:
            if not check_flag(tensors, "tensors") and (
                self._ranks is not None or not self._memory.moves
            ):
                raise ArgumentError(
                    "tensors=False leaves out averages in tensors of your own (into=), on one "
                    "rank; those of this average must be in its state"
                )
            if self._ranks is not None:
                self._ranks.compare(self._common_settings())
            clock = self._clock
            with defer_signals():  # a handler may update: the count must be that of the tensors
                return pack(
                    self._kind,
                    {"num_updates": clock.done, "num_skipped": clock.skipped, "seed": clock.seed},
                    clock.schedule,
                    clock.log_decays,
                    self._memory.format.rounding,
                    self._collect_tensors(copy and tensors),
                    self._names.parameters,
                    whole=tensors,
                )

    @pause_gc
    def _collect_tensors(self, copy: bool) -> Tensors:
        self._settle()
        self._wait_for_the_ring()
        swap = self._applied
        if swap is None:
            return (self._memory.duplicate(row_major=True) if copy else self._memory).tensors()
        with self._weights.holding(swap):
            # Overwrite the raw weights in the copy: they must not be saved.
            memory = self._memory.duplicate(row_major=True)
            applied = [
                (index, entry.name)
                for index, entry in self._memory
                if index == swap.index or not entry.averaged
            ]
            parts = [memory.sets[index][name].parts for index, name in applied]
            copy_applied_into(
                [self._weights.pair(name, index) for index, name in applied],
                [
                    AppliedCopy(p["shadow"][1], p["residual"][1] if "residual" in p else None)
                    for p in parts
                ],
            )
        return memory.tensors()

    @check_options
    def load_state_dict(self, state: Mapping[str, Any], *, schedule: SavedOrMine = "saved") -> None:
        """Load a saved average, so that the run continues to the bit as if never interrupted.

        Counters, seed and rounding are restored, and by default the schedule. The tensors are
        copied into the average's memory.

        Parameters
        ----------
        state : mapping
            The result of :meth:`state_dict`, also from a file: by ``torch.load``, safetensors'
            ``load_file`` or :func:`fastema.checkpoint.load_state`.
        schedule : {"saved", "mine"}
            Rules, ``update_every`` and ``start_after`` to continue with. ``"saved"`` (the default)
            restores the saved ones, and warns if they differ from those this average was built
            with. ``"mine"`` keeps the latter, to change the decay on purpose.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            For another value of ``schedule``.
        CheckpointError
            If the state does not fit; the message lists every mismatch of names, shapes, dtypes and
            schedule. Nothing was changed.

        Warns
        -----
        UserWarning
            If the saved schedule replaces a different one.
        """
        check_literal(schedule, "schedule", SavedOrMine)
        with self._lock:
            self._refuse_applied("load_state_dict")
            self._weights.prepare_to_load()
            own = self.schedule
            mine = self._memory.tensors() if self._memory.moves else None
            state = complete_state(state, mine)
            saved = unpack(state, self._kind, own, self._memory.specs(), schedule)
            program = self._memory.load(saved.tensors)
            continue_count = self._clock.prepare_load(saved)
            program.prepare({"all": "copy"})  # may fail, so before any change
            memory, weights = self._with_rounding(saved.rounding)
            self._wait_for_the_ring()
            with defer_signals():
                self._memory, self._weights = memory, weights
                continue_count()  # before the copy: on a device, it waits for pending replays
                program.run({"all": "copy"})
            self._weights.notify()
        if saved.schedule != own:
            warnings.warn(
                "the saved schedule replaces the one this average was built with; "
                f"pass schedule='mine' to keep that one\n  saved: {saved.schedule}\n  mine: {own}",
                stacklevel=3,  # past check_options
            )

    def _with_rounding(self, rounding: Rounding) -> tuple[Averages, Any]:
        """Return the same memory and weights, with this rounding of 16-bit averages."""
        memory, weights = self._memory, self._weights
        if memory.format.rounding != rounding:
            memory = memory.with_rounding(memory.format._replace(random=rounding == "stochastic"))
            weights = weights_of(weights.container, memory, self._names)
            self._clock.warm_up(weights)
        return memory, weights

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to copy or pickle: the copy would not be bound to a model."""
        raise StateError("averages cannot be copied or pickled; build another, load state_dict()")

    # -- descriptions -----------------------------------------------------------------------------

    def drift(self, model: Any = None, *, which: int | None = None) -> Drift:
        """Return the distance between an average and the weights, a :class:`Drift`.

        Reads both once, in float32 (float64 if either is), a few million elements at a time, and
        adds up squares in float64. Waits for the GPU, and copies both to the host.

        Parameters
        ----------
        model : optional
            The weights, by default those that the average follows; for JAX, the arrays passed
            last.
        which : int, optional
            With several averages, the index of one.

        Raises
        ------
        StateError
            While the average is applied: the model does not hold the weights.
        ArgumentError
            If ``which`` is missing or out of range; if the weights are divided among ranks.
        LayoutError
            If names or shapes of the model's tensors have changed.
        DTypeError, BridgeError
            If ``model`` has tensors that cannot be compared: integers, meta tensors.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> w = np.array([3.0, 4.0])
        >>> ema = fastema.EMA([w], decay=0.5)
        >>> w *= 2
        >>> ema.drift()
        Drift(distance=5.0, relative=1.0)
        """
        index = self._average_index(which)
        with self._lock:
            self._refuse_applied("drift")
            if self._ranks is not None:
                raise ArgumentError(DRIFT_OF_PARTS)
            return self._measure_drift(model, index)

    def _measure_drift(self, model: Any, index: int) -> Drift:
        with self._weights.current(model) as program:
            if self._clock.is_before_start:
                self._sync_by(program)
            names = [name for name, e in self._memory.sets[index].items() if e.averaged]
            return measure([self._weights.pair(name, index) for name in names])

    def report(self) -> str:
        """Return a description of what the average covers at this point of the run.

        For each average: the mean age of its weights in steps, its standard deviation, and the
        share of the initial weights that remains.
        """
        return report(self._kind, self.schedule, self.num_updates, self.num_skipped)

    def __repr__(self) -> str:
        averaged = [entry for entry in self._memory.sets[0].values() if entry.averaged]
        elements = sum(entry.spec.size for entry in averaged)
        dtypes = "/".join(sorted({e.form.strip("~") or e.spec.dtype for e in averaged}))
        rules = "; ".join(describe_rule(rule) for rule in self.schedule.rules)
        state = ", applied" if self.applied else ""
        return (
            f"{self._kind}({elements:,} weights in {_format_count(len(averaged), 'tensor')}, "
            f"{dtypes}, {rules}, {_format_count(self.num_updates, 'update')}{state})"
        )

    if not TYPE_CHECKING:  # with it, type checkers would accept every attribute

        def __getattr__(self, name):
            try:
                return object.__getattribute__(self, name)
            except AttributeError as error:
                from fastema.hints import suggest_name

                raise AttributeError(f"{error}{suggest_name(name)}", name=name, obj=self) from None


def _refuse_written(names: Sequence[str], lost: Sequence[str]) -> None:
    if lost:
        raise StateError(
            "tensors of into= were written while they held the raw weights. These are lost, the "
            "model now holds the written values:\n"
            + format_problems(repr(name) for name in lost)
            + "\nLoad the model from a checkpoint. Call restore(), or leave the swapped() block, "
            "before writing to the target or running it in train mode."
        )
    if names:
        raise StateError(
            "weights were written while the model held the average. The raw weights are restored; "
            "the average is lost, it now holds the written values:\n"
            + format_problems(repr(name) for name in names)
            + "\nLoad it from a checkpoint, or build a new one. Call restore(), or leave the "
            "swapped() block, before training or loading weights."
        )


def _format_count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
