"""The binding of a stored average to a model's tensors."""

from __future__ import annotations

from typing import Any, Final

from fastema.average.entries import Names
from fastema.average.matching import refuse_other_model
from fastema.average.store import Store
from fastema.binding.binding import Binding, Match
from fastema.binding.sides import FreezeState
from fastema.binding.swap import MemorySwap, Swap, WatchedSwap, WriteWatch
from fastema.bridges.registry import describe
from fastema.engine.program import Program
from fastema.errors import FastemaError, LayoutError, format_problems
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_shared_elements
from fastema.layout.spec import Leaves

__all__ = ["SYNC", "ShadowBinding", "ShadowSwap"]

SYNC: Final = {"averaged": "copy", "copied": "copy"}
"""Kernel operations that copy the weights into all averages and copied tensors."""


class ShadowSwap(Swap):
    """Swap of the average with number ``index`` into a model."""

    def __init__(self, index: int, memory: MemorySwap, watch: WriteWatch, container: Any) -> None:
        super().__init__(WatchedSwap(memory, watch))
        self.index, self.memory, self.watch, self.container = index, memory, watch, container


class _Matcher:
    """Pairs averages with a model's tensors. It holds no reference to the binding: no cycle."""

    def __init__(self, store: Store, names: Names) -> None:
        self.store, self.names = store, names
        self.averaged = {name for name, entry in store.sets[0].items() if entry.averaged}

    def match_exactly(self, _: Leaves, model: Leaves) -> Match:
        return self._match_leaves(model, match_subset=False)

    def match_subset(self, _: Leaves, model: Leaves) -> Match:
        """Match a model that may have new or unfrozen tensors: to restore its weights."""
        return self._match_leaves(model, match_subset=True)

    def _match_leaves(self, model: Leaves, *, match_subset: bool) -> Match:
        entries, names = self.store.sets[0], self.names
        refuse_other_model(model, entries, names, match_subset=match_subset)
        found = {leaf.name: leaf for leaf in model.items}
        pairs = self.store.pairs({name: found[name].spec for name in entries})
        for pair in pairs:
            check_pair(pair)
            refuse_shared_elements(pair.name, pair.src)
        # A swap writes the weights: writable ones must not overlap.
        weights = [(pair.name, pair.src) for pair in pairs if not pair.average_index]
        refuse_overlap([one for one in weights if one[1].writable])
        parts: dict[str, list[Pair]] = {"averaged": [], "copied": []}
        for pair in pairs:
            parts["averaged" if pair.name in self.averaged else "copied"].append(pair)
        frozen = [
            FreezeState(leaf.spec.owner, before=False)
            for leaf in model.items
            if leaf.role == "frozen" and names.must_stay_frozen(leaf.name)
        ]
        return Match(parts, model, model.select_names({*entries, *names.aliases}), frozen)


class ShadowBinding(Binding):
    """Pairs stored averages with the tensors of a model."""

    def __init__(
        self,
        container: Any,
        store: Store,
        names: Names,
        leaves: Leaves | None = None,
    ) -> None:
        matcher = _Matcher(store, names)
        self._averaged, self.match_subset = matcher.averaged, matcher.match_subset
        super().__init__(None, container, matcher.match_exactly, leaves=leaves)

    # -- pairs ------------------------------------------------------------------------------------

    def pair(self, name: str, index: int) -> Pair:
        """Return the pair of a tensor and one of its averages."""
        numbers = self.cached(
            "numbers",
            lambda: {(p.name, p.average_index): n for n, p in enumerate(self._bound.pairs)},
        )
        return self.pair_at(numbers[name, index if name in self._averaged else 0])

    def of(self, index: int) -> list[Pair]:
        """Return the pairs of one average, including copied tensors."""
        return [p for p in self.pairs if p.name not in self._averaged or p.average_index == index]

    def is_unmoved(self, name: str) -> bool:
        """Return whether a weight is at its recorded address; False if its framework moves it."""
        spec = self.weights[name]
        try:
            return not self.model.moving and describe(spec.owner) == spec
        except FastemaError:  # the tensor has no memory now
            return False

    def swap(self, index: int) -> ShadowSwap:
        """Return the swap of one average with the model; cached unless it copied raw weights."""
        model = self.model
        if model.fixed:
            raise LayoutError(
                "immutable arrays (JAX, read-only NumPy) cannot be swapped in place: "
                "'with ema.swapped() as weights:' and ema.averaged() give new arrays\n"
                + format_problems(repr(name) for name in model.fixed)
            )
        key = "swap", index
        swap = self.cached(key, lambda: self._build_swap(index))
        if swap.memory.has_copies or model.moving:
            self.forget(key)
        swap.container = self.container
        return swap

    def _build_swap(self, index: int) -> ShadowSwap:
        roles = self.model.roles
        trained = {name for name in self._averaged if roles[name] != "buffer"}
        watch = self.cached("watch", lambda: WriteWatch(self.weights, trained))
        return ShadowSwap(index, MemorySwap(self.of(index)), watch, self.container)

    # -- NaN and infinity -------------------------------------------------------------------------

    def find_nonfinite(self) -> list[str]:
        """Return the names of weights and copied floats that hold a NaN or an infinity.

        Tensors whose copy already holds one, such as a mask of infinities, are not checked.
        """
        names, program = self.cached("finite", self._finite_program)
        if self.addresses:
            program.relocate(self.addresses, self.addresses)
        program.run({"all": "finite"})
        return [] if program.all_finite() else _find_nonfinite(self._sources(names))

    def flag_nonfinite(self, args: LaunchArgs) -> None:
        """Make the device's counter skip the next update if a weight is not finite.

        Checks the same tensors as :meth:`find_nonfinite`, without waiting for the device.
        """
        _, program = self.cached("finite", self._finite_program)
        program.run({"all": "finite"}, args)

    def prepare_flag(self) -> None:
        """Load the kernels that :meth:`flag_nonfinite` runs."""
        _, program = self.cached("finite", self._finite_program)
        program.prepare({"all": "finite"})

    def _finite_program(self) -> tuple[set[str], Program]:
        copied = [p for p in self.pairs if p.name not in self._averaged and p.src.kind.real]
        odd = _find_nonfinite([Pair(p.name, p.dst, p.dst) for p in copied])
        names = self._averaged | {p.name for p in copied} - {*odd}
        return names, Program({"all": self._sources(names)})

    def _sources(self, names: set[str]) -> list[Pair]:
        # Weights on both sides: the check does not read the averages.
        pairs = (p for p in self.pairs if p.name in names and not p.average_index)
        return [Pair(p.name, p.src, p.src) for p in pairs]


def _find_nonfinite(pairs: list[Pair]) -> list[str]:
    """Return the names of pairs whose source holds a NaN or an infinity."""
    program = Program({"all": pairs})
    program.run({"all": "finite"})
    if program.all_finite():
        return []
    return [pairs[0].name] if len(pairs) == 1 else [n for p in pairs for n in _find_nonfinite([p])]
