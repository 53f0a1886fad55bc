"""What the drop-in classes share: averages in tensors of the user's, and the model they follow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from fastema.bridges.registry import leaves_of, materialised
from fastema.compat.lending import InPlace, Lent, Loan, tensors_of
from fastema.engine.blocks import RestoringBlock, Steps
from fastema.errors import LayoutError, StateError
from fastema.layout.spec import Leaves, Role, TensorSpec
from fastema.plan import Plan, PolicyOf

__all__ = ["Follower", "duplicate"]

Result = TypeVar("Result")


@torch.no_grad()
def duplicate(model: torch.nn.Module, memo: dict[int, Any] | None = None) -> torch.nn.Module:
    """Copy a model deeply.

    With gradients, the parameters of a scripted module's copy are computed from the module's: they
    keep its graph alive, and refuse ``requires_grad_(False)``.
    """
    return deepcopy(model, memo)


def _average(name: str, role: Role) -> Literal["average"]:
    return "average"


class _Exchangeable(Plan):
    """A plan whose averages can change places with the weights exactly."""

    _called: ClassVar = ("the average", "the model")

    _loan: InPlace | None = None

    def _build(self) -> None:
        super()._build()
        self._loan = None

    def loan(self, x: Any) -> InPlace:
        """What puts the averages into the model and takes them back; all checks, no writing."""
        with self._lock:
            self._ready("swap", x)
            found = self._loan or InPlace(self._pairs, *self.sides())
            self._loan = None if found.keeps else found
            return found

    def check(self, x: Any) -> None:
        """All that is looked at before an update."""
        with self._lock:
            self._ready("lerp", x)

    def sides(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Averages and weights by name, without those that are skipped."""
        assert self._leaves is not None  # torch's tensors do not move by themselves
        averages, weights = (tensors_of(leaves) for leaves in self._leaves)
        return averages, weights

    def moved(self) -> bool:
        """Whether tensors are elsewhere than they were, or others."""
        return any(watched is not None and watched.changed() for watched in self._watches)

    def about(self, model: Any) -> None:
        """Go on with a model that was let go of."""
        self._x = model

    def let_go(self) -> None:
        """Do not keep the model, only what is known of its tensors."""
        self._x = None


class _Stage:
    """Memory beside the averages, for weights that are on other devices.

    Parameters
    ----------
    averages : mapping of str to Tensor
    weights : Leaves
    """

    def __init__(self, averages: Mapping[str, Tensor], weights: Leaves) -> None:
        # A plan names those that have no average, unless they are skipped.
        self.tensors = tensors_of(weights)
        self._firsts = _firsts(averages, weights)
        owners = {leaf.spec: leaf.spec.owner for leaf in weights.items}
        beside = {
            spec: _beside(averages[name], owners[spec]) for spec, name in self._firsts.items()
        }
        self.tensors |= {
            leaf.name: beside[leaf.spec] for leaf in weights.items if leaf.name in averages
        }

    def fits(self, averages: Mapping[str, Tensor], weights: Leaves) -> bool:
        """Whether it is of these names, shapes, dtypes and devices, tied in the same way."""
        other = tensors_of(weights)
        return (
            self.tensors.keys() == other.keys()
            and list(self._firsts.values()) == list(_firsts(averages, weights).values())
            and all(
                staged.shape == other[name].shape
                and staged.dtype == other[name].dtype
                and (name not in averages or staged.device == averages[name].device)
                for name, staged in self.tensors.items()
            )
        )

    def take(self, weights: Leaves) -> None:
        """Copy the weights; what the host is to read of them is there when this returns."""
        now = tensors_of(weights)
        for name in self._firsts.values():
            self.tensors[name].copy_(now[name].detach(), non_blocking=True)
        for home in {leaf.spec.device: leaf.spec.home for leaf in weights.items}.values():
            if home is not None:
                home.wait()


def _firsts(averages: Container[str], weights: Leaves) -> dict[TensorSpec, str]:
    """Each memory of the weights that have an average, by the first of its names."""
    found: dict[TensorSpec, str] = {}
    for leaf in weights.items:
        if leaf.name in averages:
            found.setdefault(leaf.spec, leaf.name)
    return found


