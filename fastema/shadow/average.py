"""Averages of a model's weights: update, apply for evaluation, take back, save and load."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastema.bridges.registry import bridge_of, describe, leaves_of, materialised, written
from fastema.engine.interrupts import deferred
from fastema.engine.locks import rlock
from fastema.engine.program import Program
from fastema.errors import ArgumentError, LayoutError, PrecisionWarning, StateError, listed
from fastema.layout.dtypes import average_of
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_unwritable, unique
from fastema.layout.spec import Leaves
from fastema.rules import Constant, Rule, Schedule
from fastema.shadow.binding import Binding
from fastema.shadow.entries import (
    Policy,
    allocate,
    checked_policy,
    dtype_of,
    kinds,
    select,
)
from fastema.shadow.exchange import APPLY, FOLLOW, RESTORE, UPDATE, Spares, recovered
from fastema.shadow.state import pack, unpack

__all__ = ["EMA", "Shadow"]


class Shadow(Mapping[str, Any]):
    """The averaged tensors by name; the mapping cannot be changed.

    While training, each is a view of the average's memory: read it, do not write it. While the
    average is applied to the model, each is a copy.
    """

    def __init__(self, average: EMA) -> None:
        self._average = average

    def __getitem__(self, name: str) -> Any:
        return self._average._tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._average._entries)

    def __len__(self) -> int:
        return len(self._average._entries)

    def __repr__(self) -> str:
        return f"Shadow({', '.join(self)})"


class EMA:
    """Exponential moving average of weights, kept in flat buffers and updated in one call.

    At the n-th update ``avg += w(n) * (x - avg)`` with ``w(n) = 1 - decay(n)``, computed in float32
    (float64 where either side is) and rounded to nearest even. The average begins as a copy of the
    weights, so build it when the weights are as training starts from them.

    Parameters
    ----------
    weights : torch module, array, or list, tuple, dict or iterator of arrays
        What is averaged. A module's own structure is watched: a parameter that was re-pointed
        (``p.data = ...``, ``.to()``, ``load_state_dict(assign=True)``) is found again, one that was
        added, removed, renamed, reshaped or untied is an error. Tied weights are averaged once.
    decay : float or rule
        Weight of the old average, in [0, 1), or a schedule of :mod:`fastema.rules`.
    shadow_dtype : dtype or str, optional
        Of the averaged tensors, such as ``torch.float32`` or ``"float32"``; by default that of the
        weights. For 16-bit weights ask for float32: a 16-bit average stops moving once
        ``(1 - decay) * |x - avg|`` is below half its last place.
    update_every : int
        Work only at every k-th call, with ``decay ** k``: the same horizon in steps.
    start_after : int
        Until this many calls the average is the weights themselves.
    frozen : {"skip", "copy", "average"}
        What is done with parameters that need no gradient. Skipped ones take no memory and no time,
        and are not part of the average; one that is unfrozen later is then an error.
    buffers : {"copy", "average", "skip"}
        What is done with buffers, such as BatchNorm statistics: ``copy`` keeps those of the latest
        update that did work, ``average`` averages floats. Integers and booleans are always copied
        exactly.

    Attributes
    ----------
    shadow : Mapping of str to array
        The averaged tensors.
    num_updates : int
        Calls of :meth:`update` so far.

    Raises
    ------
    ArgumentError
        For a parameter without a valid value.
    LayoutError
        If there is nothing to average, or a tensor is expanded, read-only or partly shares memory
        with another.
    DTypeError, BridgeError
        For tensors that no kernel can average: integers as weights, sparse, on the meta device.

    Notes
    -----
    Two averages of one model are independent of each other, but only one can be applied at a time:
    the second would average, or keep, the first one's average.

    Bytes moved per element and update: the weights once, the average twice (12 for float32, 10 for
    bfloat16 weights with a float32 average). A call on other threads while one runs waits; weights
    must not be re-pointed by another thread during a call. Denormal values cost up to a hundred
    times as much as normal ones, in any package.

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

    def __init__(
        self,
        weights: Any,
        decay: float | Rule = 0.999,
        *,
        shadow_dtype: Any = None,
        update_every: int = 1,
        start_after: int = 0,
        frozen: Policy = "skip",
        buffers: Policy = "copy",
    ) -> None:
        rule = decay if isinstance(decay, Rule) else Constant(decay)
        self._schedule = Schedule(rule, update_every, start_after)
        frozen = checked_policy(frozen, "frozen")
        buffers = checked_policy(buffers, "buffers")
        container = materialised(weights)
        selection = select(leaves_of(container), frozen, buffers)
        entries = allocate(kinds(selection, dtype_of(shadow_dtype)))
        self._entries = {entry.name: entry for entry in entries}
        self._names = selection.names
        self._num_updates = 0
        self._lock = rlock()
        self._swapped: Program | None = None
        self._spares: Spares | None = None
        self._home = container
        self._binding = Binding(container, self._entries, self._names)
        self._binding.program.run(FOLLOW)
        self.shadow = Shadow(self)
        self._warn_of_stalls()

    # -- the weights ------------------------------------------------------------------------------

    def _current(self, model: Any) -> Binding:
        """The binding to a model's memory as it is now; all checks, nothing written."""
        container = self._home if model is None else materialised(model)
        binding = self._binding
        if binding.lenient or not binding.holds(container) or binding.changed():
            self._binding = Binding(container, self._entries, self._names)
        return self._binding

    def _warn_of_stalls(self) -> None:
        narrow = {e.spec.dtype for e in self._entries.values() if e.averaged} & {"bf16", "f16"}
        schedule = self._schedule
        in_the_long_run = 1.0 - schedule.rule.decay(10**6) ** schedule.update_every
        if narrow and in_the_long_run < 2**-7:
            warnings.warn(
                f"a {' and '.join(sorted(narrow))} average with decay {self.decay} loses most "
                "updates to rounding; pass shadow_dtype='float32'",
                PrecisionWarning,
                stacklevel=3,
            )

    # -- training ---------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """Calls of :meth:`update` so far."""
        return self._num_updates

    @property
    def decay(self) -> float:
        """Decay per step in force at the latest update (at the first, before any)."""
        return self._schedule.decay(max(self._num_updates, 1))

    @property
    def schedule(self) -> Schedule:
        """When the average is updated and with what weight."""
        return self._schedule

    def update(self, model: Any = None) -> None:
        """Take the current weights into the average; call it after ``optimizer.step()``.

        Parameters
        ----------
        model : optional
            The weights, where they are not those the average was built from: the same names and
            shapes. Names may differ by what wrappers add (``module.``, ``_orig_mod.``).

        Raises
        ------
        StateError
            While the average is applied.
        LayoutError
            If the model's tensors are no longer the same by name and shape; nothing was written.
        """
        with self._lock:
            self._refuse_applied("update")
            binding = self._current(model)
            step = self._num_updates + 1
            weight = self._schedule.weight(step)
            if not 0.0 <= weight <= 1.0:
                raise ArgumentError(f"{self._schedule.rule!r} gives weight {weight} at {step}")
            if not weight:
                self._num_updates = step
                return
            with deferred():
                binding.program.run(UPDATE, weight)
                self._num_updates = step

    def _follow(self) -> None:
        """Until ``start_after`` the average is the weights: bring it up to date where seen."""
        if self._swapped is None and self._schedule.follows(self._num_updates):
            self._current(self._binding.container).program.run(FOLLOW)

    # -- evaluation -------------------------------------------------------------------------------

    @property
    def applied(self) -> bool:
        """Whether the model holds the average now."""
        return self._swapped is not None

    def _refuse_applied(self, call: str) -> None:
        if self._swapped is not None:
            raise StateError(
                f"{call}() while the average is applied to the model: call restore() first, or "
                "leave the swapped() block"
            )

    def apply_shadow(self, model: Any = None) -> None:
        """Put the average into the model, in place, and keep the raw weights for :meth:`restore`.

        Nothing is lost or copied where average and weights have one dtype, or are float32 and
        bfloat16 (the model then gets the nearest bfloat16, ties away from zero); for other pairs of
        dtypes the raw weights take a spare buffer meanwhile. Before the first update the model gets
        the weights the average was built from, before ``start_after`` those it has.

        Parameters
        ----------
        model : optional
            See :meth:`update`.

        Raises
        ------
        StateError
            If the average is applied already.
        LayoutError
            If the model's tensors are no longer the same; nothing was written.
        """
        with self._lock:
            self._refuse_applied("apply_shadow")
            binding = self._current(model)
            if self._schedule.follows(self._num_updates):
                binding.program.run(FOLLOW)
            spares = (
                Spares(binding.tagged) if {"spare", "converted"} & set(binding.tagged) else None
            )
            program = binding.program if spares is None else spares.program(binding.tagged)
            program.prepare(APPLY)
            program.prepare(RESTORE)
            with deferred():
                program.run(APPLY)
                self._swapped, self._spares = program, spares
                binding.written()

    def restore(self, model: Any = None) -> None:
        """Put the raw weights back, bit for bit, and the average where it was.

        What the model holds by then is taken for the average: do not train while it is applied.

        Parameters
        ----------
        model : optional
            The model given to :meth:`apply_shadow`.

        Raises
        ------
        StateError
            If the average is not applied, or the model's dtypes changed meanwhile.
        LayoutError
            If the model's tensors are no longer the same.
        """
        with self._lock:
            if self._swapped is None:
                raise StateError(
                    "restore() without apply_shadow(): the model holds its own weights"
                )
            program = self._applied_program(model)
            with deferred():
                program.run(RESTORE)
                self._swapped = self._spares = None
                self._binding.written()

    def _applied_program(self, model: Any = None) -> Program:
        """The program that takes the average back, rebuilt if the model moved meanwhile."""
        before, program = self._binding, self._swapped
        assert program is not None
        if model is not None:
            container = materialised(model)
            if not before.holds(container) and not before.same_memory(
                Binding(container, self._entries, self._names, lenient=True)
            ):
                raise StateError(
                    "the average is applied to another model; restore() without an argument takes "
                    "it back from there"
                )
        if not before.changed():
            return program
        binding = Binding(before.container, self._entries, self._names, lenient=True)
        was = {pair.name: pair.src.dtype for pair, _ in before.pairs}
        problems = [
            f"{pair.name!r} was {was[pair.name]} and is {pair.src.dtype}"
            for pair, _ in binding.pairs
            if pair.src.dtype != was[pair.name]
        ]
        if problems:
            raise StateError(
                "the model changed its dtype while the average was applied:\n"
                + listed(problems)
                + "\nChange it back, then restore(): the raw weights are kept exactly, the average "
                "only as the other dtype left it."
            )
        program = binding.program
        if self._spares is not None:
            program = self._spares.program(binding.tagged)
        program.prepare(RESTORE)
        self._binding, self._swapped = binding, program
        return program

    @contextmanager
    def swapped(self, model: Any = None) -> Iterator[None]:
        """A block in which the model holds the average; the raw weights come back however it ends.

        Parameters
        ----------
        model : optional
            See :meth:`update`.

        Raises
        ------
        StateError
            If the average is applied already.
        """
        # An outer block's average is not ours to take back: apply_shadow() refuses.
        model = None if model is None else materialised(model)
        outside = self.applied
        try:
            self.apply_shadow(model)
            yield
        finally:
            try:
                if self.applied and not outside:
                    self.restore(model)
            except BaseException:  # an interrupt, before anything was taken back
                if self.applied and not outside:
                    self.restore(model)
                raise

    def copy_to(self, model: Any) -> None:
        """Write the average into a model, rounded to its dtypes, and keep nothing of what it held.

        Parameters
        ----------
        model : module, array, list, tuple or dict
            The same names and shapes; further frozen tensors and buffers are left alone.

        Raises
        ------
        StateError
            While the average is applied.
        LayoutError
            Naming every tensor that the model lacks or that differs in shape; nothing was written.
        """
        with self._lock:
            self._refuse_applied("copy_to")
            self._follow()
            pairs = unique(self._pairs_to(leaves_of(materialised(model))))
            for pair in pairs:
                check_pair(pair)
                refuse_unwritable(pair.name, pair.dst)
            refuse_overlap(
                [(pair.name, pair.dst) for pair in pairs],
                [(f"average of {pair.name}", pair.src) for pair in pairs],
            )
            Program({"all": pairs}).run({"all": "copy"})
            for tell, arrays in written(pair.dst.owner for pair in pairs):
                tell(arrays)

    def _pairs_to(self, leaves: Leaves) -> list[Pair]:
        """Every name of the average, with what it is written to."""
        found = {leaf.name: leaf for leaf in leaves.items}
        names = {name: name for name in self._entries} | {
            name: kept for name, kept in self._names.aliases.items() if name in found
        }
        for one in leaves.opaque:
            if one.name in names:
                raise one.error
        problems = [f"{name!r} is missing" for name in names if name not in found]
        problems += [
            f"{leaf.name!r} is trained and has no average"
            for leaf in leaves.items
            if leaf.role == "weight" and leaf.name not in {*names, *self._names.skipped}
        ]
        if problems:
            raise LayoutError("the model does not match the average:\n" + listed(problems))
        return [
            Pair(name, found[name].spec, self._entries[kept].spec) for name, kept in names.items()
        ]

    # -- the average ------------------------------------------------------------------------------

    def _tensor(self, name: str) -> Any:
        with self._lock:
            name = self._names.aliases.get(name, name)
            entry = self._entries[name]
            if self._swapped is not None:
                self._applied_program()
                return recovered(*self._binding.pair(name))
            self._follow()
            return bridge_of(entry.shadow).alias(entry.shadow)

    def to(self, device: str | None = None, dtype: Any = None) -> EMA:
        """Move the average to a device, or change the dtype of its averaged tensors; returns it.

        Parameters
        ----------
        device : str or device, optional
        dtype : dtype or str, optional

        Raises
        ------
        StateError
            While the average is applied.
        DTypeError
            If an average cannot have the dtype.
        """
        with self._lock:
            self._refuse_applied("to")
            wanted = dtype_of(dtype)
            moved = []
            for entry in self._entries.values():
                bridge = bridge_of(entry.shadow)
                there = describe(bridge.transfer(entry.shadow, device or entry.spec.device))
                kind = average_of(there.kind, wanted) if entry.averaged else there.kind
                moved.append((entry.name, entry.averaged, there, kind))
            entries = allocate(moved)
            pairs = [
                Pair(entry.name, entry.spec, like)
                for entry, (_, _, like, _) in zip(entries, moved, strict=True)
            ]
            Program({"all": pairs}).run({"all": "copy"})
            named = {entry.name: entry for entry in entries}
            self._binding = Binding(self._binding.container, named, self._names)
            self._entries = named
            return self

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """What is needed to go on: counters, schedule, and the averaged tensors by name.

        Plain values and tensors only: ``torch.load(weights_only=True)`` reads it. It holds the
        average also while that is applied to the model, never the raw weights in its place.

        Parameters
        ----------
        copy : bool
            False saves the memory of a copy: the tensors are then the average's own, to be written
            out before anything else is called (while the average is applied they are copies).
        """
        with self._lock:
            if copy and self._swapped is None:
                self._follow()
                tensors = self._copies()
            else:
                tensors = {name: self._tensor(name) for name in self._entries}
            return pack(type(self).__name__, self._num_updates, self._schedule, tensors)

    def _copies(self) -> dict[str, Any]:
        entries = self._entries.values()
        copies = allocate([(e.name, e.averaged, e.spec, e.spec.kind) for e in entries])
        pairs = [Pair(c.name, c.spec, e.spec) for c, e in zip(copies, entries, strict=True)]
        Program({"all": pairs}).run({"all": "copy"})
        return {entry.name: entry.shadow for entry in copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved average: a run goes on to the bit as if it had not been interrupted.

        The schedule is the saved one. Tensors are copied into the average's memory.

        Parameters
        ----------
        state : mapping
            Of :meth:`state_dict`.

        Raises
        ------
        StateError
            While the average is applied.
        CheckpointError
            Listing every mismatch of names, shapes, dtypes and schedule; nothing was changed.
        """
        with self._lock:
            self._refuse_applied("load_state_dict")
            expected = {name: entry.spec for name, entry in self._entries.items()}
            saved = unpack(state, type(self).__name__, self._schedule, expected)
            arrays = {
                name: bridge_of(array).transfer(array, expected[name].device)
                for name, array in saved.tensors.items()
            }
            pairs = [Pair(name, expected[name], describe(a)) for name, a in arrays.items()]
            with deferred():
                Program({"all": pairs}).run({"all": "copy"})
                self._num_updates, self._schedule = saved.num_updates, saved.schedule

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: a copy would share, or double, the memory of a model it is not bound to."""
        raise StateError("an average is not copied or pickled; build another and load state_dict()")

    def __repr__(self) -> str:
        averaged = [entry for entry in self._entries.values() if entry.averaged]
        elements = sum(entry.spec.size for entry in averaged)
        dtypes = "/".join(sorted({entry.spec.dtype for entry in averaged}))
        state = ", applied" if self.applied else ""
        return (
            f"{type(self).__name__}({elements:,} weights in {len(averaged)} tensors, {dtypes}, "
            f"decay {self.decay:g}, {self._num_updates:,} updates{state})"
        )
