"""``ema_pytorch.EMAPytree``: an average of tensors in lists, tuples and dicts, nested."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytrees

from fastema.compat.averager import ModelAverager
from fastema.compat.ema_pytorch.schedule import Scheduled
from fastema.errors import LayoutError

__all__ = ["EMAPytree", "EMATensor"]


class EMAPytree(Scheduled):
    """An exponential moving average of the tensors in a tree of lists, tuples and dicts.

    As :class:`EMA` of a model, whose parameters it has: ``avg += (1 - decay**update_every) * (x -
    avg)`` at every ``update_every``-th call of :meth:`update`. Trees of different structure are a
    LayoutError.

    Parameters
    ----------
    pytree : tensor, or list, tuple or dict of such, nested
        What is followed: written in place by its owner. What is no tensor in it is left alone.
    ema_pytree : the same, or callable, optional
        What holds the average, or makes it; a copy by default, of results of operations too.

    Attributes
    ----------
    pytree, ema_pytree
        What is followed, and the average; :attr:`ema_model` is another name of the latter.
    initted, step : torch.Tensor
        See :class:`EMA`: all that is in ``state_dict()``, as in the peer. Save ``ema_pytree``
        beside.

    Examples
    --------
    >>> import torch
    >>> state = {"mean": torch.zeros(2), "count": torch.tensor(0)}
    >>> ema = EMAPytree(state, beta=0.5, update_after_step=0, update_every=1, min_value=0.5)
    >>> ema.update()
    >>> _ = state["mean"].add_(1.0), state["count"].add_(1)
    >>> ema.update()
    >>> ema.ema_pytree
    {'mean': tensor([0.5000, 0.5000]), 'count': tensor(1)}
    """

    def __init__(
        self,
        pytree: Any,
        ema_pytree: Any | Callable[[], Any] | None = None,
        beta: float | None = 0.9999,
        update_after_step: int = 100,
        update_every: int = 10,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        allow_different_devices: bool = False,
        coerce_dtype: bool = False,
        *,
        peer_exact: bool = False,
    ) -> None:
        super().__init__(peer_exact=peer_exact)
        self._set_schedule(beta, update_after_step, update_every, inv_gamma, power, min_value)
        self.allow_different_devices = allow_different_devices
        self.coerce_dtype = coerce_dtype
        self.online_pytree = [pytree]  # in a list, so that a module would be no submodule
        if callable(ema_pytree) and not isinstance(ema_pytree, nn.Module):
            ema_pytree = ema_pytree()
        self.ema_pytree = _copied(pytree) if ema_pytree is None else ema_pytree
        for tensor in _tensors(self.ema_pytree):
            tensor.detach_()
        self._held: tuple[list[Tensor], ModelAverager] | None = None
        self._register_counters()

    @property
    def pytree(self) -> Any:
        """The tree that is averaged."""
        return self.online_pytree[0]

    @property
    def ema_model(self) -> Any:
        """The average."""
        return self.ema_pytree

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The average; called, if it can be."""
        return self.ema_pytree(*args, **kwargs) if callable(self.ema_pytree) else self.ema_pytree

    def copy_params_from_pytree_to_ema(self) -> None:
        """Make the average what is followed; raises as :meth:`update`."""
        averager, current = self._paired(self.ema_pytree, self.pytree)
        averager.copy(current)

    def _copy(self) -> None:
        self.copy_params_from_pytree_to_ema()

    def _follow(self) -> None:
        self.update_moving_average(self.ema_pytree, self.pytree)

    def update_moving_average(
        self, ma_pytree: Any, current_pytree: Any, current_decay: float | None = None
    ) -> None:
        """``ma += (1 - decay) * (current - ma)``, by default of the schedule, unless frozen."""
        if not self.is_frozen:
            weight = self._weight(current_decay)
            averager, current = self._paired(ma_pytree, current_pytree)
            averager.update(current, weight, self._num_steps)

    def _paired(self, averaged: Any, current: Any) -> tuple[ModelAverager, list[Tensor]]:
        """Return the averager of two trees, and the tensors of the source."""
        ours, theirs = pytrees.tree_flatten(averaged), pytrees.tree_flatten(current)
        if ours[1] != theirs[1]:
            raise LayoutError(
                f"the average has the structure {ours[1]}, what it is to follow {theirs[1]}: make "
                "another average for it"
            )
        pairs = [
            (avg, x)
            for avg, x in zip(ours[0], theirs[0], strict=True)
            if isinstance(avg, Tensor) and isinstance(x, Tensor)
        ]
        tensors = [avg for avg, _ in pairs]
        held = self._held
        if held is None or len(held[0]) != len(tensors) or not all(map(is_, held[0], tensors)):
            held = self._held = tensors, ModelAverager(tensors, rounding=self._rounding)
        return held[1], [x for _, x in pairs]


EMATensor = EMAPytree


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytrees.tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _copied(tree: Any) -> Any:
    """A deep copy, of results of operations too."""
    results = {id(leaf): leaf for leaf in _tensors(tree) if not leaf.is_leaf}
    return deepcopy(tree, {key: leaf.detach().clone() for key, leaf in results.items()})
