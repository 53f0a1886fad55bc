"""Tensors that lie elsewhere after every step, located again at every call.

Where arrays never change (JAX), or variables are given new ones (TensorFlow, Keras), the step of an
optimizer moves everything. Shape, dtype and structure stay: they are looked at once, and then only
compared while the addresses are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias
from weakref import ref

from fastema.bridges.registry import ask, bridge_of, describe
from fastema.errors import ArgumentError, FastemaError
from fastema.layout.spec import Leaves, TensorSpec

__all__ = ["Finder", "Found", "Located", "Locator", "finder_of", "moves"]

Found: TypeAlias = tuple[Sequence[int], Any]
"""Addresses, and the objects that keep the memory there alive."""

Finder: TypeAlias = Callable[[Sequence[Any], bool], Found | None]
"""``find(arrays, write)``: where arrays lie; None if more than their addresses has changed.

With ``write`` they are about to be written, there and then.
"""


class Located(NamedTuple):
    """Addresses of a container's tensors, by name, valid while this object is kept."""

    addresses: dict[str, int]
    kept: list[Any]


def moves(array: Any) -> bool:
    """Return whether an array is of a framework whose arrays move."""
    return hasattr(bridge_of(array), "finder")


def finder_of(specs: Sequence[TensorSpec], arrays: Sequence[Any]) -> Finder:
    """Return a finder of arrays like these, which are of one framework."""
    bridge = bridge_of(arrays[0])
    if hasattr(bridge, "finder"):
        found: Finder = bridge.finder(specs, arrays)
        return found

    def find(arrays: Sequence[Any], write: bool) -> Found | None:
        try:
            now = [describe(array) for array in arrays]
        except FastemaError:
            return None
        return ([spec.address for spec in now], arrays) if now == list(specs) else None

    return find


class Locator:
    """Finds the tensors of a container again, in this one or another of its structure.

    ``leaves`` are those of the container, with a structure.
    """

    def __init__(self, leaves: Leaves, container: Any) -> None:
        assert leaves.structure is not None
        self._structure = leaves.structure
        self._never_change = all(
            ask("never_changes", leaf.spec.owner, False) for leaf in leaves.items
        )
        self._used: list[ref[Any]] = []
        arrays = leaves.structure.flatten(container) or ()
        names, specs = leaves.names, [leaf.spec for leaf in leaves.items]
        first: dict[int, str] = {}
        self._tied = [
            (name, first[spec.address])
            for name, spec in zip(names, specs, strict=True)
            if spec.size and first.setdefault(spec.address, name) != name
        ]
        self._apart = list(first.values())
        groups: dict[ModuleType, list[int]] = {}
        for place, array in enumerate(arrays):
            groups.setdefault(bridge_of(array), []).append(place)
        self._finders = [
            (
                # Without places where all arrays are of one framework: nothing is to be picked out.
                places if len(groups) > 1 else None,
                [names[i] for i in places],
                finder_of([specs[i] for i in places], [arrays[i] for i in places]),
            )
            for places in groups.values()
        ]

    def locate(self, container: Any, *, write: bool = False) -> Located | None:
        """Locate the tensors of a container; None if it is built in another way.

        It also is if other tensors are tied than were, or if two that are to be written share
        memory now.
        """
        arrays = self._structure.flatten(container, write=write)
        if arrays is None:
            return None
        addresses: dict[str, int] = {}
        kept = []
        for places, names, find in self._finders:
            found = find(arrays if places is None else [arrays[i] for i in places], write)
            if found is None:
                return None
            addresses.update(zip(names, found[0], strict=True))
            kept.append(found[1])
        if any(addresses[name] != addresses[one] for name, one in self._tied):
            return None
        # Tensors that are only read may share memory: variables that were assigned one tensor.
        if write and len({addresses[name] for name in self._apart}) < len(self._apart):
            return None
        return Located(addresses, kept)

    def notify_used(self, located: Located) -> None:
        """Note the arrays that a call has used, for :meth:`refuse_used`."""
        if self._never_change:
            self._used = [ref(array) for arrays in located.kept for array in arrays]

    def refuse_used(self, located: Located, instead: str) -> None:
        """Refuse arrays that never change and that the latest call has used already.

        Arrays that may change are never refused: their values may be new. ``instead`` says in the
        error how to give new ones.
        """
        arrays = [array for arrays in located.kept for array in arrays]
        if self._used and all(map(_refers, self._used, arrays)):
            raise ArgumentError(
                "no new arrays since the latest call, and arrays of JAX and tensors of TensorFlow "
                f"never change: give the new ones at every step, {instead}"
            )


def _refers(reference: ref[Any], array: Any) -> bool:
    return reference() is array
