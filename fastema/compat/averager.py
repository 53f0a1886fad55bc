"""Averages of a model in tensors that the user owns; shared by the drop-in classes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from fastema.binding.swap import MemorySwap, Swap, copy_applied
from fastema.bridges.registry import leaves_of, list_iterators
from fastema.bridges.torch_parts import refuse_zero3_model
from fastema.engine.blocks import BlockSteps, RestoringBlock
from fastema.errors import LayoutError, StateError, format_problems
from fastema.layout.group import Pair
from fastema.layout.spec import Leaves, Role, TensorSpec
from fastema.plan import Plan, PolicyOf

__all__ = ["ModelAverager", "copy_model"]

Result = TypeVar("Result")


@torch.no_grad()
def copy_model(model: torch.nn.Module, memo: dict[int, Any] | None = None) -> torch.nn.Module:
    """Return a deep copy of a model, made without autograd.

    Autograd would record the copy of a scripted module: its graph would stay alive, and the copy
    would refuse ``requires_grad_(False)``.

    Raises a BridgeError for parameters of ZeRO-3, whose copies would be empty.
    """
    refuse_zero3_model(model)
    return deepcopy(model, memo)


def _average(name: str, role: Role) -> Literal["average"]:
    return "average"


def _tensors(leaves: Leaves) -> dict[str, Tensor]:
    return {leaf.name: leaf.spec.owner for leaf in leaves.items}


class _Plan(Plan):
    """Plan with a function as its policy, which also decides for integers without any floats."""

    _container_labels: ClassVar = ("the average", "the model")
    _keeps_model: ClassVar = False

    def __init__(
        self, avg: Any, x: Any, policy: PolicyOf, *, rounding: str = "nearest", seed: int = 0
    ) -> None:
        self._bind(avg, x, policy, rounding, seed)

    def step_at(self, step: int, x: Any, weight: float) -> bool:
        """Run :meth:`lerp_` as the call with this number; see :meth:`step`."""
        with self.lock:
            self._calls = step
            return self.step("lerp", x, weight)


# -- averages on other devices --------------------------------------------------------------------


class _StagedWeights:
    """Copies of weights on the averages' devices, for weights that are on other devices."""

    def __init__(self, averages: Mapping[str, Tensor], weights: Leaves) -> None:
        # Keep weights without an average: a plan reports them, unless they are skipped.
        self.tensors = _tensors(weights)
        self._first_names = _first_names(averages, weights)
        owners = {leaf.spec: leaf.spec.owner for leaf in weights.items}
        beside = {
            spec: _empty_beside(averages[name], owners[spec])
            for spec, name in self._first_names.items()
        }
        self.tensors |= {
            leaf.name: beside[leaf.spec] for leaf in weights.items if leaf.name in averages
        }

    def fits(self, averages: Mapping[str, Tensor], weights: Leaves) -> bool:
        """Return whether the copies match these names, shapes, dtypes, devices and ties."""
        other = _tensors(weights)
        return (
            self.tensors.keys() == other.keys()
            and list(self._first_names.values()) == list(_first_names(averages, weights).values())
            and all(
                staged.shape == other[name].shape
                and staged.dtype == other[name].dtype
                and (name not in averages or staged.device == averages[name].device)
                for name, staged in self.tensors.items()
            )
        )

    def copy_from(self, weights: Leaves) -> None:
        """Copy the weights. Copies in host memory are complete when this returns."""
        now = _tensors(weights)
        for name in self._first_names.values():
            self.tensors[name].copy_(now[name].detach(), non_blocking=True)
        for context in {leaf.spec.device: leaf.spec.context for leaf in weights.items}.values():
            if context is not None:
                context.wait()


def _first_names(averages: Container[str], weights: Leaves) -> dict[TensorSpec, str]:
    """Return each distinct weight that has an average, with the first of its names."""
    found: dict[TensorSpec, str] = {}
    for leaf in weights.items:
        if leaf.name in averages:
            found.setdefault(leaf.spec, leaf.name)
    return found


