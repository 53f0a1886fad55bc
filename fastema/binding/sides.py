"""Locate the tensors of one side of a binding: an average's or a model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from typing import Any, Final, NamedTuple, Protocol
from weakref import ref

from fastema.bridges.moving import Located, Locator
from fastema.engine.watch import watch
from fastema.layout.spec import Leaves

__all__ = [
    "NO_LEAVES",
    "UNMOVED",
    "FreezeState",
    "MovingSide",
    "OwnedSide",
    "Side",
    "WatchedSide",
]

NO_LEAVES: Final = Leaves([], lambda owner: owner)
"""Leaves of a side whose memory fastema owns: there is nothing to watch."""

UNMOVED: Final = Located({}, [])
"""Result for tensors that have not moved since they were matched."""


class FreezeState(NamedTuple):
    """A parameter whose treatment depends on ``requires_grad``, and its value when matched."""

    owner: Any
    before: bool


class Side(Protocol):
    """Locates the tensors of one side; ``leaves`` are the watched ones."""

    leaves: Leaves

    def find(self, container: Any, *, write: bool) -> Located | None:
        """Return the tensors' locations; None if they must be matched again.

        Set ``write`` if the tensors are about to be written.
        """

    def is_watching(self, container: Any) -> bool:
        """Return whether this is the container itself that was matched."""

    def is_same_container(self, container: Any) -> bool:
        """Return whether this is the container as matched, or a list of the same objects."""

    def refuse_used(self, located: Located, instead: str) -> None:
        """Refuse immutable arrays that the latest call has used already."""

    def record_used(self, located: Located) -> None:
        """Record that a call has used the arrays."""

    @property
    def tasks(self) -> Sequence[int]:
        """Addresses of compiled checks that find whether tensors moved, see :class:`Watch`."""

    @property
    def tables(self) -> Any:
        """The memory of compiled checks, see :class:`Watch`; None if there are none."""

    @property
    def checks(self) -> Sequence[Callable[[], bool]]:
        """Further checks, which return True if a tensor moved."""

    @property
    def roots(self) -> Sequence[tuple[Any, Any]]:
        """Objects and the attributes that they must still have, see :class:`Watch`."""


class OwnedSide:
    """Tensors in fastema's own memory, which never move. Using them again is always fine."""

    leaves = NO_LEAVES
    tasks: Sequence[int] = ()
    tables: Any = None
    checks: Sequence[Callable[[], bool]] = ()
    roots: Sequence[tuple[Any, Any]] = ()

    def find(self, container: Any, *, write: bool) -> Located | None:
        """Return :data:`UNMOVED`."""
        return UNMOVED

    def is_watching(self, container: Any) -> bool:
        """Return False: nothing is watched."""
        return False

    def is_same_container(self, container: Any) -> bool:
        """Return False: there is no container to compare with."""
        return False

    def refuse_used(self, located: Located, instead: str) -> None:
        """Do nothing: the memory is mutable."""

    def record_used(self, located: Located) -> None:
        """Do nothing: use is not recorded."""


class WatchedSide(OwnedSide):
    """Tensors that stay in place until they are replaced (torch, NumPy).

    With ``transient``, non-persistent buffers are watched as well. With ``keep`` the caller keeps
    the container alive as long as this object.
    """

    def __init__(
        self,
        leaves: Leaves,
        container: Any,
        trained: Sequence[FreezeState],
        *,
        transient: bool,
        keep: bool,
    ) -> None:
        self._watch = watch(leaves, transient=transient, keep=keep)
        # No bound method: that would be a cycle, which keeps the tensors.
        self._refrozen = partial(_is_refrozen, trained)
        self.leaves, self.roots = leaves, self._watch.roots
        self.tasks, self.tables = self._watch.tasks, self._watch.tables
        self.checks = [*self._watch.checks, *([self._refrozen] if trained else [])]
        self._elements = [*container] if isinstance(container, list) else None
        try:  # a weak reference: this object must not keep the model alive
            self._container: Callable[[], Any] = ref(container)
        except TypeError:
            self._container = lambda: container

    def find(self, container: Any, *, write: bool) -> Located | None:
        """See :class:`Side`."""
        if not self.is_same_container(container) or self._watch.changed() or self._refrozen():
            return None
        return UNMOVED

    def is_watching(self, container: Any) -> bool:
        """See :class:`Side`."""
        return container is self._container()

    def is_same_container(self, container: Any) -> bool:
        """See :class:`Side`."""
        if container is self._container():
            return True
        elements = self._elements
        return (
            elements is not None
            and isinstance(container, list)
            and len(container) == len(elements)
            and all(map(is_, container, elements))
        )


def _is_refrozen(trained: Sequence[FreezeState]) -> bool:
    return any(owner.requires_grad is not before for owner, before in trained)


class MovingSide(OwnedSide):
    """Tensors that move at every step and are located at every call (JAX, TensorFlow)."""

    def __init__(self, leaves: Leaves, container: Any) -> None:
        self._locator = Locator(leaves, container)

    def find(self, container: Any, *, write: bool) -> Located | None:
        """See :class:`Side`."""
        return self._locator.locate(container, write=write)

    def refuse_used(self, located: Located, instead: str) -> None:
        """See :class:`Side`."""
        self._locator.refuse_used(located, instead)

    def record_used(self, located: Located) -> None:
        """See :class:`Side`."""
        self._locator.record_used(located)
