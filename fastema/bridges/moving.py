"""Tensors that lie elsewhere after every step, found again at every call.

Where arrays never change (JAX), or variables are given new ones (TensorFlow, Keras), the step of an
optimizer moves everything. What stays is shape, dtype and structure: looked at once, and then only
compared while the addresses are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias
from weakref import ref

from fastema.bridges.registry import bridge_of, describe
from fastema.errors import ArgumentError, FastemaError
from fastema.layout.spec import Leaves, TensorSpec

__all__ = ["Finder", "Found", "Located", "Locator", "finder_of", "moves"]

Found: TypeAlias = tuple[Sequence[int], Any]
"""Addresses, and what keeps the memory there alive."""

Finder: TypeAlias = Callable[[Sequence[Any], bool], Found | None]
"""``find(arrays, write)``: where arrays lie; None if anything but that is another than it was.

With ``write`` they are about to be written, there and then.
"""


class Located(NamedTuple):
    """Where the tensors of a container lie, by name, as long as this is kept."""

    addresses: dict[str, int]
    kept: list[Any]


def moves(array: Any) -> bool:
    """Whether an array is of a framework whose arrays move."""
    return hasattr(bridge_of(array), "finder")


def _never_changes(array: Any) -> bool:
    bridge = bridge_of(array)
    return hasattr(bridge, "never_changes") and bool(bridge.never_changes(array))


def finder_of(specs: Sequence[TensorSpec], arrays: Sequence[Any]) -> Finder:
    """What finds arrays of one framework again."""
    bridge = bridge_of(arrays[0])
    if hasattr(bridge, "finder"):
        found: Finder = bridge.finder(specs, arrays)
        return found

    def still_there(arrays: Sequence[Any], write: bool) -> Found | None:
        try:
            now = [describe(array) for array in arrays]
        except FastemaError:
            return None
        return ([spec.address for spec in now], arrays) if now == list(specs) else None

    return still_there


class Locator:
    """Finds the tensors of a container again, in this one or another of its structure.

    Parameters
    ----------
    leaves : Leaves
        With a structure.
    container : object
        They are of.
    """

    def __init__(self, leaves: Leaves, container: Any) -> None:
        assert leaves.structure is not None
        self._structure = leaves.structure
        self._names = leaves.names
        self._never_change = all(_never_changes(leaf.spec.owner) for leaf in leaves.items)
        self._used: list[ref[Any]] = []
        first: dict[int, str] = {}
        for leaf in leaves.items:
            if leaf.spec.size:
                first.setdefault(leaf.spec.address, leaf.name)
        held = [(leaf.name, first[leaf.spec.address]) for leaf in leaves.items if leaf.spec.size]
        self._tied = [(name, one) for name, one in held if name != one]
        self._apart = list(first.values())
        arrays = leaves.structure.flatten(container) or ()
        groups: dict[str, list[int]] = {}
        for place, array in enumerate(arrays):
            groups.setdefault(bridge_of(array).__name__, []).append(place)
        self._finders = [
            (places, finder_of([leaves.items[i].spec for i in places], [arrays[i] for i in places]))
            for places in groups.values()
        ]

    def locate(self, container: Any, *, write: bool = False) -> Located | None:
        """Where the tensors of a container lie now; None if it is built in another way.

        Other tensors that are one, or that are to be written and have become one, count as such.

        Raises
        ------
        BridgeError
            For an object that belongs to no known framework.
        """
        arrays = self._structure.flatten(container, write=write)
        if arrays is None:
            return None
        addresses: dict[str, int] = {}
        kept = []
        for places, find in self._finders:
            one_kind = len(self._finders) == 1
            found = find(arrays if one_kind else [arrays[i] for i in places], write)
            if found is None:
                return None
            names = self._names if one_kind else [self._names[i] for i in places]
            addresses.update(zip(names, found[0], strict=True))
            kept.append(found[1])
        if any(addresses[name] != addresses[one] for name, one in self._tied):
            return None
        # What is only read may share memory: variables that were assigned one tensor.
        if write and len({addresses[name] for name in self._apart}) < len(self._apart):
            return None
        return Located(addresses, kept)

    def notify_used(self, located: Located) -> None:
        """Note the arrays that a call has used, for :meth:`refuse_used`."""
        if self._never_change:
            self._used = [ref(array) for arrays in located.kept for array in arrays]

    def refuse_used(self, located: Located, instead: str) -> None:
        """Refuse arrays that never change and that the latest call has used already.

        Arrays that may change are never refused: their values may be new.

        Parameters
        ----------
        located : Located
        instead : str
            How to give new ones, for the error.

        Raises
        ------
        ArgumentError
        """
        arrays = [array for arrays in located.kept for array in arrays]
        if self._used and all(map(_refers, self._used, arrays)):
            raise ArgumentError(
                "no new arrays since the latest call, and arrays of JAX and tensors of TensorFlow "
                f"never change: give the new ones at every step, {instead}"
            )


def _refers(reference: ref[Any], array: Any) -> bool:
    return reference() is array
