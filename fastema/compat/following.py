"""What the drop-in classes share: averages in tensors of the user's, and the model they follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fastema.bridges.registry import leaves_of, materialised
from fastema.engine.interrupts import deferred
from fastema.errors import LayoutError, StateError
from fastema.layout.spec import Leaves, Role
from fastema.plan import Plan, PolicyOf
from fastema.shadow.exchange import Exchange, exchanged, recovered

__all__ = ["Follower"]

Result = TypeVar("Result")


def _average(name: str, role: Role) -> Literal["average"]:
    return "average"


class _Exchangeable(Plan):
    """A plan whose averages can change places with the weights exactly."""

    _exchange: Exchange | None = None

    def _build(self) -> None:
        super()._build()
        self._exchange = None

    def exchange(self, x: Any) -> Exchange:
        """What puts the averages into the model and takes them back; all checks, no writing."""
        with self._lock:
            self._ready("swap", x)
            found = self._exchange or Exchange(0, exchanged(self._pairs))
            if not found.keeps:
                self._exchange = found
            return found

    def wrote(self) -> None:
        """Tell the frameworks that all of it was written."""
        for tell, arrays in self._written + self._swapped:
            tell(arrays)

    def recovered(self) -> dict[Any, Tensor]:
        """Copies of the averages by where they lie, while the model holds them."""
        return {pair.dst: recovered(pair).shadow for pair in self._pairs}


class _Stage:
    """Memory beside the averages, for weights that are on other devices.

    Parameters
    ----------
    averages, weights : mapping of str to Tensor
    """

    def __init__(self, averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self.tensors = {
            name: torch.empty_like(
                weight,
                device=averages[name].device,
                # A GPU writes there on its own: waited for once, not tensor by tensor.
                pin_memory=averages[name].device.type == "cpu" and weight.is_cuda,
                requires_grad=False,
            )
            for name, weight in weights.items()
            if name in averages
        }

    def fits(self, averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
        """Whether it is of these names, shapes, dtypes and devices."""
        return self.tensors.keys() == averages.keys() & weights.keys() and all(
            staged.shape == weights[name].shape
            and staged.dtype == weights[name].dtype
            and staged.device == averages[name].device
            for name, staged in self.tensors.items()
        )

    def take(self, weights: Leaves) -> None:
        """Copy the weights; what the host is to read of them is there when this returns."""
        for leaf in weights.items:
            if leaf.name in self.tensors:
                self.tensors[leaf.name].copy_(leaf.spec.owner.detach(), non_blocking=True)
        for home in {leaf.spec.device: leaf.spec.home for leaf in weights.items}.values():
            if home is not None:
                home.wait()


def _tensors(leaves: Leaves) -> dict[str, Tensor]:
    return {leaf.name: leaf.spec.owner for leaf in leaves.items}


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
        self._applied: _Exchangeable | None = None
        self._swapped = False
        self.forget()

    def forget(self) -> None:
        """Look everything up anew at the next call, and ask the policy again."""
        self._plan: _Exchangeable | None = None
        self._stage: _Stage | None = None
        self._roles: dict[str, Role] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is bound to memory: a copy looks everything up for itself."""
        self._refuse_swapped("copying it")
        plain = "_averaged", "_policy", "_rounding", "_seed"
        return {name: getattr(self, name) for name in plain}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _applied=None, _swapped=False)
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

    def _refuse_swapped(self, call: str) -> None:
        if self._swapped:
            raise StateError(f"{call} while the model holds the average: leave that block first")

    def _tried(self, model: Any, call: Callable[[_Exchangeable, Any], Result]) -> Result:
        """A call with the plan there is; with another one where devices have changed."""
        if self._plan is not None and self._stage is None:
            try:
                return call(self._plan, model)
            except LayoutError:
                if not self._is_apart(leaves_of(model)):
                    raise
        return call(*self._looked_up(model))

    # -- where everything is ----------------------------------------------------------------------

    def _is_apart(self, weights: Leaves) -> bool:
        return _apart(_tensors(leaves_of(self._averaged)), _tensors(weights))

    def _looked_up(self, model: Any) -> tuple[_Exchangeable, Any]:
        """The plan, and what the averages are to follow: the model, or its copy beside them."""
        weights = leaves_of(model)
        if not self._is_apart(weights):
            self.forget()
            self._plan = _Exchangeable(self._averaged, model, policy=self._policy, **self._bits)
            return self._plan, model
        ours, theirs = _tensors(leaves_of(self._averaged)), _tensors(weights)
        if (
            self._stage is None
            or not self._stage.fits(ours, theirs)
            or weights.roles != self._roles
        ):
            stage = _Stage(ours, theirs)
            self._plan = _Exchangeable(
                self._averaged, stage.tensors, policy=self._named(weights), **self._bits
            )
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
            theirs = _tensors(weights)
            averages = {
                name: one.detach().to(theirs[name].device) if name in theirs else one
                for name, one in _tensors(leaves_of(averages)).items()
            }
        Plan(model, averages, policy=self._named(weights)).copy_()

    def swapped(self, model: Any) -> AbstractContextManager[None]:
        """A block in which the model holds the average; the raw weights come back however it ends.

        Exactly. They are kept where the average was if both are of one dtype, or float32 and
        bfloat16; for other pairs of dtypes, and on another device, in memory of their own.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            Naming the tensors; nothing was written then.
        StateError
            Inside another such block.
        """
        self._refuse_swapped("swapped()")
        model = materialised(model)

        def begin(plan: _Exchangeable, source: Any) -> AbstractContextManager[None]:
            if source is not model:
                return self._lent(model)
            return self._exchanged(plan, plan.exchange(model))

        return self._tried(model, begin)

    @contextmanager
    def _exchanged(self, plan: _Exchangeable, exchange: Exchange) -> Iterator[None]:
        def take_back() -> None:
            with deferred():
                if self._applied is not None:
                    exchange.restore()
                    self._applied, self._swapped = None, False
                    plan.wrote()

        try:
            with deferred():
                exchange.apply()
                self._applied, self._swapped = plan, True
                plan.wrote()
            yield
        finally:
            try:
                take_back()
            except BaseException:  # an interrupt, before anything was taken back
                take_back()
                raise

    @contextmanager
    def _lent(self, model: Any) -> Iterator[None]:
        raw = {leaf.name: leaf.spec.owner.detach().clone() for leaf in leaves_of(model).items}
        try:
            self._give(model)
            self._swapped = True
            yield
        finally:
            with deferred():
                self._swapped = False
                # What was skipped is not ours to put back.
                Plan(model, raw, policy=self._named(leaves_of(model))).copy_()

    def averages(self) -> dict[str, Tensor]:
        """The averages by name: the tensors themselves, or copies while the model holds them."""
        leaves = leaves_of(self._averaged)
        if self._applied is None:
            return _tensors(leaves)
        found = self._applied.recovered()
        return {leaf.name: found.get(leaf.spec, leaf.spec.owner) for leaf in leaves.items}
