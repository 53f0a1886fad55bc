"""Averages of lists of parameters, for classes that are given such lists and keep none of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastema.compat.following import Follower
from fastema.errors import (
    ArgumentError,
    BridgeError,
    CheckpointError,
    DTypeError,
    LayoutError,
    StateError,
    listed,
)
from fastema.plan import PolicyOf

__all__ = ["ListFollower", "Stored", "as_list", "clones", "loaded", "moved", "write"]


def as_list(parameters: Iterable[Tensor], call: str) -> list[Tensor]:
    """The tensors of ``model.parameters()`` or of any other iterable.

    Raises
    ------
    ArgumentError
        For anything else, such as a module.
    """
    found = [] if isinstance(parameters, torch.nn.Module | Tensor) else list(parameters)
    wrong = parameters if isinstance(parameters, torch.nn.Module | Tensor) else None
    wrong = next((one for one in found if not isinstance(one, Tensor)), wrong)
    if wrong is not None:
        raise ArgumentError(
            f"{call}: expected an iterable of tensors, such as model.parameters(), got a "
            f"{type(wrong).__name__}" + (f" in a {type(parameters).__name__}" if found else "")
        )
    return found


def _firsts(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor the place of the first one in the same memory: its own, if it is not tied."""
    places: dict[Any, int] = {}
    found = []
    for at, one in enumerate(tensors):
        key: Any = at
        if one.layout == torch.strided and one.numel() and one.device.type != "meta":
            key = one.device, one.data_ptr(), one.dtype, one.shape, one.stride()
        found.append(places.setdefault(key, at))
    return found


def clones(tensors: Sequence[Tensor], device: torch.device | str | None = None) -> list[Tensor]:
    """Copies, on a device where one is named; one copy for all that are tied to each other."""
    copies: list[Tensor] = []
    for at, (one, first) in enumerate(zip(tensors, _firsts(tensors), strict=True)):
        copy = one.detach().to(device or one.device, copy=True) if first == at else copies[first]
        copies.append(copy)
    return copies


def moved(
    tensors: Sequence[Tensor],
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    non_blocking: bool = False,
) -> list[Tensor]:
    """Tensors on a device, and floats of a dtype; tied ones stay tied."""
    found: dict[int, Tensor] = {}
    for one in tensors:
        if id(one) not in found:
            cast = dtype if one.is_floating_point() else None
            found[id(one)] = one.to(device=device, dtype=cast, non_blocking=non_blocking)
    return [found[id(one)] for one in tensors]


def _refuse_unlike(values: Sequence[Tensor], others: Sequence[Tensor], what: str) -> None:
    if len(values) != len(others):
        raise LayoutError(f"{what}: {len(others)} tensors, expected {len(values)}")
    problems = [
        f"number {at} has shape {list(other.shape)}, expected {list(value.shape)}"
        for at, (value, other) in enumerate(zip(values, others, strict=True))
        if value.shape != other.shape
    ]
    if problems:
        raise LayoutError(f"{what}, by their place in the list:\n" + listed(problems))


def _refuse_unwritable(values: Sequence[Tensor], parameters: Sequence[Tensor], call: str) -> None:
    for at, (value, parameter) in enumerate(zip(values, parameters, strict=True)):
        where = f"{call}, number {at} of the list"
        if parameter.layout != torch.strided or parameter.device.type == "meta":
            raise BridgeError(
                f"{where}: a tensor of layout {parameter.layout} on {parameter.device} has no "
                "plain memory to write to"
            )
        if any(
            n > 1 and not step for n, step in zip(parameter.shape, parameter.stride(), strict=True)
        ):
            raise LayoutError(f"{where}: several indices share one element; pass a clone()")
        if _kind(value) != _kind(parameter):
            raise DTypeError(f"{where}: {value.dtype} cannot become {parameter.dtype}")


