"""Locate tensors that have new addresses after every optimizer step.

Where arrays are immutable (JAX), or variables get new arrays (TensorFlow, Keras), every tensor has
a new address after an optimizer step. Shapes, dtypes and structure stay. They are read once, and
afterwards only compared while the addresses are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias
from weakref import ref

from fastema.bridges.registry import bridge_of, call_bridge, describe
from fastema.errors import ArgumentError, FastemaError
from fastema.layout.spec import Leaves, TensorSpec

__all__ = ["Finder", "FoundArrays", "Located", "Locator", "finder_of", "has_moving_arrays"]

FoundArrays: TypeAlias = tuple[Sequence[int], Any]
"""Addresses, and the objects that keep the memory at them alive."""

Finder: TypeAlias = Callable[[Sequence[Any], bool], FoundArrays | None]
"""``find(arrays, write)`` returns addresses, or None if more than the addresses has changed.

``write`` announces that the caller is about to write to these addresses.
"""


class Located(NamedTuple):
    """Addresses of a container's tensors by name, valid while this object lives."""

    addresses: dict[str, int]
    keepalive: list[Any]


def has_moving_arrays(array: Any) -> bool:
    """Return whether an array belongs to a framework whose arrays move."""
    return hasattr(bridge_of(array), "finder")


def finder_of(specs: Sequence[TensorSpec], arrays: Sequence[Any]) -> Finder:
    """Return a finder for arrays like these, all of one framework."""
    bridge = bridge_of(arrays[0])
    if hasattr(bridge, "finder"):
        found: Finder = bridge.finder(specs, arrays)
        return found

    def find(arrays: Sequence[Any], write: bool) -> FoundArrays | None:
        try:
            now = [describe(array) for array in arrays]
        except FastemaError:
            return None
        return ([spec.address for spec in now], arrays) if now == list(specs) else None

    return find


class Locator:
    """Locates the tensors of a container, or of another one with the same structure.

    ``leaves`` are the container's leaves, with a structure.
    """

    def __init__(self, leaves: Leaves, container: Any) -> None:
        assert leaves.structure is not None
        self._structure = leaves.structure
        self._never_change = all(
            call_bridge("never_changes", leaf.spec.owner, False) for leaf in leaves.items
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
                # None if all arrays belong to one framework: the finder takes them all.
                places if len(groups) > 1 else None,
                [names[i] for i in places],
                finder_of([specs[i] for i in places], [arrays[i] for i in places]),
            )
            for places in groups.values()
        ]

    def locate(self, container: Any, *, write: bool = False) -> Located | None:
        """Return the addresses of a container's tensors; None if its structure has changed.

        Also returns None if tied tensors no longer are, or, with ``write``, if tensors that are not
        tied share memory now.
        """
        arrays = self._structure.flatten(container, write=write)
        if arrays is None:
            return None
        addresses: dict[str, int] = {}
        keepalive = []
        for places, names, find in self._finders:
            found = find(arrays if places is None else [arrays[i] for i in places], write)
            if found is None:
                return None
            addresses.update(zip(names, found[0], strict=True))
            keepalive.append(found[1])
        if any(addresses[name] != addresses[one] for name, one in self._tied):
            return None
        # Tensors that are only read may share memory: variables assigned from the same tensor.
        if write and len({addresses[name] for name in self._apart}) < len(self._apart):
            return None
        return Located(addresses, keepalive)

    def record_used(self, located: Located) -> None:
        """Remember the arrays that a call has used, for :meth:`refuse_used`."""
        if self._never_change:
            self._used = [ref(array) for arrays in located.keepalive for array in arrays]

    def refuse_used(self, located: Located, instead: str) -> None:
        """Raise an ArgumentError if all arrays are immutable and the last call used the same ones.

        Mutable arrays are always accepted: their values may be new. ``instead`` ends the error
        message and says how to pass new arrays.
        """
        arrays = [array for arrays in located.keepalive for array in arrays]
        if self._used and all(map(_refers, self._used, arrays)):
            raise ArgumentError(
                "no new arrays since the last call, and JAX arrays and TensorFlow tensors never "
                f"change: pass the new ones at every step, {instead}"
            )


def _refers(reference: ref[Any], array: Any) -> bool:
    return reference() is array
