"""Averages of lists of parameters, for classes that receive such lists and keep none of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import repeat
from operator import is_
from typing import Any, ClassVar, Final, Literal, NamedTuple

import torch
from torch import Tensor

from fastema.bridges.registry import describe, is_divided
from fastema.bridges.torch_parts import refuse_zero3
from fastema.compat.averager import ModelAverager
from fastema.errors import (
    ArgumentError,
    BridgeError,
    CheckpointError,
    DTypeError,
    FastemaError,
    LayoutError,
    StateError,
    format_problems,
)
from fastema.layout.spec import Role

__all__ = [
    "ListAverage",
    "StoredWeights",
    "as_list",
    "clone_list",
    "load_list",
    "move_list",
    "write",
]

_PLANS: Final = 4
"""Plans to cache, one for each set of frozen parameters; scripts may alternate between sets."""

_NOTHING: Final = torch.empty(0)


def as_list(parameters: Iterable[Tensor], call: str) -> list[Tensor]:
    """Return a list of an iterable's tensors; raise an ArgumentError for anything else."""
    iterable = isinstance(parameters, Iterable) and not isinstance(parameters, Tensor)
    found = list(parameters) if iterable else []
    wrong: Any = next((one for one in found if not isinstance(one, Tensor)), None)
    wrong = wrong if iterable else parameters
    if wrong is not None:
        raise ArgumentError(
            f"{call}: expected an iterable of tensors, such as model.parameters(), got a "
            f"{type(wrong).__name__}" + (f" in a {type(parameters).__name__}" if found else "")
        )
    if any(is_divided(one) for one in found):
        raise ArgumentError(
            f"{call}: these parameters are DTensors (FSDP2, tensor parallel), which an average of "
            "a list does not support; use fastema.EMA(model), which does (docs/sharded.md)"
        )
    for at, one in enumerate(found):
        refuse_zero3(one, gathered=False, name=f"{call}, number {at} of the list: ")
    return found


def _find_distinct(tensors: Iterable[Tensor]) -> list[int]:
    """Return the places of the tensors; of tensors in the same memory, only the first one's."""
    found: dict[Any, int] = {}
    for at, one in enumerate(tensors):
        key: Any = at
        # Distributed tensors, and tensors without data, have no address.
        if one.layout == torch.strided and one.numel() and one.data_ptr():
            key = one.device, one.data_ptr(), one.dtype, one.shape, one.stride()
        found.setdefault(key, at)
    return list(found.values())


def clone_list(tensors: Sequence[Tensor], device: torch.device | str | None = None) -> list[Tensor]:
    """Return copies, on ``device`` if given. Tied tensors get a copy each, as in the peers."""
    return [one.detach().to(device or one.device, copy=True) for one in tensors]


def move_list(
    tensors: Sequence[Tensor],
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
    non_blocking: bool = False,
) -> list[Tensor]:
    """Return tensors on a device, with floating-point tensors cast to a dtype."""
    return [
        one.to(
            device=device,
            dtype=dtype if one.is_floating_point() else None,
            non_blocking=non_blocking,
        )
        for one in tensors
    ]


def _kind(one: Tensor) -> tuple[bool, bool]:
    return one.is_floating_point(), one.is_complex()


def _check_shapes(values: Sequence[Tensor], others: Sequence[Tensor], what: str) -> None:
    if len(values) != len(others):
        raise LayoutError(f"{what}: {len(others)} tensors, expected {len(values)}")
    problems = [
        f"number {at} has shape {list(other.shape)}, expected {list(value.shape)}"
        for at, (value, other) in enumerate(zip(values, others, strict=True))
        if value.shape != other.shape
    ]
    if problems:
        raise LayoutError(f"{what}, by their place in the list:\n" + format_problems(problems))


def _refuse_unwritable(values: Sequence[Tensor], parameters: Sequence[Tensor], call: str) -> None:
    for at, (value, parameter) in enumerate(zip(values, parameters, strict=True)):
        where = f"{call}, number {at} of the list"
        plain = parameter.layout == torch.strided and parameter.device.type != "meta"
        if not plain or parameter.is_conj() or parameter.is_neg():
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
    """Write values into parameters, rounded to nearest; devices may differ.

    Like the peers, it does not notify autograd: a graph that needs the parameters is correct again
    once they have their values back. Errors name tensors by place; nothing is written then.
    """
    _check_shapes(values, parameters, call)
    _refuse_unwritable(values, parameters, call)
    # No plan: it would be used only once, and takes 20 times as long for 1,000 small tensors.
    if places := _find_distinct(parameters):
        torch._foreach_copy_(
            [parameters[at].data for at in places], [values[at].detach() for at in places]
        )


