"""Where an average's weights come from: tensors of a model, paired with the average's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

from fastema.average.entries import Names
from fastema.average.matching import Matcher
from fastema.average.memory import Averages
from fastema.binding.binding import Binding
from fastema.binding.steady import SteadyRun
from fastema.binding.swap import MemorySwap, WriteWatch, way_of
from fastema.bridges.registry import describe, leaves_of
from fastema.engine.blocks import BlockSteps
from fastema.engine.program import Program
from fastema.errors import FastemaError, LayoutError, StateError, format_problems
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair
from fastema.layout.spec import Leaves

__all__ = ["AppliedSwap", "Weights", "weights_of"]

_ONCE: Final = "ema.update(params)"
"""How to pass new immutable arrays; quoted in errors."""


class AppliedSwap:
    """The average with number ``index``, while ``container`` holds it in place of its weights.

    ``watch`` is for the model, ``held`` for given tensors that hold the raw weights meanwhile.
    """

    def __init__(
        self,
        index: int,
        memory: MemorySwap,
        watch: WriteWatch,
        held: WriteWatch | None,
        container: Any,
    ) -> None:
        self.index, self.memory, self.watch = index, memory, watch
        self.held, self.container = held, container

    def apply(self) -> None:
        """Put the average into the model and watch for writes; call it with signals deferred."""
        self.memory.apply()
        try:
            self.watch.begin()
            if self.held is not None:
                self.held.begin()
        except BaseException:
            self.memory.restore()
            raise

    def restore(self) -> None:
        """Put the raw weights back; call it with signals deferred."""
        self.memory.restore()
        self.watch.end()
        if self.held is not None:
            self.held.end()

    def written(self) -> tuple[list[str], list[str]]:
        """Return the names of averages, and of raw weights, that were written since the swap."""
        return self.watch.written(), [] if self.held is None else self.held.written()


class Weights:
    """A model's tensors, which stay in place, are located at every call, or are replaced.

    The latter are immutable arrays, such as JAX's: those passed last are the model, and none are
    kept beside them. Another kind of weights is another class with these methods.

    Parameters
    ----------
    container : object
        The model.
    binding : Binding
        The model's tensors, paired with the average's memory.
    matcher : Matcher
    memory : Averages
    """

    def __init__(
        self, container: Any, binding: Binding, matcher: Matcher, memory: Averages
    ) -> None:
        self.own, self.binding = container, binding
        self._matcher, self._averaged, self._memory = matcher, memory.averaged, memory
        self.forget_replaced()

    @property
    def container(self) -> Any:
        """The model that the average was built from; for immutable arrays, those passed last."""
        return self.binding.container if self.own is None else self.own

    def forget_replaced(self) -> None:
        """Forget the average's own model, if the latest one has immutable arrays."""
        if self.binding.model.fixed:
            self.own = None

    # -- at a call --------------------------------------------------------------------------------

    def current(
        self, model: Any = None, *, write: bool = False, use: bool = False
    ) -> AbstractContextManager[Program]:
        """Return a block in which a program runs at the tensors' current addresses.

        All checks are done on entry; nothing is written.

        Parameters
        ----------
        model : optional
            Another model with the same tensors; by default the average's own.
        write : bool
            Whether the model is about to be written.
        use : bool
            True for an update. A second one of the same immutable arrays is an error.
        """
        model = self.own if model is None else model
        return self.binding.current(model, write=write, once=_ONCE if use else "")

    def begin_steady(self, operations: dict[str, str]) -> SteadyRun | None:
        """Return a native run of these operations over the average's own model, if there can be."""
        binding = self.binding
        if not binding.is_matched_with(self.own):
            return None
        return binding.begin_steady(operations, notifies=self._memory.moves)

    def notify(self) -> None:
        """Tell a framework that counts writes that averages in its tensors were written."""
        if self._memory.moves:
            self.binding.notify_write(0)

    def locate_averages(self) -> None:
        """Find averages in tensors of their owner again if they have moved; read no weights."""
        binding, memory = self.binding, self._memory
        if not memory.moves:
            return
        if binding.have_averages_moved():
            memory.locate(leaves_of(memory.container))
        elif memory.located is not binding.watched[0]:  # they were elsewhere in the meantime
            memory.locate(binding.watched[0])

    def prepare_to_load(self) -> None:
        """Find averages that their owner moves; raise a LayoutError if they overlap the weights."""
        if self._memory.moves:
            with self.current():
                self.locate_averages()

    # -- pairs ------------------------------------------------------------------------------------

    def pair(self, name: str, index: int) -> Pair:
        """Return the pair of a tensor and one of its averages, at their current addresses."""
        binding = self.binding
        numbers = binding.cached(
            "numbers",
            lambda: {(p.name, p.average_index): n for n, p in enumerate(binding.pairs)},
        )
        return binding.pair_at(numbers[name, index if name in self._averaged else 0])

    def of(self, index: int) -> list[Pair]:
        """Return the pairs of one average, including copied tensors."""
        averaged = self._averaged
        pairs = self.binding.pairs
        return [p for p in pairs if p.name not in averaged or p.average_index == index]

    def is_unmoved(self, name: str) -> bool:
        """Return whether a weight and the averages that move are at their recorded addresses.

        False if the weight's framework moves it.
        """
        if self._memory.moves and self.binding.have_averages_moved():
            return False
        spec = self.binding.weights[name]
        try:
            return not self.binding.model.moving and describe(spec.owner) == spec
        except FastemaError:  # the tensor has no memory now
            return False

    # -- the average in the model -----------------------------------------------------------------

    def swap(self, index: int) -> AppliedSwap:
        """Return the swap of one average with the model; cached unless it copied raw weights."""
        binding = self.binding
        if binding.model.fixed:
            raise LayoutError(
                "immutable arrays (JAX, read-only NumPy) cannot be swapped in place: "
                "'with ema.swapped() as weights:' and ema.averaged() give new arrays\n"
                + format_problems(repr(name) for name in binding.model.fixed)
            )
        key = "swap", index
        swap: AppliedSwap = binding.cached(key, partial(self._build_swap, index))
        if swap.memory.has_copies or binding.model.moving:
            binding.forget(key)
        swap.container = binding.container
        return swap

    def _build_swap(self, index: int) -> AppliedSwap:
        binding = self.binding
        roles = binding.model.roles
        trained = {name for name in self._averaged if roles[name] != "buffer"}
        watch = binding.cached("watch", lambda: WriteWatch(binding.weights, trained))
        held = binding.cached("held", self._watch_averages) if self._memory.moves else None
        return AppliedSwap(index, MemorySwap(self.of(index)), watch, held, binding.container)

    def _watch_averages(self) -> WriteWatch:
        specs = {p.name: p.dst for p in self.binding.pairs if way_of(p) in ("bits", "park")}
        return WriteWatch(specs, {*specs})

    @contextmanager
    def holding(self, swap: AppliedSwap) -> Iterator[None]:
        """Return a block for a swap that is applied, relocated if the model's tensors have moved.

        The model may have new tensors, but the old ones must be there, in their old dtypes.
        """
        binding, watch = self.binding, swap.watch
        with binding.current(swap.container, write=True, match=self._matcher.match_subset):
            now = binding.weights
            if now is not watch.now or binding.model.moving:
                problems = [
                    f"{name!r} was {was.dtype} and is {now[name].dtype}"
                    for name, was in watch.weights.items()
                    if now[name].dtype != was.dtype
                ]
                if problems:
                    raise StateError(
                        "the model changed its dtype while the average was applied:\n"
                        + format_problems(problems)
                        + "\nChange it back, then restore(): the raw weights are kept exactly, the "
                        "average only as the other dtype left it."
                    )
                swap.memory.relocate(self.of(swap.index))
                watch.now = now
                if swap.held is not None:
                    averages = {pair.name: pair.dst for pair in self.of(swap.index)}
                    swap.held.now = {name: averages[name] for name in swap.held.weights}
            yield

    def block(
        self, swap: Callable[[], BlockSteps[Any]], averaged: Callable[[], Any]
    ) -> BlockSteps[Any]:
        """Return what a ``swapped()`` block does: it swaps, or gives new arrays if it must."""
        return BlockSteps(averaged, lambda: None) if self.binding.model.fixed else swap()

    # -- NaN and infinity -------------------------------------------------------------------------

    def find_nonfinite(self) -> list[str]:
        """Return the names of weights and copied floats that hold a NaN or an infinity.

        Tensors whose copy already holds one, such as a mask of infinities, are not checked.
        """
        names, program = self._finite()
        addresses = self.binding.addresses
        if addresses:
            program.relocate(addresses, addresses)
        program.run({"all": "finite"})
        return [] if program.all_finite() else _find_nonfinite(self._sources(names))

    def flag_nonfinite(self, args: LaunchArgs) -> None:
        """Make the device's counter skip the next update if a weight is not finite.

        Checks the same tensors as :meth:`find_nonfinite`, without waiting for the device.
        """
        self._finite()[1].run({"all": "finite"}, args)

    def prepare_flag(self) -> None:
        """Load the kernels that :meth:`flag_nonfinite` runs."""
        self._finite()[1].prepare({"all": "finite"})

    def _finite(self) -> tuple[set[str], Program]:
        """Return the names of the tensors that must be finite, and the program that reads them."""
        return self.binding.cached("finite", self._build_finite)

    def _build_finite(self) -> tuple[set[str], Program]:
        pairs = self.binding.pairs
        copied = [p for p in pairs if p.name not in self._averaged and p.src.kind.real]
        odd = _find_nonfinite([Pair(p.name, p.dst, p.dst) for p in copied])
        names = self._averaged | {p.name for p in copied} - {*odd}
        return names, Program({"all": self._sources(names)})

    def _sources(self, names: set[str]) -> list[Pair]:
        # Weights on both sides: the check does not read the averages.
        pairs = (p for p in self.binding.pairs if p.name in names and not p.average_index)
        return [Pair(p.name, p.src, p.src) for p in pairs]


def _find_nonfinite(pairs: list[Pair]) -> list[str]:
    """Return the names of pairs whose source holds a NaN or an infinity."""
    program = Program({"all": pairs})
    program.run({"all": "finite"})
    if program.all_finite():
        return []
    return [pairs[0].name] if len(pairs) == 1 else [n for p in pairs for n in _find_nonfinite([p])]


def weights_of(
    container: Any, memory: Averages, names: Names, leaves: Leaves | None = None
) -> Weights:
    """Return the weights of a model, paired with the memory of their average.

    ``leaves`` are the model's, if the memory was allocated for them just now.
    """
    matcher = Matcher(memory, names)
    binding = Binding(
        memory.container, container, matcher.match_exactly, leaves=leaves, transient=False
    )
    return Weights(container, binding, matcher, memory)