def write(values: Sequence[Tensor], parameters: Sequence[Tensor], call: str) -> None:
    """Write values into parameters, rounded to nearest, on whatever devices they are.

    Raises
    ------
    LayoutError, DTypeError, BridgeError
        Naming the tensors by their place; nothing was written then.
    """
    _refuse_unlike(values, parameters, call)
    _refuse_unwritable(values, parameters, call)
    firsts = [at for at, first in enumerate(_firsts(parameters)) if at == first]
    # A plan would be used once: for a thousand small tensors it takes twenty times as long.
    if firsts:
        torch._foreach_copy_(
            [parameters[at].detach() for at in firsts], [values[at].detach() for at in firsts]
        )


def _kind(one: Tensor) -> tuple[bool, bool]:
    return one.is_floating_point(), one.is_complex()


def loaded(
    saved: Any, current: Sequence[Tensor], name: str, devices: Sequence[torch.device] | None = None
) -> list[Tensor]:
    """Copies of saved tensors, of the wider of the dtypes that they and the present ones have.

    Parameters
    ----------
    saved : list of Tensor
        Of a state.
    current : sequence of Tensor
        What they take the place of.
    name : str
        Of the entry of the state.
    devices : sequence of torch.device, optional
        By default those of the present tensors.

    Raises
    ------
    CheckpointError
        If it is no list of tensors.
    LayoutError
        Listing what differs in number, shape or kind.
    """
    if not isinstance(saved, list | tuple) or not all(isinstance(one, Tensor) for one in saved):
        raise CheckpointError(f"{name!r} of the state: expected a list of tensors")
    _refuse_unlike(current, saved, f"{name!r} of the state")
    problems = [
        f"number {at} is {one.dtype}, expected {old.dtype}"
        for at, (one, old) in enumerate(zip(saved, current, strict=True))
        if (one.is_floating_point(), one.is_complex())
        != (old.is_floating_point(), old.is_complex())
    ]
    if problems:
        raise LayoutError(f"{name!r} of the state, by place:\n" + listed(problems))
    firsts = _firsts(current)
    made: list[Tensor] = []
    for at, (one, old) in enumerate(zip(saved, current, strict=True)):
        if firsts[at] != at:
            made.append(made[firsts[at]])
            continue
        device = old.device if devices is None else devices[at]
        dtype = torch.promote_types(one.dtype, old.dtype)
        made.append(one.detach().to(device, dtype, copy=True))
    return made


class ListFollower:
    """Updates averages in a list from a list of parameters, which it does not keep alive.

    The plan is made over other tensor objects of the parameters' memory. They are let go when one
    of the parameters is, and made anew when one was re-pointed, cast, moved or replaced.

    Attributes
    ----------
    lent : list of Tensor or None
        The parameters that hold the average, inside a block of :meth:`swapped`.
    """

    def __init__(self) -> None:
        self.lent: list[Tensor] | None = None
        self._shadow: list[Tensor] = []
        self._copied: frozenset[int] = frozenset()
        self._forget()

    def __reduce__(self) -> Any:
        """Copied and pickled as a new one: what it knows is about memory."""
        self.refuse_lent("copying it")
        return type(self), ()

    def refuse_lent(self, call: str) -> None:
        """Refuse what would read or write an average that is not there, but in the parameters."""
        if self.lent is not None:
            raise StateError(
                f"{call} while the parameters hold the average: leave the block that put it there "
                "first"
            )

    def _forget(self) -> None:
        self._memory: list[Tensor] = []
        self._references: list[weakref.ref[Tensor]] = []
        self._follower: Follower | None = None

    def _at(self, shadow: list[Tensor], parameters: list[Tensor]) -> tuple[Follower, list[Tensor]]:
        """What follows, and the memory that it follows, looked up anew where it has to be."""
        if len(shadow) != len(parameters):
            raise LayoutError(
                f"{len(parameters)} parameters were given, the average is of {len(shadow)}: give "
                "all that it was built from, in the same order"
            )
        if len(shadow) != len(self._shadow) or not all(map(is_, shadow, self._shadow)):
            self._shadow[:] = shadow
        memory = self._memory
        if not _is_of(memory, parameters):
            self._memory = [parameter.detach() for parameter in parameters]
            self._references = _watched(self, parameters)
        if self._follower is None:
            self._follower = Follower(self._shadow, _copying(self._copied))
        return self._follower, self._memory

    def update(
        self,
        shadow: list[Tensor],
        parameters: list[Tensor],
        weight: float,
        step: int,
        copied: frozenset[int] = frozenset(),
    ) -> None:
        """``shadow += weight * (x - shadow)``, and what is at the places ``copied`` is copied.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors by their place; nothing was written then.
        StateError
            Inside :meth:`swapped`.
        """
        self.refuse_lent("updating the average")
        if copied != self._copied:
            self._copied, self._follower = copied, None
        try:
            follower, memory = self._at(shadow, parameters)
            follower.update(memory, weight, step)
        except BaseException:
            self._forget()  # tensors that it refuses are not to be kept
            raise

    @contextmanager
    def swapped(self, shadow: list[Tensor], parameters: list[Tensor]) -> Iterator[None]:
        """A block in which the parameters hold the average; the raw weights come back exactly.

        Also into parameters that were moved, cast or re-pointed inside the block.
        """
        self.refuse_lent("putting the average into the parameters")
        follower, memory = self._at(shadow, parameters)
        try:
            block = follower.swapped(memory)
        except BaseException:  # before anything was written
            self._forget()
            raise
        try:
            with block:
                self.lent = parameters
                yield
        finally:
            self.lent = None
            _follow(parameters, memory)

    def averages(self) -> list[Tensor]:
        """Copies of the averages, while the parameters hold them."""
        assert self._follower is not None
        return list(self._follower.averages().values())


