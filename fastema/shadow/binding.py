"""An average bound to the memory of one model: pairs, the program over them, and the watch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastema.bridges.registry import written
from fastema.engine.program import Program
from fastema.engine.watch import watch
from fastema.errors import LayoutError, listed
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_unwritable
from fastema.layout.spec import Leaf, Leaves
from fastema.shadow.entries import Entry
from fastema.shadow.exchange import tag_of, tagged

__all__ = ["Binding"]


def _mismatches(
    leaves: Leaves, entries: Mapping[str, Entry], aliases: Mapping[str, str], skipped: set[str]
) -> list[str]:
    found = {leaf.name: leaf for leaf in leaves.items}
    problems = [f"{name!r} is gone from the model" for name in entries if name not in found]
    for name, leaf in found.items():
        if name in entries:
            expected = entries[name].spec.shape
            if leaf.spec.shape != expected:
                problems.append(f"{name!r} is now {list(leaf.spec.shape)}, was {list(expected)}")
        elif name in aliases:
            if aliases[name] in found and leaf.spec != found[aliases[name]].spec:
                problems.append(f"{name!r} was tied to {aliases[name]!r} and no longer is")
        elif name not in skipped:
            problems.append(f"{name!r} is new in the model")
        elif leaf.role == "weight":
            problems.append(f"{name!r} is trained now but was frozen when the average was built")
    return problems


class Binding:
    """Where an average's tensors and a model's tensors lie.

    Parameters
    ----------
    container : module, list, tuple or dict
        Holds the weights.
    entries : mapping of name to Entry
        The average.
    aliases, skipped : see :class:`~fastema.shadow.entries.Selection`

    Raises
    ------
    LayoutError
        Naming every tensor that was added, removed, renamed, reshaped, untied, or unfrozen.
    """

    def __init__(
        self,
        container: Any,
        leaves: Leaves,
        entries: Mapping[str, Entry],
        aliases: Mapping[str, str],
        skipped: set[str],
    ) -> None:
        problems = _mismatches(leaves, entries, aliases, skipped)
        if problems:
            raise LayoutError(
                "the model no longer matches the average:\n"
                + listed(problems)
                + "\nBuild a new average for the changed model."
            )
        self.container = container
        held = {leaf.name: leaf for leaf in leaves.items if leaf.name in entries}
        self.pairs = [
            (Pair(name, entry.spec, held[name].spec), entry.averaged)
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
        self._skipped = [leaf for leaf in leaves.items if leaf.name in skipped]
        self._watch = watch(leaves)

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

    def written(self) -> None:
        """Tell the weights' framework that they were written."""
        for tell, arrays in self._written:
            tell(arrays)

    def changed(self) -> bool:
        """Whether the model's tensors are no longer where they were, or one was unfrozen."""
        return self._watch.changed() or _any_unfrozen(self._skipped)


def _any_unfrozen(skipped: Sequence[Leaf]) -> bool:
    return any(
        leaf.role == "frozen" and getattr(leaf.spec.owner, "requires_grad", False)
        for leaf in skipped
    )