def load_list(
    saved: Any, current: Sequence[Tensor], name: str, devices: Sequence[torch.device] | None = None
) -> list[Tensor]:
    """Return copies of saved tensors, each in the wider of its dtype and the current tensor's.

    The copies are on ``devices``, by default those of the current tensors.
    """
    if not isinstance(saved, list | tuple) or not all(isinstance(one, Tensor) for one in saved):
        raise CheckpointError(f"{name!r} of the state: expected a list of tensors")
    _check_shapes(current, saved, f"{name!r} of the state")
    problems = [
        f"number {at} is {one.dtype}, expected {old.dtype}"
        for at, (one, old) in enumerate(zip(saved, current, strict=True))
        if _kind(one) != _kind(old)
    ]
    if problems:
        raise LayoutError(f"{name!r} of the state, by place:\n" + format_problems(problems))
    devices = [old.device for old in current] if devices is None else devices
    return [
        one.detach().to(device, torch.promote_types(one.dtype, old.dtype), copy=True)
        for one, old, device in zip(saved, current, devices, strict=True)
    ]


class _ListAverager:
    """Updates averages in a list from as many parameters, which it does not keep alive.

    Plans use private tensors, which share the parameters' memory during an update and are empty
    between updates. Weak references instead would prevent torch from swapping tensors, which
    ``model.to()`` does after ``torch.__future__.set_swap_module_params_on_conversion(True)``.
    """

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> Any:
        """Copy and pickle it as a new averager: all its state is bound to memory."""
        return type(self), ()

    def forget(self) -> None:
        """Drop all averages and plans."""
        self._shadow: list[Tensor] = []
        self._memory: list[Tensor] = []
        self._plans: dict[frozenset[int], _ListPlan] = {}

    def update(
        self,
        shadow: list[Tensor],
        parameters: list[Tensor],
        weight: float,
        step: int,
        copied: frozenset[int] = frozenset(),
    ) -> None:
        """Compute ``shadow += weight * (x - shadow)``; copy the tensors at the places ``copied``.

        Errors name the tensors by their place; nothing is written then.
        """
        same = len(shadow) == len(self._shadow) and all(map(is_, shadow, self._shadow))
        if not (same and _share_memory(self._memory, parameters)):
            self.forget()
            self._shadow = list(shadow)
            self._memory = [parameter.detach() for parameter in parameters]
        was_there = copied in self._plans
        try:
            plan = self._plan_for(parameters, copied)
            _check_shapes(
                [shadow[at] for at in plan.without_kernel],
                [parameters[at] for at in plan.without_kernel],
                "those not averaged",
            )
            plan.averager.update(plan.weights, weight, step)
        except BaseException as error:
            self.forget()  # do not keep tensors that were refused
            if not (was_there and isinstance(error, FastemaError)):
                raise
            # The plan was made for another kind of parameters, which may be float8 now: retry.
            self.update(shadow, parameters, weight, step, copied)
            return
        if not _share_memory(self._memory, repeat(_NOTHING, len(parameters))):
            self.forget()
        for at in plan.without_kernel:
            shadow[at].copy_(parameters[at].detach())

    def _plan_for(self, parameters: list[Tensor], copied: frozenset[int]) -> _ListPlan:
        found = self._plans.get(copied)
        if found is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            without_kernel = frozenset(
                at for at in copied if not _has_kernel(self._shadow[at], parameters[at])
            )
            averages, weights = (
                {str(at): one for at, one in enumerate(side) if at not in without_kernel}
                for side in (self._shadow, self._memory)
            )
            # Not a bound method: the reference cycle would keep GPU memory alive.
            averager = ModelAverager(averages, partial(_copy_or_average, copied))
            found = self._plans[copied] = _ListPlan(averager, weights, without_kernel)
        return found


class _ListPlan(NamedTuple):
    """The averager for one set of frozen parameters."""

    averager: ModelAverager
    weights: dict[str, Tensor]
    without_kernel: frozenset[int]  # places of tensors no kernel copies: float8 to float32, sparse