def _beside(average: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(
        weight,
        device=average.device,
        # A GPU writes there on its own: waited for once, not tensor by tensor.
        pin_memory=average.device.type == "cpu" and weight.is_cuda,
        requires_grad=False,
    )


def _apart(averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether an average is on another device than its weights."""
    return any(averages[name].device != weights[name].device for name in averages.keys() & weights)


class Follower:
    """Averages that stay the tensors of their owner, and follow the weights of a model.

    ``avg += weight * (x - avg)`` for all of them in one call, over a plan that is made once.
    Tensors that were re-pointed, moved or cast are found again at the next call. Weights on another
    device than their averages are copied beside these first, into memory that is kept.

    Parameters
    ----------
    averaged : torch.nn.Module, list or dict of Tensor
        What is written.
    policy : callable, optional
        See :class:`fastema.Plan`; asked about each name with the role that it has in the model, and
        by default everything is averaged. Integers and booleans are copied where it says average.
    rounding : {"stochastic", "nearest"}
        Of 16-bit averages.
    seed : int
        Of the random bits.

    Raises
    ------
    ArgumentError
        For an invalid ``rounding`` or ``seed``.
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
        self._loan: Loan | None = None
        self.forget()

    def forget(self) -> None:
        """Look everything up anew at the next call, and ask the policy again."""
        self._plan: _Exchangeable | None = None
        self._model: weakref.ref[Any] | None = None
        self._stage: _Stage | None = None
        self._roles: dict[str, Role] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is bound to memory: a copy looks everything up for itself."""
        self._refuse_swapped("copying it")
        plain = "_averaged", "_policy", "_rounding", "_seed"
        return {name: getattr(self, name) for name in plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _loan=None)
        self.forget()

    # -- every step -------------------------------------------------------------------------------

    def update(self, model: Any, weight: float, step: int) -> None:
        """``avg += weight * (x - avg)``; what is not averaged is copied.

        Parameters
        ----------
        model : torch.nn.Module, list, dict or iterator of Tensor
            Names or positions, and shapes, as those of the averages.
        weight : float
            Of the new value, ``1 - decay``; 1 makes the averages the weights.
        step : int
            Of the random bits of 16-bit averages.

        Raises
        ------
        LayoutError, DTypeError, BridgeError, ArgumentError
            Naming the tensors; nothing was written then.
        StateError
            Inside :meth:`swapped`.
        """

        def lerp(plan: _Exchangeable, weights: Any) -> None:
            plan.calls = step
            plan.lerp_(weight, weights)

        self._refuse_swapped("update()")
        self._tried(materialised(model), lerp)

    def copy(self, model: Any) -> None:
        """Make the averages the weights, rounded to nearest; raises as :meth:`update`."""
        self._refuse_swapped("copy()")
        self._tried(materialised(model), lambda plan, weights: plan.copy_(weights))

    def check(self, model: Any) -> None:
        """Raise what :meth:`update` and :meth:`copy` would; nothing is written."""
        self._refuse_swapped("check()")
        self._tried(materialised(model), lambda plan, weights: plan.check(weights))

    def _refuse_swapped(self, call: str) -> None:
        if self._loan is not None:
            raise StateError(f"{call} while the model holds the average: leave that block first")

    def _tried(self, model: Any, call: Callable[[_Exchangeable, Any], Result]) -> Result:
        """A call with the plan there is; with another one where devices have changed."""
        if self._plan is not None and self._stage is None:
            if self._model is not None and self._model() is model:
                self._plan.about(model)
            try:
                return call(self._plan, model)
            except LayoutError:
                if not self._is_apart(leaves_of(model)):
                    raise
            finally:
                self._let_go(model)
        plan, source = self._looked_up(model)
        try:
            return call(plan, source)
        finally:
            self._let_go(model)

    def _let_go(self, model: Any) -> None:
        """Keep no model alive, and nothing of one that is gone."""
        if self._plan is None or not isinstance(model, torch.nn.Module):
            return
        self._plan.let_go()
        if self._model is None or self._model() is not model:
            me = weakref.ref(self)

            def gone(_: object) -> None:
                follower = me()
                if follower is not None:
                    follower.forget()

            self._model = weakref.ref(model, gone)

    # -- where everything is ----------------------------------------------------------------------

    def _is_apart(self, weights: Leaves) -> bool:
        return _apart(tensors_of(leaves_of(self._averaged)), tensors_of(weights))

    def _looked_up(self, model: Any) -> tuple[_Exchangeable, Any]:
        """The plan, and what the averages are to follow: the model, or its copy beside them."""
        weights = leaves_of(model)
        if not self._is_apart(weights):
            self.forget()
            self._plan = _Exchangeable(self._averaged, model, policy=self._policy, **self._bits)
            return self._plan, model
        ours = tensors_of(leaves_of(self._averaged))
        fits = self._stage is not None and self._stage.fits(ours, weights)
        if self._stage is None or not fits or weights.roles != self._roles:
            policy = self._named(weights)
            for one in weights.opaque:
                if policy(one.name, one.role) != "skip":
                    raise one.error
            stage = _Stage(ours, weights)
            self._plan = _Exchangeable(self._averaged, stage.tensors, policy=policy, **self._bits)
            self._stage, self._roles = stage, weights.roles
        assert self._plan is not None
        self._stage.take(weights)
        return self._plan, self._stage.tensors

    @property
    def _bits(self) -> dict[str, Any]:
        return {"rounding": self._rounding, "seed": self._seed}

    def _named(self, weights: Leaves) -> PolicyOf:
        """The policy where the roles that names have in the model are not to be seen."""
        roles = weights.roles
        return lambda name, role: self._policy(name, roles.get(name, role))

    # -- the average in the model -----------------------------------------------------------------

    def give(self, model: Any) -> None:
        """Write the averages, and what was copied, into a model, rounded to nearest.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors; nothing was written then.
        StateError
            Inside :meth:`swapped`.
        """
        self._refuse_swapped("give()")
        self._give(materialised(model))

    def _give(self, model: Any) -> None:
        weights = leaves_of(model)
        averages: Any = self._averaged
        if self._is_apart(weights):
            theirs = tensors_of(weights)
            averages = {
                name: one.detach().to(theirs[name].device) if name in theirs else one
                for name, one in tensors_of(leaves_of(averages)).items()
            }
        Plan(model, averages, policy=self._named(weights)).copy_()

    def swapped(self, model: Any) -> RestoringBlock[None]:
        """A block in which the model holds the average; the raw weights come back however it ends.

        Exactly, and into tensors that were moved, cast or replaced inside the block too. They are
        kept where the average was if both are of one dtype, or float32 and bfloat16; for other
        pairs of dtypes, and on another device, in memory of their own.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors; nothing was written then. At the end of the block, naming those that
            are gone or reshaped; the others have their contents back.
        StateError
            Inside another such block.
        """
        return RestoringBlock(partial(self._swap, model))

    def _swap(self, model: Any) -> Steps[None]:
        self._refuse_swapped("swapped()")
        model = materialised(model)
        plan, loan = self._tried(
            model, lambda plan, source: (plan, self._loan_of(plan, model, source))
        )

        def apply() -> None:
            self._loan = loan
            loan.apply()

        def restore() -> None:
            self._loan = None
            loan.take_back(self._averaged, model, moved=plan.moved())

        return Steps(apply, restore)

    def _loan_of(self, plan: _Exchangeable, model: Any, source: Any) -> Loan:
        if source is model:
            return plan.loan(model)
        averages, weights = plan.sides()
        own = tensors_of(leaves_of(model))
        return Lent(averages, {name: own[name] for name in weights})

    def averages(self) -> dict[str, Tensor]:
        """The averages by name: the tensors themselves, or copies while the model holds them."""
        if self._loan is None:
            return tensors_of(leaves_of(self._averaged))
        return self._loan.averages()
