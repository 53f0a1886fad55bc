"""``ema_pytorch.EMAPytree``: an average of tensors in nested lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytrees

from fastema.compat.averager import ModelAverager
from fastema.compat.ema_pytorch.schedule import ScheduledDecayModule
from fastema.errors import LayoutError

__all__ = ["EMAPytree", "EMATensor"]


class EMAPytree(ScheduledDecayModule):
    """An exponential moving average of the tensors in nested lists, tuples and dicts.

    Every ``update_every``-th call of :meth:`update` computes ``avg += (1 - decay) *
    (x - avg)``. Trees of different structure raise a LayoutError.

    Parameters
    ----------
    pytree : tensor, or nested list, tuple or dict of tensors
        The tensors to average, which their owner writes in place. Other leaves are ignored.
    ema_pytree : tree like ``pytree``, or callable, optional
        The tree that holds the average, or a function that returns it; a deep copy by default.
    allow_different_devices, coerce_dtype : bool
        Accepted and ignored: devices and dtypes may always differ.
    beta, update_after_step, update_every, inv_gamma, power, min_value, peer_exact
        See :class:`EMA`.

    Attributes
    ----------
    pytree, ema_pytree
        The averaged tensors, and the average; :attr:`ema_model` is another name of the average.
    initted, step : torch.Tensor
        See :class:`EMA`. As in the peer, ``state_dict()`` has only these two: save ``ema_pytree``
        separately.

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
        self.online_pytree = [pytree]  # a list keeps a module from becoming a submodule
        if callable(ema_pytree) and not isinstance(ema_pytree, nn.Module):
            ema_pytree = ema_pytree()
        self.ema_pytree = _deepcopy_tree(pytree) if ema_pytree is None else ema_pytree
        for tensor in _list_tensors(self.ema_pytree):
            tensor.detach_()
        self._cached_averager: tuple[list[Tensor], ModelAverager] | None = None
        self._register_counters()

    @property
    def pytree(self) -> Any:
        """The tree of tensors to average."""
        return self.online_pytree[0]

    @property
    def ema_model(self) -> Any:
        """The average, as ``ema_pytree``."""
        return self.ema_pytree

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the average or, if it is callable, the result of calling it."""
        return self.ema_pytree(*args, **kwargs) if callable(self.ema_pytree) else self.ema_pytree

    def copy_params_from_pytree_to_ema(self) -> None:
        """Copy the source tensors into the average; raises the same errors as :meth:`update`."""
        averager, current = self._match_trees(self.ema_pytree, self.pytree)
        averager.copy(current)

    def _copy_weights(self) -> None:
        self.copy_params_from_pytree_to_ema()

    def _update_average(self) -> None:
        self.update_moving_average(self.ema_pytree, self.pytree)

    def update_moving_average(
        self, ma_pytree: Any, current_pytree: Any, current_decay: float | None = None
    ) -> None:
        """Compute ``ma += (1 - decay) * (current - ma)``, unless the average is frozen.

        ``current_decay`` defaults to the schedule's decay.
        """
        if not self.is_frozen:
            weight = self._weight(current_decay)
            averager, current = self._match_trees(ma_pytree, current_pytree)
            averager.update(current, weight, self._num_steps)

    def _match_trees(self, averaged: Any, current: Any) -> tuple[ModelAverager, list[Tensor]]:
        """Return the averager of ``averaged``, and the tensors of ``current`` that match it."""
        ours, theirs = pytrees.tree_flatten(averaged), pytrees.tree_flatten(current)
        if ours[1] != theirs[1]:
            raise LayoutError(
                f"the average has the structure {ours[1]}, but its source has {theirs[1]}: create "
                "another average for it"
            )
        pairs = [
            (avg, x)
            for avg, x in zip(ours[0], theirs[0], strict=True)
            if isinstance(avg, Tensor) and isinstance(x, Tensor)
        ]
        tensors = [avg for avg, _ in pairs]
        held = self._cached_averager
        if held is None or len(held[0]) != len(tensors) or not all(map(is_, held[0], tensors)):
            held = self._cached_averager = tensors, ModelAverager(tensors, rounding=self._rounding)
        return held[1], [x for _, x in pairs]


EMATensor = EMAPytree


def _list_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytrees.tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _deepcopy_tree(tree: Any) -> Any:
    """Return a deep copy, also of results of operations, which ``deepcopy`` alone refuses."""
    results = {id(leaf): leaf for leaf in _list_tensors(tree) if not leaf.is_leaf}
    return deepcopy(tree, {key: leaf.detach().clone() for key, leaf in results.items()})
