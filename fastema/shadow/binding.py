"""Averages bound to the memory of one model: pairs, the programs over them, and the watch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastema.bridges.moving import Located, Locator
from fastema.bridges.registry import bridge_of, describe, leaves_of, versions_of, written
from fastema.engine.cuda import refuse_forked
from fastema.engine.program import Program
from fastema.engine.watch import SHARES, watch
from fastema.errors import FastemaError, LayoutError, listed
from fastema.layout.group import (
    Guard,
    Pair,
    check_pair,
    refuse_overlap,
    refuse_shared_elements,
)
from fastema.layout.spec import Division, Leaf, Leaves, TensorSpec
from fastema.shadow.entries import Names
from fastema.shadow.exchange import Exchange, Tagged, can_be_assigned, exchanged
from fastema.shadow.store import Entry, Store

__all__ = ["FOLLOW", "Binding", "refuse_divided_otherwise"]

FOLLOW: Final = {"averaged": "copy", "copied": "copy"}
"""What makes the averages, and what is only copied, the weights themselves."""


def _gone_or_reshaped(found: Mapping[str, Leaf], entries: Mapping[str, Entry]) -> dict[str, str]:
    """What is wrong with averaged tensors, by name."""
    problems = {name: f"{name!r} is gone from the model" for name in entries if name not in found}
    for name, entry in entries.items():
        if name in found and found[name].spec.full_shape != entry.spec.full_shape:
            now, was = list(found[name].spec.full_shape), list(entry.spec.full_shape)
            problems[name] = f"{name!r} is now {now}, was {was}"
    return problems


def refuse_divided_otherwise(found: Mapping[str, Leaf], entries: Mapping[str, Entry]) -> None:
    """Refuse a model that is divided among ranks in another way than the average.

    Raises
    ------
    LayoutError
        On all ranks.
    """
    both = [
        (name, found[name].spec.division, entry.spec.division)
        for name, entry in entries.items()
        if name in found
    ]
    problems = [
        f"{name!r} is {_placed(now)}, its average {_placed(was)}"
        for name, now, was in both
        if now != was
    ]
    if problems:
        raise LayoutError(
            f"the model is not divided as its average is:\n{listed(problems)}\nFSDP gathers "
            "parameters for a forward pass, and leaves them so where no backward pass follows. "
            "Call update() after optimizer.step(), or reshard() on the modules before; an "
            "average of a model that is divided in another way takes over a state_dict()."
        )


def _placed(division: Division | None) -> str:
    return "whole on this rank" if division is None else str(division)


def _untied(found: Mapping[str, Leaf], aliases: Mapping[str, str]) -> list[str]:
    return [
        f"{name!r} was tied to {kept!r} and no longer is"
        for name, kept in aliases.items()
        if name in found and kept in found and found[name].spec != found[kept].spec
    ]


def _new_or_unfrozen(leaves: Leaves, entries: Mapping[str, Entry], names: Names) -> list[str]:
    known = {*entries, *names.aliases, *names.skipped}
    present = [leaf.name for leaf in leaves.items if leaf.persistent]
    present += [one.name for one in leaves.opaque if one.persistent]
    problems = [f"{name!r} is new in the model" for name in present if name not in known]
    return problems + [
        f"{leaf.name!r} is trained now but was frozen when the average was built"
        for leaf in leaves.items
        if leaf.role == "weight" and leaf.name in names.still
    ]


def _let_go(pair: Pair) -> Pair:
    return pair._replace(src=pair.src.kept_by(None))


def _not_finite(pairs: Sequence[Pair]) -> list[str]:
    """Names of tensors that the sources of some pairs are not finite of."""
    program = Program({"all": pairs})
    program.run({"all": "finite"})
    if program.all_finite():
        return []
    return [pairs[0].name] if len(pairs) == 1 else [n for p in pairs for n in _not_finite([p])]


class WriteWatch:
    """Notices who writes weights while they hold an average, and tells autograd of the swap.

    Parameters
    ----------
    weights : mapping of str to TensorSpec
    trained : set of str
        Those that nobody may write meanwhile: averaged parameters, no buffers.
    """

    def __init__(self, weights: Mapping[str, TensorSpec], trained: set[str]) -> None:
        self._weights, self._trained = weights, trained
        self._versions = versions_of(spec.owner for spec in weights.values() if spec.writable)

    def begin(self) -> None:
        """They hold the average now."""
        for one in self._versions:
            one.begin()

    def written(self, now: Mapping[str, TensorSpec]) -> list[str]:
        """Names of those that were written since, where they lie as they did; then :meth:`end`."""
        arrays = {id(array) for one in self._versions for array in one.written()}
        if not arrays:
            return []
        return [
            name
            for name, spec in self._weights.items()
            # Moving a tensor to other memory counts as a write of it, and is none.
            if id(spec.owner) in arrays and name in self._trained and spec == now[name]
        ]

    def end(self, now: Mapping[str, TensorSpec]) -> None:
        """They hold their own values again."""
        unmoved = self._weights == now
        for one in self._versions:
            one.end(put_back=unmoved)
        if not unmoved:
            for tell, arrays in written(spec.owner for spec in now.values() if spec.writable):
                tell(arrays)


class Binding:
    """Where an average's tensors and a model's tensors lie.

    Parameters
    ----------
    container : module, list, tuple or mapping
        Holds the weights.
    store : Store
        The averages.
    names : Names
        What became of the other names when the average was built.
    lenient : bool
        Accept tensors that are new or unfrozen: to take back an average that was applied before.
    write : bool
        The weights are about to be written.
    leaves : Leaves, optional
        The container's, if it was just looked at.

    Raises
    ------
    LayoutError
        Naming every tensor that was added, removed, renamed, reshaped, untied, or unfrozen.
    BridgeError, DTypeError
        For a tensor of the average that cannot be described any more.
    """

    def __init__(
        self,
        container: Any,
        store: Store,
        names: Names,
        *,
        lenient: bool = False,
        write: bool = False,
        leaves: Leaves | None = None,
    ) -> None:
        leaves = leaves_of(container) if leaves is None else leaves
        entries = store.sets[0]
        for one in leaves.opaque:
            if one.name in entries:
                raise one.error
        found = {leaf.name: leaf for leaf in leaves.items}
        gone = _gone_or_reshaped(found, entries)
        problems = [*gone.values(), *_untied(found, names.aliases)]
        if not lenient:
            problems += _new_or_unfrozen(leaves, entries, names)
        refuse_divided_otherwise(found, entries)
        if problems:
            advice = "Build a new average for the changed model."
            if gone.keys() & names.buffers:
                advice = (
                    "A buffer that changes its shape, or is None at times: register it with "
                    f"persistent=False, or build the average with buffers='skip'.\n{advice}"
                )
            raise LayoutError(
                f"the model no longer matches the average:\n{listed(problems)}\n{advice}"
            )
        self.container = container
        self.lenient = lenient
        pairs = store.pairs({name: found[name].spec for name in entries})
        for pair in pairs:
            check_pair(pair)
            refuse_shared_elements(pair.name, pair.src)
        weights = [(pair.name, pair.src) for pair in pairs if not pair.which]
        averages = [(f"average of {pair.name}", pair.dst) for pair in pairs]
        refuse_overlap(
            averages + [one for one in weights if one[1].writable],
            [one for one in weights if not one[1].writable],
        )
        self.fixed = [
            name for name, spec in weights if not (spec.writable or can_be_assigned(spec))
        ]
        self.structure = leaves.structure
        self.names = leaves.names
        self._locator = Locator(leaves, container) if leaves.moving else None
        self._located: Located | None = None
        if leaves.moving:  # what is only ever replaced must not be kept: a copy of the model
            pairs = [_let_go(pair) if pair.name in self.fixed else pair for pair in pairs]
        self.weights = {pair.name: pair.src for pair in pairs if not pair.which}
        self._guard = Guard(averages, weights) if leaves.moving else None
        self.homes = {pair.src.device: pair.src.home for pair in pairs}
        self._pairs = pairs
        self._numbers: dict[tuple[str, int], int] = {}
        self._averaged = {name for name, entry in entries.items() if entry.averaged}
        roles = leaves.roles
        self._trained = {name for name in self._averaged if roles[name] != "buffer"}
        averaged = [pair for pair in pairs if pair.name in self._averaged]
        self.program = Program(
            {"averaged": averaged, "copied": [p for p in pairs if p.name not in self._averaged]}
        )
        self._look: Program | None = None
        self._write_watch: WriteWatch | None = None
        self._exchanges: dict[int, Exchange] = {}
        kept = [] if leaves.moving else [leaf for leaf in leaves.items if leaf.persistent]
        self._owners = [leaf.spec.owner for leaf in kept]
        self._elements = [*container] if isinstance(container, list) else []
        watched = leaves.only({*entries, *names.aliases})
        self._watch = None if leaves.moving else watch(watched, transient=False)
        self._share = 0
        self._kept: list[Any] = []
        still = names.still
        self._frozen = [
            leaf.spec.owner for leaf in leaves.items if leaf.name in still and leaf.role == "frozen"
        ]
        if leaves.moving and not self.locate(container, write=write):
            raise LayoutError("the tensors change while they are looked at, by another thread")

    # -- tensors that move ------------------------------------------------------------------------

    @property
    def moving(self) -> bool:
        """Whether the tensors have to be located before every use."""
        return self._locator is not None

    def locate(self, container: Any, *, write: bool = False) -> bool:
        """Find the tensors where they are now, until :meth:`release`; False if they are others.

        Parameters
        ----------
        container : object
            This binding's, or one of its structure.
        write : bool
            They are about to be written.

        Raises
        ------
        LayoutError
            If one of them has come to lie in an average's memory.
        """
        assert self._locator is not None
        assert self._guard is not None
        located = self._locator.locate(container, write=write)
        if located is None:
            return False
        if self._guard.touched(None, located.addresses):
            here = {name: spec.at(located.addresses[name]) for name, spec in self.weights.items()}
            averages = [(f"average of {pair.name}", pair.dst) for pair in self._pairs]
            refuse_overlap(averages, list(here.items()))
        self.container, self._located = container, located
        self.program.relocate(src=located.addresses)
        return True

    def notify_used(self) -> None:
        """Note that the average has followed the weights as they are now."""
        if self._locator is not None and self._located is not None:
            self._locator.notify_used(self._located)

    def refuse_used(self) -> None:
        """Refuse weights that never change and that the average has followed already.

        Raises
        ------
        ArgumentError
        """
        if self._locator is not None and self._located is not None:
            self._locator.refuse_used(self._located, "ema.update(params)")

    def release(self) -> None:
        """Let go of memory that is the framework's to reuse."""
        self._located = None

    def _now(self, pair: Pair) -> Pair:
        if self._located is None:
            return pair
        return pair._replace(src=pair.src.at(self._located.addresses[pair.name]))

    # -- pairs ------------------------------------------------------------------------------------

    def pair(self, name: str, which: int) -> Pair:
        """A tensor's pair in one of the averages."""
        if not self._numbers:
            self._numbers = {(p.name, p.which): number for number, p in enumerate(self._pairs)}
        return self._now(self._pairs[self._numbers[name, which if name in self._averaged else 0]])

    def has_stayed(self, name: str) -> bool:
        """Whether the memory of one of the weights is where it was; of tensors that do not move."""
        spec = self.weights[name]
        try:
            return not self.moving and describe(spec.owner) == spec
        except FastemaError:  # it has no memory now
            return False

    def of(self, which: int) -> list[Pair]:
        """The pairs of one average, with those that are only copied."""
        return [
            self._now(pair)
            for pair in self._pairs
            if pair.name not in self._averaged or pair.which == which
        ]

    def exchanged(self, which: int) -> Tagged:
        """The pairs of one average, as they are exchanged with the model.

        Raises
        ------
        LayoutError
            For weights that cannot be written.
        """
        if self.fixed:
            raise LayoutError(
                "arrays that never change (of JAX, read-only NumPy) cannot hold the average in "
                "turn: 'with ema.swapped() as weights:' and ema.averaged() give new arrays\n"
                + listed(repr(name) for name in self.fixed)
            )
        return exchanged(self.of(which))

    def exchange(self, which: int) -> Exchange:
        """What puts one of the averages into the model; kept, where it holds no weights."""
        found = self._exchanges.get(which)
        if found is None:
            found = Exchange(which, self.exchanged(which))
            if not (found.keeps or self.moving):
                self._exchanges[which] = found
        return found

    def not_finite(self) -> list[str]:
        """Names of weights, and of floats that are copied, that hold a NaN or an infinity.

        A copy that holds one already, such as a mask of infinities, is not looked at.
        """
        if self._look is None:
            copied = [p for p in self._pairs if p.name not in self._averaged and p.src.kind.real]
            odd = _not_finite([Pair(p.name, p.dst, p.dst) for p in copied])
            self._looked_at = self._averaged | {p.name for p in copied} - {*odd}
            self._look = Program({"all": self._sources()})
        elif self._located is not None:
            self._look.relocate(self._located.addresses, self._located.addresses)
        self._look.run({"all": "finite"})
        return [] if self._look.all_finite() else _not_finite(self._sources())

    def _sources(self) -> list[Pair]:
        # On both sides: the averages have no part in it.
        now = [self._now(p) for p in self._pairs if p.name in self._looked_at and not p.which]
        return [Pair(p.name, p.src, p.src) for p in now]

    def capturing(self) -> bool:
        """Whether work on the weights' devices is being captured into a graph.

        Raises
        ------
        DeviceError
            In a forked process that cannot use them.
        """
        homes = [home for home in self.homes.values() if home is not None]
        if homes:
            refuse_forked()  # a framework that is asked for its stream says it less clearly
        return any(home.capturing() for home in homes)

    def wait(self) -> None:
        """Wait for the weights' devices."""
        for home in self.homes.values():
            if home is not None:
                home.wait()

    def holds(self, container: Any) -> bool:
        """Whether this is the container, or a list of the same tensors or modules."""
        if container is self.container:
            return True
        if self.moving:
            return False
        return (
            isinstance(container, list)
            and len(container) == len(self._elements)
            and all(one is other for one, other in zip(container, self._elements, strict=True))
        )

    def same_memory(self, other: Binding) -> bool:
        """Whether another container's weights are these."""
        if self.moving:  # where they lie says nothing
            ours, theirs = self.weights.values(), other.weights.values()
            return all(one.owner is two.owner for one, two in zip(ours, theirs, strict=True))
        return self.weights == other.weights

    @property
    def write_watch(self) -> WriteWatch:
        """What notices writes to the weights while they hold an average."""
        if self._write_watch is None:
            self._write_watch = WriteWatch(self.weights, self._trained)
        return self._write_watch

    def changed(self) -> bool:
        """Whether the model's tensors are no longer where they were, or one was unfrozen."""
        assert self._watch is not None
        return self._watch.changed() or any(one.requires_grad for one in self._frozen)

    def sampled(self) -> bool:
        """The same of a share of the tensors, the next one at every call."""
        if not self._kept:
            # What is not looked at may have been replaced: the memory that it had must stay.
            self._kept = [bridge_of(one).alias(one) for one in self._owners]
            return self.changed()
        assert self._watch is not None
        share, self._share = self._share, (self._share + 1) % SHARES
        frozen = self._frozen[share::SHARES]
        return self._watch.changed_in(share) or any(one.requires_grad for one in frozen)
