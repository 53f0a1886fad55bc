"""An average bound to the memory of one model: pairs, the program over them, and the watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastema.bridges.registry import leaves_of, written
from fastema.engine.program import Program
from fastema.engine.watch import watch
from fastema.errors import LayoutError, listed
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_unwritable
from fastema.layout.spec import Leaf, Leaves
from fastema.shadow.entries import Entry, Names
from fastema.shadow.exchange import tag_of, tagged

__all__ = ["Binding"]


def _gone_or_reshaped(found: Mapping[str, Leaf], entries: Mapping[str, Entry]) -> list[str]:
    problems = [f"{name!r} is gone from the model" for name in entries if name not in found]
    for name, entry in entries.items():
        if name in found and found[name].spec.shape != entry.spec.shape:
            now, was = list(found[name].spec.shape), list(entry.spec.shape)
            problems.append(f"{name!r} is now {now}, was {was}")
    return problems


def _untied(found: Mapping[str, Leaf], aliases: Mapping[str, str]) -> list[str]:
    return [
        f"{name!r} was tied to {kept!r} and no longer is"
        for name, kept in aliases.items()
        if name in found and kept in found and found[name].spec != found[kept].spec
    ]


def _new_or_unfrozen(leaves: Leaves, entries: Mapping[str, Entry], names: Names) -> list[str]:
    known = {*entries, *names.aliases, *names.skipped}
    present = [*leaves.names, *(one.name for one in leaves.opaque)]
    problems = [f"{name!r} is new in the model" for name in present if name not in known]
    frozen = {*names.skipped, *names.frozen}
    return problems + [
        f"{leaf.name!r} is trained now but was frozen when the average was built"
        for leaf in leaves.items
        if leaf.role == "weight" and leaf.name in frozen
    ]


class Binding:
    """Where an average's tensors and a model's tensors lie.

    Parameters
    ----------
    container : module, list, tuple or mapping
        Holds the weights.
    entries : mapping of name to Entry
        The average.
    names : Names
        What became of the other names when the average was built.
    lenient : bool
        Accept tensors that are new or unfrozen: to take back an average that was applied before.

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
        entries: Mapping[str, Entry],
        names: Names,
        *,
        lenient: bool = False,
    ) -> None:
        leaves = leaves_of(container)
        for one in leaves.opaque:
            if one.name in entries:
                raise one.error
        found = {leaf.name: leaf for leaf in leaves.items}
        problems = _gone_or_reshaped(found, entries) + _untied(found, names.aliases)
        if not lenient:
            problems += _new_or_unfrozen(leaves, entries, names)
        if problems:
            raise LayoutError(
                "the model no longer matches the average:\n"
                + listed(problems)
                + "\nBuild a new average for the changed model."
            )
        self.container = container
        self.lenient = lenient
        self.pairs = [
            (Pair(name, entry.spec, found[name].spec), entry.averaged)
            for name, entry in entries.items()
        ]
        for pair, _ in self.pairs:
            check_pair(pair)
            refuse_unwritable(pair.name, pair.src)
        refuse_overlap(
            [(f"average of {pair.name}", pair.dst) for pair, _ in self.pairs]
            + [(pair.name, pair.src) for pair, _ in self.pairs]
        )
        self.tagged = tagged(self.pairs)
        self.program = Program(self.tagged)
        self._written = written(pair.src.owner for pair, _ in self.pairs)
        self._owners = [leaf.spec.owner for leaf in leaves.items]
        self._watch = watch(leaves.only({*entries, *names.aliases}))
        frozen = {*names.skipped, *names.frozen}
        self._frozen = [
            leaf.spec.owner
            for leaf in leaves.items
            if leaf.name in frozen and leaf.role == "frozen"
        ]

    def pair(self, name: str) -> tuple[str, Pair]:
        """A tensor's pair, with its tag."""
        for pair, averaged in self.pairs:
            if pair.name == name:
                return tag_of(pair, averaged), pair
        raise KeyError(name)

    def holds(self, container: Any) -> bool:
        """Whether this is the container, or a list of the same tensor objects."""
        if container is self.container:
            return True
        return (
            isinstance(container, list)
            and isinstance(self.container, list)
            and len(container) == len(self._owners)
            and all(one is other for one, other in zip(container, self._owners, strict=True))
        )

    def same_memory(self, other: Binding) -> bool:
        """Whether another container's weights are these."""
        return [pair.src for pair, _ in self.pairs] == [pair.src for pair, _ in other.pairs]

    def written(self) -> None:
        """Tell the weights' framework that they were written."""
        for tell, arrays in self._written:
            tell(arrays)

    def changed(self) -> bool:
        """Whether the model's tensors are no longer where they were, or one was unfrozen."""
        return self._watch.changed() or any(one.requires_grad for one in self._frozen)
