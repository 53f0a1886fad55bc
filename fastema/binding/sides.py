"""One side of a binding: how its tensors are found when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, Final, NamedTuple, Protocol
from weakref import ref

from fastema.bridges.moving import Located, Locator
from fastema.bridges.registry import bridge_of
from fastema.engine.watch import SHARES, watch
from fastema.layout.spec import Leaves

__all__ = ["NOTHING", "STAYED", "Moving", "Owned", "Sampled", "Side", "Trained", "Watched"]

NOTHING: Final = Leaves([], lambda owner: owner)
"""The leaves of memory of ours: there is nothing to look at."""

STAYED: Final = Located({}, [])
"""The tensors are where they were when they were looked at."""


class Trained(NamedTuple):
    """A parameter that is treated by whether it is trained, and whether it was."""

    owner: Any
    before: bool


class Side(Protocol):
    """Finds the tensors of one side; ``leaves`` are those that are watched."""

    leaves: Leaves

    def find(self, container: Any, *, write: bool) -> Located | None:
        """Return where they lie, or None if they are not the ones that were looked at.

        ``write`` says that they are about to be written.
        """

    def refuse_used(self, located: Located, instead: str) -> None:
        """Refuse arrays that never change and that the latest call has used."""

    def notify_used(self, located: Located) -> None:
        """Note that a call has used the arrays."""


class Owned:
    """Memory of ours, which stays where it is; its values may change, so it is never used up."""

    leaves = NOTHING

    def find(self, container: Any, *, write: bool) -> Located | None:
        """Return that they stayed."""
        return STAYED

    def refuse_used(self, located: Located, instead: str) -> None:
        """Refuse nothing."""

    def notify_used(self, located: Located) -> None:
        """Note nothing."""


class Watched(Owned):
    """Tensors that stay until somebody replaces them (torch, NumPy).

    With ``transient``, what a module's own state leaves out is watched as well.
    """

    def __init__(
        self, leaves: Leaves, container: Any, trained: Sequence[Trained], *, transient: bool
    ) -> None:
        self._watch = watch(leaves, transient=transient)
        self._trained = trained
        self.leaves = leaves
        self._elements = [*container] if isinstance(container, list) else None
        try:  # a weak reference: the surface decides what keeps the model alive
            self._container: Callable[[], Any] = ref(container)
        except TypeError:
            self._container = lambda: container

    def find(self, container: Any, *, write: bool) -> Located | None:
        """See :class:`Side`."""
        return None if not self._is_same_container(container) or self.changed() else STAYED

    def _is_same_container(self, container: Any) -> bool:
        """Return whether this is the container, or a list of the same objects."""
        if container is self._container():
            return True
        elements = self._elements
        return (
            elements is not None
            and isinstance(container, list)
            and len(container) == len(elements)
            and all(map(is_, container, elements))
        )

    def changed(self) -> bool:
        """Return whether a tensor moved or was replaced, or is trained now and was not."""
        trained = self._trained
        return self._watch.changed() or (bool(trained) and _changed(trained))


def _changed(trained: Sequence[Trained]) -> bool:
    return any(one.requires_grad is not before for one, before in trained)


class Sampled(Watched):
    """The same, looking at one share of :data:`SHARES` at each call."""

    def __init__(
        self, leaves: Leaves, container: Any, trained: Sequence[Trained], *, transient: bool
    ) -> None:
        super().__init__(leaves, container, trained, transient=transient)
        self._share = 0
        self._full = 2  # as the average begins, and at the first update
        # A tensor that is not looked at may be replaced: the memory that it had must stay.
        self._kept = [bridge_of(leaf.spec.owner).alias(leaf.spec.owner) for leaf in leaves.items]

    def find(self, container: Any, *, write: bool) -> Located | None:
        """See :class:`Side`; before a write, and at first, all tensors are looked at."""
        if write:
            return super().find(container, write=write)
        if self._full:
            self._full -= 1
            return super().find(container, write=write)
        share, self._share = self._share, (self._share + 1) % SHARES
        moved = self._watch.changed_in(share) or _changed(self._trained[share::SHARES])
        return STAYED if self._is_same_container(container) and not moved else None


class Moving(Owned):
    """Tensors that lie elsewhere after every step, found at every call (JAX, TensorFlow)."""

    def __init__(self, leaves: Leaves, container: Any) -> None:
        self._locator = Locator(leaves, container)

    def find(self, container: Any, *, write: bool) -> Located | None:
        """See :class:`Side`."""
        return self._locator.locate(container, write=write)

    def refuse_used(self, located: Located, instead: str) -> None:
        """See :class:`Side`."""
        self._locator.refuse_used(located, instead)

    def notify_used(self, located: Located) -> None:
        """See :class:`Side`."""
        self._locator.notify_used(located)
