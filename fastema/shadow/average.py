"""What every average of weights does: update, apply for evaluation, take back, save and load."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, overload

from fastema.bridges.memory import allocate
from fastema.bridges.registry import (
    describe,
    leaves_of,
    materialised,
    ranks_of,
    reshard,
    state_of,
    written,
)
from fastema.engine.blocks import RestoringBlock, Steps
from fastema.engine.collector import uncollected
from fastema.engine.held import keep
from fastema.engine.interrupts import deferred
from fastema.engine.locks import rlock
from fastema.engine.moment import Moment, checked_seed
from fastema.engine.program import Program
from fastema.errors import (
    ArgumentError,
    BridgeError,
    LayoutError,
    NonFiniteError,
    StateError,
    listed,
)
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_unwritable, unique
from fastema.layout.spec import Leaves
from fastema.rules import Rule, Schedule
from fastema.rules.checks import MOST, checked_whole
from fastema.shadow.binding import FOLLOW, Binding, WriteWatch, refuse_divided_otherwise
from fastema.shadow.counting import DeviceCount, refuse_uneven, tables_for
from fastema.shadow.entries import Wish, select
from fastema.shadow.exchange import (
    Assignment,
    Exchange,
    Recovered,
    can_be_assigned,
    recover,
    recovered,
    rounded,
)
from fastema.shadow.options import (
    OnNonFinite,
    Policy,
    Rounding,
    Watched,
    checked,
    destination,
    dtype_of,
    patterns_of,
    wish_of,
)
from fastema.shadow.reports import report
from fastema.shadow.state import SavedOrMine, pack, unpack
from fastema.shadow.store import Store, Tensors
from fastema.shadow.views import Drift, Shadow

__all__ = ["Average"]


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Weights = TypeVar("Weights", default=Any)
else:
    from typing import TypeVar

    Weights = TypeVar("Weights")

Self = TypeVar("Self", bound="Average[Any]")
Other = TypeVar("Other")

_CHANGED: Final[dict[Watched, Callable[[Binding], bool]]] = {
    "all": Binding.changed,
    "sample": Binding.sampled,
}


def _refuse_written(names: Sequence[str]) -> None:
    if names:
        raise StateError(
            "weights were written while the model held the average; the model has its raw weights "
            "back, and the average now holds what was written:\n"
            + listed(repr(name) for name in names)
            + "\nCall restore(), or leave the swapped() block, before training or loading weights."
        )


class Average(Generic[Weights]):
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

    _operation: ClassVar[str] = "lerp"
    """What the kernels do with what is averaged."""

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
        watch: Watched = "all",
        policy: Mapping[str, Policy] | None = None,
        ring: tuple[int, Any, bool] | None = None,
    ) -> None:
        self._schedule = Schedule(rules, update_every, start_after)
        frozen = checked(frozen, "frozen", Policy)
        buffers = checked(buffers, "buffers", Policy)
        self._changed = _CHANGED[checked(watch, "watch", Watched)]
        self._on_nonfinite = checked(on_nonfinite, "on_nonfinite", OnNonFinite)
        if capturable and on_nonfinite != "propagate":
            raise ArgumentError(
                f"on_nonfinite={on_nonfinite!r} is decided by the host, which a captured graph "
                "does not ask; with capturable=True only 'propagate' is possible"
            )
        self._seed = checked_seed(seed)
        self._measures = drift
        averaged = "lerp_measured" if drift else self._operation
        self._operations = {"averaged": averaged, "copied": "copy"}
        self._wish = wish_of(shadow_dtype, rounding, len(self._schedule.rules))
        if ring is not None:
            window, dtype, on_host = ring
            self._wish = self._wish._replace(
                window=window, ring=dtype_of(dtype), ring_on_host=on_host
            )
        container = materialised(weights)
        reshard(container)
        leaves = leaves_of(container)
        selection = select(leaves, frozen, buffers, patterns_of(policy))
        self._store = Store.of(selection, self._wish)
        self._names = selection.names
        self._done = self._num_skipped = 0
        self._ranks = ranks_of(leaf.spec.owner for leaf in (*selection.averaged, *selection.copied))
        if self._ranks is not None:
            if drift:
                raise ArgumentError(
                    "drift=True measures what one rank holds, and these weights are divided among "
                    "several; build the average without it"
                )
            self._ranks.compare(self._facts())
        self._log_decays = self._schedule.log_decays(0)
        self._lock = rlock()
        self._applied: Exchange | None = None
        self._write_watch: WriteWatch | None = None
        self._measured: Program | None = None
        self._home = container
        self._binding = Binding(container, self._store, self._names, leaves=leaves)
        self._binding.program.run(FOLLOW)
        self._binding.notify_used()
        self._binding.release()
        self._count: DeviceCount | None = None
        self._captured = False
        if capturable:
            self._count = DeviceCount(self._binding.homes, self._schedule, self._seed)
            self._try(self._count, self._binding)

    def _facts(self) -> dict[str, str]:
        """What all ranks have to agree on, by what it is of."""
        facts = {
            "class": type(self).__name__,
            "schedule": str(self._schedule),
            "num_updates": str(self._done),
            "num_skipped": str(self._num_skipped),
            "seed": str(self._seed),
            "stored as": str(self._wish),
            "on_nonfinite": self._on_nonfinite,
        }
        for name, entry in self._store.sets[0].items():
            spec = entry.spec
            division = "" if spec.division is None else f", {spec.division}"
            how = "averaged" if entry.averaged else "copied"
            facts[repr(name)] = f"{how}, {spec.dtype}{list(spec.full_shape)}{division}"
        return facts

    def _try(self, count: DeviceCount, binding: Binding) -> None:
        """An update of which the clock says that nothing is to be done: all its kernels are there.

        Raises
        ------
        StateError
            Where something slower stands in for one of them.
        """
        binding.program.run(self._operations, count.moment)

    # -- the weights ------------------------------------------------------------------------------

    def _current(
        self,
        model: Any,
        changed: Callable[[Binding], bool] = Binding.changed,
        *,
        write: bool = False,
    ) -> Binding:
        """The binding to a model's memory as it is now; all checks, nothing written."""
        container = self._home if model is None else materialised(model)
        if write:
            reshard(container)
        binding = self._binding
        if binding.moving:
            stale = binding.lenient or not binding.locate(container, write=write)
        else:
            stale = binding.lenient or not binding.holds(container) or changed(binding)
        if stale:
            binding = self._binding = Binding(container, self._store, self._names, write=write)
        if binding.fixed:  # weights that are never written are those that came last
            self._home = container
        return binding

    # -- training ---------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """Calls of :meth:`update` so far, without those that were skipped."""
        return self._done if self._count is None else self._count.done()

    @property
    def num_skipped(self) -> int:
        """Calls of :meth:`update` that changed nothing because a weight was not finite."""
        return self._num_skipped

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
            While the average is applied, or in a capture without ``capturable=True``.
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
        with self._lock:
            steps = checked_whole(steps, "steps", 1, MOST - self._done)
            self._refuse_applied("update")
            if steps != 1:
                self._refuse_long_steps(steps)
            binding = self._current(model, self._changed)
            try:
                if model is None:
                    binding.refuse_used()
                self._update(binding, steps)
                binding.notify_used()
            finally:
                binding.release()

    def _refuse_long_steps(self, steps: int) -> None:
        if self._count is not None or self._wish.window:
            reason = "counts on the GPU" if self._count is not None else "holds one entry per step"
            raise ArgumentError(f"steps={steps}: this average {reason}; call update() each step")

    def _update(self, binding: Binding, steps: int) -> None:
        if self._count is not None:
            self._update_by(self._count, binding)
            return
        if binding.capturing():
            raise StateError(
                "update() while the stream is captured: the step and the decay would be those "
                "of now at every replay; build the average with capturable=True"
            )
        step = self._done + steps
        weights, log_decays = self._schedule.weigh(step, steps, self._log_decays)
        if not weights:
            self._done = step
            return
        if self._on_nonfinite != "propagate" and not self._accepts(binding, step):
            return
        begins = step <= self._schedule.start_after
        # The weights are 1 then: rounded as on a device that counts by itself. Only a mean of
        # none has no slot yet.
        operations = FOLLOW if begins and self._wish.window else self._operations
        moment = self._moment(step, weights)
        with deferred():
            binding.program.run(operations, moment)
            self._done, self._log_decays = step, log_decays
            self._measured = None if begins or not self._measures else binding.program

    def _update_by(self, count: DeviceCount, binding: Binding) -> None:
        """An update whose step and weights are looked up on the device, now or in a replay."""
        binding.program.prepare(self._operations)
        self._captured = self._captured or binding.capturing()
        with deferred():
            count.advance()
            binding.program.run(self._operations, count.moment)
            self._measured = binding.program if self._measures else None

    def _moment(self, step: int, weights: tuple[float, ...]) -> Moment:
        return Moment(weights, self._seed, step)

    def _accepts(self, binding: Binding, step: int) -> bool:
        """Whether all weights are finite; what is to be done where they are not."""
        names = binding.not_finite()
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

    def _follow(self) -> None:
        """Until ``start_after`` the average is the weights: bring it up to date where seen."""
        if self._applied is None and self._follows():
            binding = self._current(self._binding.container)
            try:
                self._follow_in(binding)
            finally:
                binding.release()

    @staticmethod
    def _follow_in(binding: Binding) -> None:
        if binding.capturing():
            raise StateError(
                "until start_after the average is the weights, and a graph that copies them now "
                "would do so at every replay: capture it after that, or without the average"
            )
        binding.program.run(FOLLOW)

    def _follows(self) -> bool:
        # Where nothing is waited for, the count need not be fetched from a device.
        return self._schedule.start_after > 0 and self._schedule.follows(self.num_updates)

    # -- evaluation -------------------------------------------------------------------------------

    @property
    def applied(self) -> bool:
        """Whether the model holds the average now."""
        return self._applied is not None

    def _refuse_applied(self, call: str) -> None:
        if self._applied is not None:
            raise StateError(
                f"{call}() while the average is applied to the model: call restore() first, or "
                "leave the swapped() block"
            )

    def _chosen(self, which: int | None) -> int:
        """The average that a call is about."""
        count = len(self._store.sets)
        if which is None and count == 1:
            return 0
        if isinstance(which, bool) or not isinstance(which, int) or not -count <= which < count:
            rules = ", ".join(f"{i}: {rule!r}" for i, rule in enumerate(self._schedule.rules))
            raise ArgumentError(f"which={which!r}: say which of the averages is meant ({rules})")
        return which % count

    def apply_shadow(self, model: Any = None, *, which: int | None = None) -> None:
        """Put the average into the model, in place, and keep the raw weights for :meth:`restore`.

        Nothing is lost or copied where average and weights have one dtype, or are float32 and
        bfloat16 (the model then gets the nearest bfloat16, ties away from zero); for other pairs of
        dtypes the raw weights take a spare buffer meanwhile. Before the first update the model gets
        the weights the average was built from, before ``start_after`` those it has.

        Parameters
        ----------
        model : optional
            See :meth:`update`.
        which : int, optional
            The average, by its place among the rules; needed where there are several.

        Raises
        ------
        StateError
            If an average is applied already.
        LayoutError
            If the model's tensors are no longer the same; nothing was written.
        """
        with self._lock:
            self._refuse_applied("apply_shadow")
            which = self._chosen(which)
            binding = self._current(model, write=True)
            try:
                if self._follows():
                    self._follow_in(binding)
                exchange, watch = binding.exchange(which), binding.write_watch
                with deferred():
                    exchange.apply()
                    self._applied, self._write_watch = exchange, watch
                    watch.begin()
            finally:
                binding.release()

    def restore(self, model: Any = None) -> None:
        """Put the raw weights back, bit for bit, and the average where it was.

        What the model holds by then becomes the average: do not train while it is applied.

        Parameters
        ----------
        model : optional
            The model given to :meth:`apply_shadow`.

        Raises
        ------
        StateError
            If the average is not applied, or the model's dtypes changed meanwhile. After the
            weights are back: if averaged tensors of PyTorch were written while it was applied, by
            an optimizer or ``load_state_dict``, say; the average now holds what was written.
            (Copied buffers may be written, as :func:`fastema.update_bn` does.)
        LayoutError
            If the model's tensors are no longer the same.
        """
        with self._lock:
            _refuse_written(self._restore(model))

    def _restore(self, model: Any) -> list[str]:
        """Put the raw weights back; the names of averaged tensors that were written meanwhile."""
        if self._applied is None:
            raise StateError("restore() without apply_shadow(): the model holds its own weights")
        exchange, watch = self._still_applied(model), self._write_watch
        assert watch is not None
        binding = self._binding
        names = watch.written(binding.weights)
        try:
            with deferred():
                exchange.restore()
                self._applied = self._write_watch = None
                watch.end(binding.weights)
        finally:
            binding.release()
        return names

    def _still_applied(self, model: Any = None) -> Exchange:
        """What takes the average back, made anew if the model moved meanwhile."""
        before, applied = self._binding, self._applied
        assert applied is not None
        reshard(before.container)
        if model is not None:
            container = materialised(model)
            if not before.holds(container) and not before.same_memory(
                Binding(container, self._store, self._names, lenient=True)
            ):
                raise StateError(
                    "the average is applied to another model; restore() without an argument takes "
                    "it back from there"
                )
        if before.moving:
            if before.locate(before.container, write=True):
                applied.follow(before.exchanged(applied.which))
                return applied
        elif not before.changed():
            return applied
        binding = Binding(before.container, self._store, self._names, lenient=True, write=True)
        problems = [
            f"{name!r} was {was.dtype} and is {binding.weights[name].dtype}"
            for name, was in before.weights.items()
            if binding.weights[name].dtype != was.dtype
        ]
        if problems:
            raise StateError(
                "the model changed its dtype while the average was applied:\n"
                + listed(problems)
                + "\nChange it back, then restore(): the raw weights are kept exactly, the average "
                "only as the other dtype left it."
            )
        applied.follow(binding.exchanged(applied.which))
        self._binding = binding
        return applied

    def averaged(self, *, which: int | None = None) -> Any:
        """The average in a new container like that of the weights, in new arrays of their dtypes.

        What frameworks whose arrays never change are evaluated and saved with; the average goes on
        as it is.

        Parameters
        ----------
        which : int, optional
            See :meth:`apply_shadow`.

        Returns
        -------
        pytree, list, tuple, dict or array
            What the average was built from, or was given last, with other arrays.

        Raises
        ------
        StateError
            While an average is applied.
        BridgeError
            For a module or model, of which there is only one.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> ema = fastema.EMA({"w": np.array([1.0])}, decay=0.5)
        >>> ema.averaged()
        {'w': array([1.])}
        """
        with self._lock:
            self._refuse_applied("averaged")
            which = self._chosen(which)
            self._follow()
            binding = self._binding
            if binding.structure is None:
                raise BridgeError(
                    "a module is not made anew: use swapped(), or copy_to(other_module)"
                )
            pairs = binding.of(which)
            shown = {
                pair.name: self._store.sets[which][pair.name].shown(array)
                for pair, array in zip(pairs, rounded(pairs), strict=True)
            }
            names = [self._names.aliases.get(name, name) for name in binding.names]
            return binding.structure.rebuild([shown[name] for name in names])

    @overload
    def swapped(self, model: None = None, *, which: int | None = None) -> RestoringBlock[Weights]:
        pass

    @overload
    def swapped(self, model: Other, *, which: int | None = None) -> RestoringBlock[Other]:
        pass

    def swapped(self, model: Any = None, *, which: int | None = None) -> RestoringBlock[Any]:
        """A block in which the model holds the average; the raw weights come back however it ends.

        ``with ema.swapped() as weights:`` names what holds the average in the block: the model, or,
        where arrays never change (JAX), a new container of :meth:`averaged`.

        Parameters
        ----------
        model : optional
            See :meth:`update`.
        which : int, optional
            See :meth:`apply_shadow`.

        Raises
        ------
        StateError
            If an average is applied already. At the end of the block, as :meth:`restore` does,
            unless the block itself raised.
        """
        model = None if model is None else materialised(model)
        return RestoringBlock(lambda: self._swap_steps(model, which))

    def _swap_steps(self, model: Any, which: int | None) -> Steps[Any]:
        if self._binding.fixed:
            return Steps(apply=lambda: self.averaged(which=which), restore=lambda: None)
        own: list[Exchange | None] = []
        written: list[str] = []

        def apply() -> Any:
            self.apply_shadow(model, which=which)
            own.append(self._applied)
            return self._home if model is None else model

        def restore() -> None:
            with self._lock:  # an outer block's average is not this one's to restore
                if self._applied is not None and self._applied in own:
                    written.extend(self._restore(model))

        return Steps(apply, restore, lambda: _refuse_written(written))

    def copy_to(self, model: Any, *, which: int | None = None) -> None:
        """Write the average into a model, rounded to its dtypes, and keep nothing of what it held.

        Parameters
        ----------
        model : module, array, list, tuple or dict
            The same names and shapes; further frozen tensors and buffers are left alone.
        which : int, optional
            See :meth:`apply_shadow`.

        Raises
        ------
        StateError
            While an average is applied.
        LayoutError
            Naming every tensor that the model lacks or that differs in shape; nothing was written.
        """
        with self._lock:
            self._refuse_applied("copy_to")
            which = self._chosen(which)
            self._follow()
            container = materialised(model)
            reshard(container)
            pairs = unique(self._pairs_to(leaves_of(container), which))
            assigned = [pair for pair in pairs if can_be_assigned(pair.src)]
            pairs = [pair for pair in pairs if not can_be_assigned(pair.src)]
            for pair in pairs:
                check_pair(pair)
                refuse_unwritable(pair.name, pair.src)
            refuse_overlap(
                [(pair.name, pair.src) for pair in pairs],
                [(f"average of {pair.name}", pair.dst) for pair in pairs],
            )
            Assignment(assigned).apply()
            Program({"all": pairs}).run({"all": "give"})
            for tell, arrays in written(pair.src.owner for pair in pairs):
                tell(arrays)

    def model_state_dict(self, model: Any = None, *, which: int | None = None) -> dict[str, Any]:
        """What ``model.state_dict()`` would hold with the average in the model, in new tensors.

        For ``other.load_state_dict(ema.model_state_dict())``, ``torch.save``, safetensors, or
        :func:`torch.func.functional_call`; the model is only read.

        Parameters
        ----------
        model : optional
            See :meth:`update`. Its keys are used, with the prefixes of its wrappers.
        which : int, optional
            See :meth:`apply_shadow`.

        Returns
        -------
        dict of str to tensor
            Averages rounded to the model's dtypes, one tensor for tied weights. What the average
            leaves out (frozen weights, extra state) is the model's own, not copied. For what has no
            ``state_dict()``, the names are those of :attr:`shadow` and of tied arrays.

        Raises
        ------
        StateError
            While an average is applied: ``model.state_dict()`` holds it then.
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
            entries = self._store.sets[self._chosen(which)]
            self._follow()
            container = self._home if model is None else materialised(model)
            reshard(container)
            found = state_of(container)
            kept = self._names_of_state(found)
            averaged = {name: key for key, name in reversed(kept.items()) if name in entries}
            wanted = {name: describe(found[key][1]) for name, key in averaged.items()}
            # Memory of its own for each, so that whoever keeps one does not keep all.
            made = {name: allocate([(spec, spec.kind)])[0] for name, spec in wanted.items()}
            pairs = [
                entries[name].pair(spec, 0)._replace(name=averaged[name], ring=None)
                for name, (_, spec) in made.items()
            ]
            for pair in pairs:
                check_pair(pair)
            Program({"all": pairs}).run({"all": "give"})
            shown = {name: entries[name].shown(array) for name, (array, _) in made.items()}
            return {key: shown.get(kept[key], entry) for key, (_, entry) in found.items()}

    def _names_of_state(self, found: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
        """Find the names of this average for the keys of a model's state.

        Raises
        ------
        LayoutError
            If averaged tensors are there under keys that cannot be told: their raw values would be
            taken for averages.
        """
        kept = {key: self._names.aliases.get(name, name) for key, (name, _) in found.items()}
        missing = self.averaged_names - {*kept.values()}
        known = {*self._store.sets[0], *self._names.skipped}
        strange = [
            key
            for key, name in kept.items()
            if name not in known and hasattr(found[key][1], "shape")
        ]
        if missing and strange:
            raise LayoutError(
                "the model's state_dict() has other names, and copies, of averaged tensors (a hook "
                f"of its own): {strange[0]!r} is not known, {min(missing)!r} is not there; use "
                "ema.shadow, or swapped() and model.state_dict()"
            )
        return kept

    def _pairs_to(self, leaves: Leaves, which: int) -> list[Pair]:
        """Every name of the average, with what it is written to."""
        entries = self._store.sets[which]
        found = {leaf.name: leaf for leaf in leaves.items}
        names = {name: name for name in entries} | {
            name: kept for name, kept in self._names.aliases.items() if name in found
        }
        for one in leaves.opaque:
            if one.name in names:
                raise one.error
        problems = [f"{name!r} is missing" for name in names if name not in found]
        known = {*names, *self._names.skipped}
        problems += [
            f"{leaf.name!r} is trained and has no average"
            for leaf in leaves.items
            if leaf.role == "weight" and leaf.name not in known
        ]
        if problems:
            raise LayoutError("the model does not match the average:\n" + listed(problems))
        refuse_divided_otherwise(found, {name: entries[kept] for name, kept in names.items()})
        return [
            entries[kept].pair(found[name].spec, 0)._replace(name=name, ring=None)
            for name, kept in names.items()
        ]

    # -- the average ------------------------------------------------------------------------------

    @property
    def shadows(self) -> tuple[Shadow, ...]:
        """:attr:`shadow` of every average."""
        # Made anew: kept, they and the average would keep each other, and memory of a GPU with it.
        return tuple(Shadow(self, which) for which in range(len(self._store.sets)))

    @property
    def shadow(self) -> Shadow:
        """The averaged tensors by name; where there are several averages, see :attr:`shadows`."""
        return self.shadows[self._chosen(None)]

    def _tensor(self, name: str, which: int) -> Any:
        with self._lock:
            name = self._names.aliases.get(name, name)
            entry = self._store.sets[which][name]
            array, _ = entry.parts["shadow"]
            applied = self._applied
            # What is only copied is in all averages, and out with any of them.
            if applied is not None and (which == applied.which or not entry.averaged):
                if not self._binding.has_stayed(name):  # the others do not matter here
                    self._still_applied()
                (array,) = recovered([self._binding.pair(name, which)])
                self._binding.release()
            else:
                self._follow()
            return entry.shown(array)

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
        return tuple(self._drift(program, which) for which in range(len(self._store.sets)))

    @property
    def drift(self) -> Drift:
        """How the average stood to the weights after the latest update.

        Raises
        ------
        StateError
            If it was not built with ``drift=True``, or before the first update.
        """
        return self.drifts[self._chosen(None)]

    def _drift(self, program: Program, which: int) -> Drift:
        distance, size, still = program.measured(which)
        entries = self._store.sets[which].values()
        reals = sum(e.spec.size * e.spec.kind.parts for e in entries if e.averaged)
        relative = distance / size if size else math.inf if distance else 0.0
        return Drift(distance, relative, still / max(reals, 1))

    def report(self) -> str:
        """In words, what the average averages over at this point of the run."""
        return report(type(self).__name__, self._schedule, self.num_updates, self._num_skipped)

    def to(
        self: Self, *target: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False
    ) -> Self:
        """Move the average to a device, or change the dtype of its averaged tensors; returns it.

        Takes what :meth:`torch.Tensor.to` takes: ``to(device)``, ``to(dtype)``, ``to(device,
        dtype)``, ``to(tensor)`` for the device and dtype of that tensor, and keywords. Values are
        rounded once where the new dtype is narrower; stochastic rounding stays on or off as it was.
        A graph in which an update was captured goes on with the average as it was: capture it anew.

        Parameters
        ----------
        *target : device, dtype, str or array
            A name is a dtype where ``shadow_dtype`` takes it, else a device.
        device : str, int or device, optional
            By default the average stays where it is.
        dtype : dtype or str, optional
            As ``shadow_dtype``; by default unchanged.
        non_blocking : bool
            Accepted and ignored: the copies are done when the call returns.

        Returns
        -------
        the average itself

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            If device or dtype is given twice; for the dtype of a windowed mean.
        DTypeError
            If the average cannot have the dtype.
        DeviceError, BridgeError
            For what is no device of the weights' framework.

        Examples
        --------
        >>> import numpy as np, fastema
        >>> ema = fastema.EMA([np.ones(2, np.float32)])
        >>> ema.to(np.float64).shadow["0"].dtype
        dtype('float64')
        """
        device, dtype = destination(target, device, dtype)
        with self._lock:
            self._refuse_applied("to")
            store, wish = self._store, self._wish
            self._wait_for_the_ring()
            if dtype is not None and wish.window:
                raise ArgumentError(
                    f"dtype={dtype!r}: a windowed mean keeps its dtype; build another one"
                )
            if device is not None:
                store = store.on(device, ring_on_host=wish.ring_on_host)
            if dtype is not None:
                wanted = wish_of(dtype, "stochastic" if wish.random else "nearest", wish.together)
                wish = wanted._replace(
                    window=wish.window, ring=wish.ring, ring_on_host=wish.ring_on_host
                )
                store = store.cast(wish)
            binding = Binding(self._binding.container, store, self._names)
            count = self._count
            if count is not None:
                done = count.done()
                count = DeviceCount(binding.homes, self._schedule, self._seed, done)
                self._try(count, binding)
            if self._captured:  # its replays must not write where others are
                keep(self._store, self._count)
            binding.release()
            self._binding, self._store, self._wish = binding, store, wish
            self._count, self._captured = count, False
            return self

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """What is needed to go on: counters, schedule, and the averaged tensors by name.

        Plain values and tensors only: ``torch.load(weights_only=True)`` reads it. It holds the
        average also while that is applied to the model, never the raw weights in its place.
        Averages of DTensors are DTensors, for :mod:`torch.distributed.checkpoint`: all ranks have
        to call this.
        ``"shadow"`` is a list with a mapping of names to tensors for each average; ``"low"`` and
        ``"ring"`` are lists of the same kind, of what an average in two halves, or a windowed mean,
        needs besides.

        Parameters
        ----------
        copy : bool
            False saves the memory of a copy: the tensors are then the average's own, to be written
            out before anything else is called (while an average is applied they are copies).
        """
        with self._lock:
            if self._ranks is not None:
                self._ranks.compare(self._facts())
            counters = {
                "num_updates": self.num_updates,
                "num_skipped": self._num_skipped,
                "seed": self._seed,
            }
            log_decays = self._log_decays
            if self._count is not None:  # it counts single steps alone
                log_decays = self._schedule.log_decays(counters["num_updates"])
            rounding: Rounding = "stochastic" if self._wish.random else "nearest"
            return pack(
                type(self).__name__,
                counters,
                self._schedule,
                log_decays,
                rounding,
                self._saved(copy),
            )

    def _wait_for_the_ring(self) -> None:
        # Its memory is the host's, the work on it a device's: nothing else puts them in order.
        if self._store.on_host:
            self._binding.wait()

    @uncollected
    def _saved(self, copy: bool) -> Tensors:
        self._follow()
        self._wait_for_the_ring()
        if self._applied is None:
            return (self._store.duplicate() if copy else self._store).tensors()
        self._still_applied()
        # Written into the copy: beside it, the raw weights there would be saved along.
        store = self._store.duplicate()
        applied = [
            (which, entry.name)
            for which, entry in self._store
            if which == self._applied.which or not entry.averaged
        ]
        parts = [store.sets[which][name].parts for which, name in applied]
        recover(
            [self._binding.pair(name, which) for which, name in applied],
            [Recovered(p["shadow"][1], p["low"][1] if "low" in p else None) for p in parts],
        )
        self._binding.release()
        return store.tensors()

    def load_state_dict(self, state: Mapping[str, Any], *, schedule: SavedOrMine = "saved") -> None:
        """Take over a saved average: a run goes on to the bit as if it had not been interrupted.

        The counters, the seed and the rounding are the saved ones, and so is the schedule unless
        you keep your own. Tensors are copied into the average's memory.

        Parameters
        ----------
        state : mapping
            Of :meth:`state_dict`.
        schedule : {"saved", "mine"}
            Which rules, ``update_every`` and ``start_after`` to go on with. By default the saved
            ones, with a warning that names both where they differ from those this average was built
            with. ``"mine"`` keeps those it was built with, to change the decay on purpose.

        Raises
        ------
        StateError
            While an average is applied.
        ArgumentError
            For another ``schedule``.
        CheckpointError
            Listing every mismatch of names, shapes, dtypes and schedule; nothing was changed.

        Warns
        -----
        UserWarning
            If the saved schedule replaces a different one.
        """
        checked(schedule, "schedule", SavedOrMine)
        with self._lock:
            self._refuse_applied("load_state_dict")
            own = self._schedule
            saved = unpack(state, type(self).__name__, own, self._store.specs(), schedule)
            program = self._store.load(saved.tensors)
            tables = [] if self._count is None else tables_for(saved.schedule)
            if self._count is not None:
                refuse_uneven(saved.schedule, saved.counters["num_updates"], saved.log_decays)
            program.prepare({"all": "copy"})  # nothing is changed where it fails
            rounded = self._rounded(saved.rounding)
            self._wait_for_the_ring()
            with deferred():
                self._done = saved.counters["num_updates"]
                self._num_skipped = saved.counters["num_skipped"]
                self._seed, self._schedule = saved.counters["seed"], saved.schedule
                self._wish, self._store, self._binding = rounded
                self._log_decays = saved.log_decays
                self._measured = None
                if self._count is not None:  # first: it waits for replays that are still to come
                    self._count.set(self._schedule, tables, self._seed, self._done)
                program.run({"all": "copy"})
        if saved.schedule != own:
            warnings.warn(
                "the saved schedule replaces the one this average was built with; "
                f"pass schedule='mine' to keep that one\n  saved: {saved.schedule}\n  mine: {own}",
                stacklevel=2,
            )

    def _rounded(self, rounding: Rounding) -> tuple[Wish, Store, Binding]:
        """The same memory, with 16-bit averages rounded in this way from now on."""
        wish = self._wish._replace(random=rounding == "stochastic")
        if wish == self._wish:
            return wish, self._store, self._binding
        store = self._store.rounded(wish)
        binding = Binding(self._binding.container, store, self._names)
        binding.release()
        if self._count is not None:
            self._try(self._count, binding)
        return wish, store, binding

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: a copy would share, or double, the memory of a model it is not bound to."""
        raise StateError("an average is not copied or pickled; build another and load state_dict()")

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