def _copying(copied: frozenset[int]) -> PolicyOf:
    # No method of the follower's: they would keep each other, and memory of a GPU with them.
    return lambda name, role: "copy" if int(name) in copied else "average"


def _is_of(memory: list[Tensor], parameters: list[Tensor]) -> bool:
    """Whether these tensors and those have storage, place, shape, strides and dtype in common."""
    try:
        return len(memory) == len(parameters) and all(map(Tensor.is_set_to, memory, parameters))
    except NotImplementedError:  # of tensors that have no storage
        return False


def _follow(parameters: list[Tensor], memory: list[Tensor]) -> None:
    """Write into parameters that lie elsewhere by now what is in the memory that they had."""
    elsewhere = [not _is_of([one], [other]) for one, other in zip(memory, parameters, strict=True)]
    if any(elsewhere):
        write(
            list(compress(memory, elsewhere)),
            list(compress(parameters, elsewhere)),
            "the raw weights",
        )


def _watched(follower: ListFollower, parameters: list[Tensor]) -> list[weakref.ref[Tensor]]:
    """References that make a follower let go of the memory of parameters that are gone.

    Of tensors that are no parameters, such as ``p.data``, there are others at every call.
    """
    me = weakref.ref(follower)

    def gone(_: object) -> None:
        one = me()
        if one is not None:
            one._forget()

    return [weakref.ref(one, gone) for one in parameters if isinstance(one, torch.nn.Parameter)]


class Stored:
    """Notices that parameters hold the average in place of weights that were stored.

    The weights themselves are their owner's.
    """

    def __init__(self) -> None:
        self.restored()

    def __reduce__(self) -> Any:
        """Copied and pickled as a new one: the parameters are those of this process."""
        return type(self), ()

    def restored(self) -> None:
        """The weights are back, or given up."""
        self._of: list[weakref.ref[Tensor]] = []
        self._overwritten = False

    def stored(self, parameters: Sequence[Tensor]) -> None:
        """The weights of these were stored."""
        self._of, self._overwritten = [weakref.ref(one) for one in parameters], False

    def overwritten(self, parameters: Sequence[Tensor]) -> None:
        """These hold the average now."""
        self._overwritten = self._overwritten or self._are(parameters)

    def _are(self, parameters: Sequence[Tensor]) -> bool:
        return len(parameters) == len(self._of) > 0 and all(
            reference() is one for reference, one in zip(self._of, parameters, strict=True)
        )

    def refuse_loss(self, name: str) -> None:
        """Refuse to store others in the place of weights that are nowhere else."""
        if self._overwritten and any(reference() is not None for reference in self._of):
            raise StateError(
                "store() while parameters hold the average since copy_to() would lose the weights "
                f"that were stored before: restore() them first, or set {name} to None if they are "
                "not wanted back"
            )