def _empty_beside(average: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(
        weight,
        device=average.device,
        # Pinned, so that a GPU copies asynchronously: wait once, not for each tensor.
        pin_memory=average.device.type == "cpu" and weight.is_cuda,
        requires_grad=False,
    )


# -- averages in the model ------------------------------------------------------------------------


@torch.no_grad()
def _write_back(kept: Mapping[str, Tensor], container: Any) -> None:
    """Write kept values into those of a container's tensors that no longer share their memory."""
    now = _tensors(leaves_of(container))
    problems = []
    for name, old in kept.items():
        if name not in now:
            problems.append(f"{name!r} is gone")
        elif now[name].shape != old.shape:
            problems.append(f"{name!r} is {list(now[name].shape)}, was {list(old.shape)}")
        elif not now[name].is_set_to(old):
            now[name].data.copy_(old)
    if problems:
        raise LayoutError(
            "tensors were removed or reshaped while the model held the average; all others were "
            "restored:\n" + format_problems(problems)
        )


class _WriteBack:
    """Restores kept values into tensors that moved during a swap; must come first in the swap.

    Like the peers, it writes through ``.data`` and does not notify autograd: a graph that needs the
    weights is correct again once they are restored bit for bit.
    """

    def __init__(
        self, moved: Callable[[], bool], kept: Mapping[str, Tensor], container: Any
    ) -> None:
        self._moved, self._kept, self._container = moved, kept, container

    def apply(self) -> None:
        """Do nothing: no tensor has moved yet."""

    def restore(self) -> None:
        """Write the kept values into tensors that have moved or changed their dtype."""
        if self._moved():
            _write_back(self._kept, self._container)


class _InPlace:
    """A swap of averages and weights within their memory, which private aliases hold in place."""

    def __init__(self, plan: Plan) -> None:
        averages, weights = plan.binding.watched
        self._specs = {leaf.name: leaf.spec for leaf in averages.items}
        aliases: dict[int, Tensor] = {}

        def alias(owner: Tensor) -> Tensor:
            return aliases.setdefault(id(owner), owner.detach())

        def aliased(pair: Pair) -> Pair:
            dst, src = (spec.with_owner(alias(spec.owner)) for spec in (pair.dst, pair.src))
            return pair._replace(dst=dst, src=src)

        self._pairs = [aliased(pair) for pair in plan.binding.pairs]
        self.averages_kept, self.weights_kept = (
            {name: alias(one) for name, one in _tensors(side).items()}
            for side in (averages, weights)
        )
        self.memory = MemorySwap(self._pairs)

    def averages(self) -> dict[str, Tensor]:
        """Return copies of the averages, which the model holds."""
        shadows = copy_applied(self._pairs)
        found = dict(zip((pair.dst for pair in self._pairs), shadows, strict=True))
        return {name: found[spec] for name, spec in self._specs.items()}


class _CopiedOut:
    """Averages copied into a model on another device, with clones of the raw weights."""

    def __init__(self, averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self._averages, self._weights = dict(averages), dict(weights)
        copies = {id(one): one.detach().clone() for one in self._weights.values()}
        self.raw = {name: copies[id(one)] for name, one in self._weights.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the averages into the model."""
        for name, weight in self._weights.items():
            weight.data.copy_(self._averages[name])

    def restore(self) -> None:
        """Do nothing: :class:`_WriteBack` restores the weights, wherever they are now."""

    def averages(self) -> dict[str, Tensor]:
        """Return the averages."""
        return dict(self._averages)


class ModelAverager:
    """Updates averages, which stay tensors of their owner, from the weights of a model.

    ``averaged`` is a module, list or dict of tensors. ``policy`` is called with each name and its
    role in the model (see :class:`fastema.Plan`); by default everything is averaged. Weights on
    another device than their averages are first copied to the averages' device, into memory that
    is reused. Every method that writes, checks or copies raises a StateError inside
    :meth:`swapped`.
    """

    def __init__(
        self,
        averaged: Any,
        policy: PolicyOf | None = None,
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        Plan({}, {}, rounding=rounding, seed=seed)  # validates the arguments now
        self._averaged = averaged
        self._policy = policy or _average
        self._rounding, self._seed = rounding, seed
        self._active_swap: _InPlace | _CopiedOut | None = None
        self.forget()

    def forget(self) -> None:
        """Drop the plan: the next call locates all tensors and asks the policy again."""
        self._plan: _Plan | None = None
        self._model: weakref.ref[Any] | None = None
        self._stage: _StagedWeights | None = None
        self._roles: dict[str, Role] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the constructor's arguments alone: a copy locates its tensors for itself."""
        self._refuse_swapped("copying it")
        plain = "_averaged", "_policy", "_rounding", "_seed"
        return {name: getattr(self, name) for name in plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _active_swap=None)
        self.forget()

    # -- every step -------------------------------------------------------------------------------

    def update(self, model: Any, weight: float, step: int) -> None:
        """Compute ``avg += weight * (x - avg)``; random rounding of 16-bit averages uses ``step``.

        An error names the tensors that do not match; nothing is written then.
        """
        plan = self._plan
        if (
            plan is not None
            and self._stage is None
            and self._active_swap is None
            and plan.step_at(step, model, weight)
        ):
            return

        def lerp(plan: _Plan, weights: Any) -> None:
            plan.calls = step
            plan.lerp_(weight, weights)

        self._refuse_swapped("update()")
        self._call_with_plan(list_iterators(model), lerp)

    def copy(self, model: Any) -> None:
        """Copy the weights into the averages, rounded to nearest."""
        self._refuse_swapped("copy()")
        self._call_with_plan(list_iterators(model), lambda plan, weights: plan.copy_(weights))

    def check(self, model: Any) -> None:
        """Raise the errors that :meth:`update` and :meth:`copy` would raise, without writing."""
        self._refuse_swapped("check()")
        self._call_with_plan(list_iterators(model), lambda plan, weights: plan.check(weights))

    def _refuse_swapped(self, call: str) -> None:
        if self._active_swap is not None:
            raise StateError(f"{call} while the model holds the average: exit that block first")

    def _call_with_plan(self, model: Any, call: Callable[[_Plan, Any], Result]) -> Result:
        """Return ``call(plan, source)``, with a new plan if devices have changed."""
        try:
            if self._plan is not None and self._stage is None:
                try:
                    return call(self._plan, model)
                except LayoutError:
                    if not self._devices_differ(leaves_of(model)):
                        raise
            return call(*self._plan_for(model))
        finally:
            self._release(model)

    def _release(self, model: Any) -> None:
        """Release the model's tensors, and forget the plan once the model is deleted."""
        if self._plan is None or not isinstance(model, torch.nn.Module):
            return
        self._plan.binding.forget_container()
        if self._model is None or self._model() is not model:
            me = weakref.ref(self)

            def forget(_: object) -> None:
                averager = me()
                if averager is not None:
                    averager.forget()

            self._model = weakref.ref(model, forget)

    # -- plans and devices ------------------------------------------------------------------------

    def _devices_differ(self, weights: Leaves) -> bool:
        """Return whether an average is on another device than its weights."""
        averages, theirs = _tensors(leaves_of(self._averaged)), _tensors(weights)
        return any(averages[n].device != theirs[n].device for n in averages.keys() & theirs)

    def _plan_for(self, model: Any) -> tuple[_Plan, Any]:
        """Return a plan and its source: the model, or copies of the weights beside the averages."""
        weights = leaves_of(model)
        bits: dict[str, Any] = {"rounding": self._rounding, "seed": self._seed}
        if not self._devices_differ(weights):
            self.forget()
            self._plan = _Plan(self._averaged, model, self._policy, **bits)
            return self._plan, model
        ours = _tensors(leaves_of(self._averaged))
        fits = self._stage is not None and self._stage.fits(ours, weights)
        if self._stage is None or not fits or weights.roles != self._roles:
            policy = self._policy_by_role(weights)
            for one in weights.opaque:
                if policy(one.name, one.role) != "skip":
                    raise one.error
            stage = _StagedWeights(ours, weights)
            self._plan = _Plan(self._averaged, stage.tensors, policy, **bits)
            self._stage, self._roles = stage, weights.roles
        assert self._plan is not None
        self._stage.copy_from(weights)
        return self._plan, self._stage.tensors

    def _policy_by_role(self, weights: Leaves) -> PolicyOf:
        """Return the policy, called with the roles that names have in the model."""
        roles = weights.roles
        return lambda name, role: self._policy(name, roles.get(name, role))

    # -- the average in the model -----------------------------------------------------------------

    def write_to(self, model: Any) -> None:
        """Write the averages and the copied tensors into a model, rounded to nearest."""
        self._refuse_swapped("copying it into a model")
        model = list_iterators(model)
        weights = leaves_of(model)
        averages: Any = self._averaged
        if self._devices_differ(weights):
            theirs = _tensors(weights)
            averages = {
                name: one.detach().to(theirs[name].device) if name in theirs else one
                for name, one in _tensors(leaves_of(averages)).items()
            }
        _Plan(model, averages, self._policy_by_role(weights)).copy_()

    def swapped(self, model: Any) -> RestoringBlock[None]:
        """Return a block in which the model holds the average; restore the raw weights on exit.

        They are restored exactly, also after an exception, and also into tensors that were moved,
        cast or replaced inside the block. Their values stay in the averages' memory if
        :class:`MemorySwap` can swap them; otherwise, and on another device, they are copied. On
        exit, a LayoutError names tensors that are gone or reshaped; all others are restored.
        """
        return RestoringBlock(partial(self._swap_steps, model))

    def _swap_steps(self, model: Any) -> BlockSteps[None]:
        self._refuse_swapped("swapped()")
        model = list_iterators(model)
        held, swap = self._call_with_plan(model, partial(self._swap_of, model))

        def apply() -> None:
            self._active_swap = held
            swap.apply()

        def restore() -> None:
            self._active_swap = None
            swap.restore()

        return BlockSteps(apply, restore)

    def _swap_of(self, model: Any, plan: _Plan, source: Any) -> tuple[_InPlace | _CopiedOut, Swap]:
        if source is not model:
            averages, weights = (_tensors(side) for side in plan.binding.watched)
            own = _tensors(leaves_of(model))
            copied = _CopiedOut(averages, {name: own[name] for name in weights})
            return copied, Swap(_WriteBack(lambda: True, copied.raw, model), copied)
        with plan.swappable(model) as binding:
            held = binding.cached("in place", lambda: _InPlace(plan))
            if held.memory.has_copies:
                binding.forget("in place")
        moved = partial(binding.has_moved, model)
        return held, Swap(
            _WriteBack(moved, held.weights_kept, model),
            _WriteBack(moved, held.averages_kept, self._averaged),
            held.memory,
        )

    def averages(self) -> dict[str, Tensor]:
        """Return the averages by name: the tensors themselves, or copies while swapped in place."""
        if self._active_swap is None:
            return _tensors(leaves_of(self._averaged))
        return self._active_swap.averages()
