"""Averages in the user's own tensors that follow a model: shared by the drop-in classes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from fastema.binding.swap import InMemory, Swap, recovered
from fastema.bridges.registry import leaves_of, materialised
from fastema.engine.blocks import RestoringBlock, Steps
from fastema.errors import LayoutError, StateError, listed
from fastema.layout.group import Pair
from fastema.layout.spec import Leaves, Role, TensorSpec
from fastema.plan import Plan, PolicyOf

__all__ = ["ModelAverager", "duplicate"]

Result = TypeVar("Result")


@torch.no_grad()
def duplicate(model: torch.nn.Module, memo: dict[int, Any] | None = None) -> torch.nn.Module:
    """Copy a model deeply.

    With gradients, a scripted module's copy would be computed from it: that keeps its graph alive,
    and refuses ``requires_grad_(False)``.
    """
    return deepcopy(model, memo)


def _average(name: str, role: Role) -> Literal["average"]:
    return "average"


def _tensors(leaves: Leaves) -> dict[str, Tensor]:
    return {leaf.name: leaf.spec.owner for leaf in leaves.items}


class _Plan(Plan):
    _called: ClassVar = ("the average", "the model")


# -- averages on other devices --------------------------------------------------------------------


class _Stage:
    """Memory beside the averages, for weights that are on other devices."""

    def __init__(self, averages: Mapping[str, Tensor], weights: Leaves) -> None:
        # A plan names those that have no average, unless they are skipped.
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
        """Return whether it is of these names, shapes, dtypes and devices, tied in the same way."""
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
        """Copy the weights; what the host is to read of them is there when this returns."""
        now = _tensors(weights)
        for name in self._first_names.values():
            self.tensors[name].copy_(now[name].detach(), non_blocking=True)
        for context in {leaf.spec.device: leaf.spec.context for leaf in weights.items}.values():
            if context is not None:
                context.wait()


def _first_names(averages: Container[str], weights: Leaves) -> dict[TensorSpec, str]:
    """Each memory of the weights that have an average, by the first of its names."""
    found: dict[TensorSpec, str] = {}
    for leaf in weights.items:
        if leaf.name in averages:
            found.setdefault(leaf.spec, leaf.name)
    return found


def _empty_beside(average: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(
        weight,
        device=average.device,
        # A GPU writes there on its own: waited for once, not tensor by tensor.
        pin_memory=average.device.type == "cpu" and weight.is_cuda,
        requires_grad=False,
    )


# -- averages in the model ------------------------------------------------------------------------


@torch.no_grad()
def _write_back(kept: Mapping[str, Tensor], container: Any) -> None:
    """Write what was kept into the tensors of a container that lie elsewhere by now."""
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
            "tensors were taken away while the model held the average; the others have their own "
            "contents back:\n" + listed(problems)
        )


class _WriteBack:
    """Writes what was kept to where tensors were moved meanwhile; comes first in a swap.

    Autograd is not told, as by the peers, which write through ``.data``: a graph that needs the
    weights is right when they are back to the bit.
    """

    def __init__(
        self, moved: Callable[[], bool], kept: Mapping[str, Tensor], container: Any
    ) -> None:
        self._moved, self._kept, self._container = moved, kept, container

    def apply(self) -> None:
        """Nothing was moved yet."""

    def restore(self) -> None:
        """Write into tensors that are elsewhere, or of another dtype, by now."""
        if self._moved():
            _write_back(self._kept, self._container)


class _InPlace:
    """Averages and weights that change places, held by own tensor objects, so none of it moves."""

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
        self.memory = InMemory(self._pairs)

    def averages(self) -> dict[str, Tensor]:
        """Copy the averages, which the model has."""
        shadows = recovered(self._pairs)
        found = dict(zip((pair.dst for pair in self._pairs), shadows, strict=True))
        return {name: found[spec] for name, spec in self._specs.items()}


class _CopiedOut:
    """A copy of the averages in a model on another device, and copies of the weights beside it."""

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
        """Leave it to :class:`_WriteBack`, which looks where the weights are."""

    def averages(self) -> dict[str, Tensor]:
        """Return the averages."""
        return dict(self._averages)


class ModelAverager:
    """Averages that stay the tensors of their owner, and follow the weights of a model.

    ``averaged`` is a module, list or dict of tensors; ``policy`` is asked about each name with the
    role that it has in the model (see :class:`fastema.Plan`), and averages everything by default.
    Weights on another device than their averages are first copied beside these, into memory that
    is kept. Every method refuses to run inside :meth:`swapped`.
    """

    def __init__(
        self,
        averaged: Any,
        policy: PolicyOf | None = None,
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        Plan({}, {}, rounding=rounding, seed=seed)  # refuses what it would refuse later
        self._averaged = averaged
        self._policy = policy or _average
        self._rounding, self._seed = rounding, seed
        self._held: _InPlace | _CopiedOut | None = None
        self.forget()

    def forget(self) -> None:
        """Look everything up at the next call, and ask the policy again."""
        self._plan: _Plan | None = None
        self._model: weakref.ref[Any] | None = None
        self._stage: _Stage | None = None
        self._roles: dict[str, Role] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is bound to memory: a copy looks everything up for itself."""
        self._refuse_swapped("copying it")
        plain = "_averaged", "_policy", "_rounding", "_seed"
        return {name: getattr(self, name) for name in plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _held=None)
        self.forget()

    # -- every step -------------------------------------------------------------------------------

    def update(self, model: Any, weight: float, step: int) -> None:
        """``avg += weight * (x - avg)``; ``step`` is that of the random bits of 16-bit averages.

        An error names the tensors; nothing was written then.
        """

        def lerp(plan: _Plan, weights: Any) -> None:
            plan.calls = step
            plan.lerp_(weight, weights)

        self._refuse_swapped("update()")
        self._call_with_plan(materialised(model), lerp)

    def copy(self, model: Any) -> None:
        """Make the averages the weights, rounded to nearest."""
        self._refuse_swapped("copy()")
        self._call_with_plan(materialised(model), lambda plan, weights: plan.copy_(weights))

    def check(self, model: Any) -> None:
        """Raise what :meth:`update` and :meth:`copy` would; nothing is written."""
        self._refuse_swapped("check()")
        self._call_with_plan(materialised(model), lambda plan, weights: plan.check(weights))

    def _refuse_swapped(self, call: str) -> None:
        if self._held is not None:
            raise StateError(f"{call} while the model holds the average: leave that block first")

    def _call_with_plan(self, model: Any, call: Callable[[_Plan, Any], Result]) -> Result:
        """Call with the plan there is; with another one where devices have changed."""
        try:
            if self._plan is not None and self._stage is None:
                try:
                    return call(self._plan, model)
                except LayoutError:
                    if not self._is_apart(leaves_of(model)):
                        raise
            return call(*self._plan_for(model))
        finally:
            self._release(model)

    def _release(self, model: Any) -> None:
        """Keep no model alive, and nothing of one that is gone."""
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

    # -- where everything is ----------------------------------------------------------------------

    def _is_apart(self, weights: Leaves) -> bool:
        """Return whether an average is on another device than its weights."""
        averages, theirs = _tensors(leaves_of(self._averaged)), _tensors(weights)
        return any(averages[n].device != theirs[n].device for n in averages.keys() & theirs)

    def _plan_for(self, model: Any) -> tuple[_Plan, Any]:
        """Return a plan, and what the averages follow: the model, or its copy beside them."""
        weights = leaves_of(model)
        bits: dict[str, Any] = {"rounding": self._rounding, "seed": self._seed}
        if not self._is_apart(weights):
            self.forget()
            self._plan = _Plan(self._averaged, model, policy=self._policy, **bits)
            return self._plan, model
        ours = _tensors(leaves_of(self._averaged))
        fits = self._stage is not None and self._stage.fits(ours, weights)
        if self._stage is None or not fits or weights.roles != self._roles:
            policy = self._named(weights)
            for one in weights.opaque:
                if policy(one.name, one.role) != "skip":
                    raise one.error
            stage = _Stage(ours, weights)
            self._plan = _Plan(self._averaged, stage.tensors, policy=policy, **bits)
            self._stage, self._roles = stage, weights.roles
        assert self._plan is not None
        self._stage.copy_from(weights)
        return self._plan, self._stage.tensors

    def _named(self, weights: Leaves) -> PolicyOf:
        """The policy, by the roles that names have in the model."""
        roles = weights.roles
        return lambda name, role: self._policy(name, roles.get(name, role))

    # -- the average in the model -----------------------------------------------------------------

    def give(self, model: Any) -> None:
        """Write the averages, and what was copied, into a model, rounded to nearest."""
        self._refuse_swapped("give()")
        model = materialised(model)
        weights = leaves_of(model)
        averages: Any = self._averaged
        if self._is_apart(weights):
            theirs = _tensors(weights)
            averages = {
                name: one.detach().to(theirs[name].device) if name in theirs else one
                for name, one in _tensors(leaves_of(averages)).items()
            }
        Plan(model, averages, policy=self._named(weights)).copy_()

    def swapped(self, model: Any) -> RestoringBlock[None]:
        """A block in which the model holds the average; the raw weights come back however it ends.

        Exactly, also into tensors that were moved, cast or replaced inside. They are kept where the
        average was where :class:`InMemory` can; else, and on another device, in memory of their
        own. Its end names tensors that are gone or reshaped; the others have their contents back.
        """
        return RestoringBlock(partial(self._swap_steps, model))

    def _swap_steps(self, model: Any) -> Steps[None]:
        self._refuse_swapped("swapped()")
        model = materialised(model)
        held, swap = self._call_with_plan(model, partial(self._swap_of, model))

        def apply() -> None:
            self._held = held
            swap.apply()

        def restore() -> None:
            self._held = None
            swap.restore()

        return Steps(apply, restore)

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
        """Return the averages by name: the tensors themselves, or copies while a model has them."""
        if self._held is None:
            return _tensors(leaves_of(self._averaged))
        return self._held.averages()
