"""Averages in a model for a while, and the raw weights back, wherever their tensors are by then.

Autograd is not told of it, as it is not by the peers, which write through ``.data``: a graph that
needs the weights, of a student while its teacher is asked, is right when they are back to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastema.bridges.registry import leaves_of
from fastema.errors import LayoutError, listed
from fastema.layout.group import Pair
from fastema.layout.spec import Leaves
from fastema.shadow.exchange import Exchange, exchanged, recovered

__all__ = ["InPlace", "Lent", "Loan", "tensors_of"]


class Loan(Protocol):
    """An average that a model can hold in place of its weights."""

    def apply(self) -> None:
        """Put the average into the model."""

    def take_back(self, averaged: Any, model: Any, *, moved: bool) -> None:
        """Put everything back where it was, and where it is now if it moved meanwhile.

        Raises
        ------
        LayoutError
            Naming the tensors that are gone or reshaped; all the others were put back.
        """

    def averages(self) -> dict[str, Tensor]:
        """The averages by name, copies of them where the model has them."""


def tensors_of(leaves: Leaves) -> dict[str, Tensor]:
    """The tensors of a container by name."""
    return {leaf.name: leaf.spec.owner for leaf in leaves.items}


def _alias(pair: Pair, names: dict[int, Tensor]) -> Pair:
    """The pair, held by other tensor objects: its memory stays where it is, whatever is moved."""
    dst, src = (names.setdefault(id(one), one.detach()) for one in (pair.dst.owner, pair.src.owner))
    return pair._replace(dst=pair.dst.kept_by(dst), src=pair.src.kept_by(src))


@torch.no_grad()
def _put(kept: Mapping[str, Tensor], container: Any) -> None:
    """Write what was kept into the tensors of a container that lie elsewhere by now."""
    now = tensors_of(leaves_of(container))
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


class InPlace:
    """Average and weights that change places.

    Parameters
    ----------
    pairs : sequence of Pair
        Checked, of averages and weights.
    averages, weights : mapping of str to Tensor
        The same, with all names of those that are tied.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        averages: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
    ) -> None:
        self._specs = {leaf.name: leaf.spec for leaf in leaves_of(dict(averages)).items}
        aliases: dict[int, Tensor] = {}
        self._pairs = [_alias(pair, aliases) for pair in pairs]
        self._averages, self._weights = (
            {name: aliases.setdefault(id(one), one.detach()) for name, one in side.items()}
            for side in (averages, weights)
        )
        self._exchange = Exchange(0, exchanged(self._pairs))
        self.keeps = self._exchange.keeps

    def apply(self) -> None:
        """See :class:`Loan`."""
        self._exchange.apply()

    def take_back(self, averaged: Any, model: Any, *, moved: bool) -> None:
        """See :class:`Loan`."""
        self._exchange.restore()
        if moved:
            try:
                _put(self._averages, averaged)
            finally:
                _put(self._weights, model)

    def averages(self) -> dict[str, Tensor]:
        """See :class:`Loan`."""
        shadows = recovered(self._pairs)
        found = {pair.dst: one for pair, one in zip(self._pairs, shadows, strict=True)}
        return {name: found[spec] for name, spec in self._specs.items()}


class Lent:
    """A copy of the average in the model, and copies of the weights beside it.

    Parameters
    ----------
    averages, weights : mapping of str to Tensor
        Of the same names; on different devices, say.
    """

    def __init__(self, averages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self._averages, self._weights = dict(averages), dict(weights)
        copies = {id(one): one.detach().clone() for one in self._weights.values()}
        self._raw = {name: copies[id(one)] for name, one in self._weights.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """See :class:`Loan`."""
        for name, weight in self._weights.items():
            weight.data.copy_(self._averages[name])

    def take_back(self, averaged: Any, model: Any, *, moved: bool) -> None:
        """See :class:`Loan`."""
        _put(self._raw, model)

    def averages(self) -> dict[str, Tensor]:
        """See :class:`Loan`."""
        return dict(self._averages)