def _share_memory(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Make tensors share the memory of others; return whether torch can do so for all."""
    try:
        for one, other in zip(tensors, others, strict=True):
            one.data = other
    except (RuntimeError, TypeError):  # tensors of other kinds: sparse, fake
        return False
    return True


def _has_kernel(average: Tensor, weight: Tensor) -> bool:
    """Return whether a kernel can copy the weight into the average."""
    try:
        kinds = describe(average).kind, describe(weight).kind
    except (BridgeError, DTypeError):
        return False
    return kinds[0] == kinds[1] or None not in (kinds[0].real, kinds[1].real)


def _copy_or_average(copied: frozenset[int], name: str, role: Role) -> Literal["average", "copy"]:
    return "copy" if int(name) in copied else "average"


class StoredWeights:
    """``store()`` and ``restore()`` of weights, which are kept in an attribute of their owner.

    The attribute ``name`` equals ``nothing`` if no weights are stored. Weak references to storages
    show whether parameters whose weights were stored hold the average now; tensors are not
    referenced, for the reason given in :class:`_ListAverager`.
    """

    def __init__(self, name: str, nothing: Any = None) -> None:
        self._name, self._nothing = name, nothing
        self.forget()

    def __reduce__(self) -> Any:
        """Copy and pickle it as new: the referenced parameters belong to this process."""
        return type(self), (self._name, self._nothing)

    def forget(self) -> None:
        """Drop the references to parameters whose weights were restored or given up."""
        self._storage_references: list[weakref.ref[torch.UntypedStorage]] = []
        self._overwritten = False

    def get_weights(self, owner: Any) -> list[Tensor]:
        """Return the stored weights; raise a StateError if there are none."""
        found: list[Tensor] | None = getattr(owner, self._name)
        if found in (None, self._nothing):
            raise StateError("restore() without store(): there are no weights to put back")
        assert found is not None
        return found

    def _live_storages(self) -> set[int]:
        return {id(reference()) for reference in self._storage_references} - {id(None)}

    def store(self, owner: Any, parameters: Iterable[Tensor], device: Any = None) -> None:
        """Keep copies of parameters; raise a StateError if overwritten weights would be lost."""
        given = as_list(parameters, "store")
        given_up = getattr(owner, self._name) in (None, self._nothing)
        if self._overwritten and self._live_storages() and not given_up:
            raise StateError(
                "store() after copy_to() would lose the weights that were stored before: "
                f"restore() them first, or set {self._name} to {self._nothing} to discard them"
            )
        setattr(owner, self._name, clone_list(given, device))
        self._storage_references, self._overwritten = (
            [weakref.ref(one) for one in _storages(given)],
            False,
        )

    def mark_overwritten(self, parameters: Iterable[Tensor]) -> None:
        """Record that these parameters hold the average now."""
        self._overwritten |= bool(
            self._live_storages() & {id(one) for one in _storages(parameters)}
        )

    def restore(self, owner: Any, parameters: Iterable[Tensor]) -> None:
        """Write the weights back and keep them; raise as :meth:`get_weights`, :func:`write`."""
        weights, given = self.get_weights(owner), as_list(parameters, "restore")
        if len(weights) != len(given):
            raise LayoutError(
                f"restore() was given {len(given)} parameters, store() {len(weights)}: pass the "
                "parameters that were stored, in the same order, without any that were added to "
                "the model since"
            )
        write(weights, given, "restore")
        self.forget()


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    return [one.untyped_storage() for one in tensors if one.layout == torch.strided]


class ListAverage:
    """An average of a list of parameters, in the copies ``shadow_params``, to evaluate with."""

    _stored_as: ClassVar[str]
    """Name of the attribute with the copies that :meth:`store` keeps."""

    _stored_on: ClassVar[str | None] = None
    """Device of these copies; None for the parameters' devices."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._averager, self._stored = _ListAverager(), StoredWeights(self._stored_as)
        self._shadow = clone_list(parameters)
        setattr(self, self._stored_as, None)

    @property
    def shadow_params(self) -> list[Tensor]:
        """The averages."""
        return self._shadow

    @shadow_params.setter
    def shadow_params(self, tensors: Iterable[Tensor]) -> None:
        self._shadow = as_list(tensors, "shadow_params")
        self._averager.forget()

    def _checked_parameters(self, parameters: Iterable[Tensor], call: str) -> list[Tensor]:
        """Return parameters as a list; raise a LayoutError if their number is not the averages'."""
        given = as_list(parameters, call)
        if len(given) != len(self._shadow):
            raise LayoutError(
                f"{call}: {len(given)} parameters were given, but the average has "
                f"{len(self._shadow)}: pass all that it was built from, in the same order"
            )
        return given

    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Write the average into parameters, rounded to their dtypes; raise like an update."""
        weights = as_list(parameters, "copy_to")
        write(self._shadow, weights, "copy_to")
        self._stored.mark_overwritten(weights)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep copies of parameters for :meth:`restore`.

        Raise a StateError if stored weights would be lost that :meth:`copy_to` has overwritten.
        """
        self._stored.store(self, parameters, self._stored_on)

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Write the stored weights back, bit for bit; raise a StateError without :meth:`store`."""
        self._stored.restore(self, parameters)
