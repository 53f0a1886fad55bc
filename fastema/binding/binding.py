"""Bind an average to a model: pairs by name, and a program that runs at current addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias, TypeVar

from fastema.binding.sides import (
    NO_LEAVES,
    UNMOVED,
    FreezeState,
    MovingSide,
    OwnedSide,
    Side,
    WatchedSide,
)
from fastema.binding.steady import SteadyRun
from fastema.bridges.moving import Located
from fastema.bridges.registry import (
    bridge_of,
    leaves_of,
    list_iterators,
    openmp_of,
    refuse_emptied,
    reshard,
    write_listeners,
)
from fastema.engine.cuda import refuse_forked
from fastema.engine.interrupts import defer_signals
from fastema.engine.program import Program
from fastema.engine.threads import use_openmp
from fastema.errors import LayoutError
from fastema.layout.device_context import DeviceContext
from fastema.layout.group import OverlapGuard, Pair, refuse_overlap
from fastema.layout.spec import Leaves, Role, Structure, TensorSpec

__all__ = ["Binding", "Match", "Matcher", "Outline", "can_be_assigned", "is_immutable"]

Result = TypeVar("Result")


class Match(NamedTuple):
    """The pairs that a matcher selected from the tensors of average and model.

    Attributes
    ----------
    pairs : mapping of str to sequence of Pair
        Checked pairs by program tag, tied weights once, all averages of a tensor in a row.
    dst, src : Leaves
        Tensors to watch.
    trained : sequence of FreezeState
        Parameters whose freezing or unfreezing requires a new match.
    """

    pairs: Mapping[str, Sequence[Pair]]
    dst: Leaves
    src: Leaves
    trained: Sequence[FreezeState] = ()


Matcher: TypeAlias = Callable[[Leaves, Leaves], Match]
"""``match(average, model)`` selects and checks pairs; it raises if the two do not fit."""


def can_be_assigned(spec: TensorSpec) -> bool:
    """Return whether a tensor's owner takes a new array, since its memory cannot be written."""
    return not spec.writable and hasattr(bridge_of(spec.owner), "assign")


def is_immutable(spec: TensorSpec) -> bool:
    """Return whether a tensor is immutable, so that each step replaces it."""
    return not (spec.writable or can_be_assigned(spec))


class Outline(NamedTuple):
    """Properties of a model that stay while its tensors change.

    ``order`` lists all names in the container's order. ``fixed`` lists the immutable tensors among
    the pairs, which each step replaces.
    """

    order: list[str]
    roles: dict[str, Role]
    structure: Structure | None
    moving: bool
    fixed: list[str]


@dataclass(eq=False)
class _BoundState:
    """Both sides as matched, and the addresses that the current call has located."""

    containers: tuple[Any, Any]
    match: Matcher
    pairs_by_tag: Mapping[str, Sequence[Pair]]
    pairs: list[Pair]
    program: Program
    sides: tuple[Side, Side]
    model: Outline
    labels: tuple[str, str]
    contexts: list[DeviceContext]  # devices of the weights, without the host
    guard: OverlapGuard | None  # None if neither side moves
    located: tuple[Located, Located] = (UNMOVED, UNMOVED)
    steady: dict[tuple[str, ...], SteadyRun] = field(default_factory=dict)
    cached: dict[Any, Any] = field(default_factory=dict)  # values derived from these pairs

    def find(self, container: Any, write: bool) -> tuple[Located, Located] | None:
        """Return the locations of both sides; None if one must be matched again."""
        ours, theirs = self.sides
        dst = UNMOVED if self.containers[0] is None else ours.find(self.containers[0], write=True)
        src = None if dst is None else theirs.find(container, write=write)
        return None if dst is None or src is None else (dst, src)

    def relocate(self, container: Any, located: tuple[Located, Located]) -> None:
        """Point the program to the located tensors; raise a LayoutError if written ones overlap."""
        if self.guard is not None:
            dst, src = (one.addresses or None for one in located)
            if self.guard.may_overlap(dst, src):
                _check_overlap([_relocate_pair(pair, located) for pair in self.pairs], self.labels)
            self.program.relocate(dst, src)
            self.located = located
        self.containers = self.containers[0], container


def _relocate_pair(pair: Pair, located: tuple[Located, Located]) -> Pair:
    dst, src = (one.addresses.get(pair.name) for one in located)
    return pair._replace(
        dst=pair.dst if dst is None else pair.dst.at(dst),
        src=pair.src if src is None else pair.src.at(src),
    )


def _check_overlap(pairs: Sequence[Pair], labels: tuple[str, str]) -> None:
    refuse_overlap(
        [(f"{labels[0]}{pair.name}", pair.dst) for pair in pairs],
        [(f"{labels[1]}{pair.name}", pair.src) for pair in pairs if not pair.average_index],
    )


def _drop_owner(pair: Pair, fixed: set[str]) -> Pair:
    """Drop the reference to an immutable tensor: together they would keep a copy of the model."""
    return pair._replace(src=pair.src.with_owner(None)) if pair.name in fixed else pair


class _CurrentBlock:
    """Context manager that :meth:`Binding.current` returns."""

    __slots__ = ("_before", "_binding", "_match", "_once", "_src", "_write")

    def __init__(
        self, binding: Binding, src: Any, write: bool, once: str, match: Matcher | None
    ) -> None:
        self._binding, self._src, self._write = binding, src, write
        self._once, self._match = once, match

    def __enter__(self) -> Program:
        binding = self._binding
        self._before = binding._bound
        bound = binding._locate(self._src, self._write, self._match)
        if self._once and self._src is None and bound.guard is not None:
            bound.sides[1].refuse_used(bound.located[1], self._once)
        binding._use(bound)
        return bound.program

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        binding = self._binding
        bound = binding._bound
        if kind is not None:  # the next call continues with the previous tensors
            binding._use(self._before)
        if bound.guard is not None:
            if kind is None and self._once:
                bound.sides[1].record_used(bound.located[1])
            bound.located = UNMOVED, UNMOVED  # let the framework reuse the memory


class Binding:
    """Pairs an average's tensors with a model's, and locates them at every call.

    Roles and policies are up to ``match``, which is called again whenever tensors have moved or
    were replaced.

    Parameters
    ----------
    dst : container, optional
        The average, which is written; None if fastema owns its memory, known to ``match``.
    src : container
        The model.
    match : callable
        Selects the pairs; see :data:`Matcher`.
    labels : (str, str)
        Prefixes of tensor names of ``dst`` and ``src`` in errors.
    look : callable
        ``container -> Leaves``.
    leaves : Leaves, optional
        The model's leaves, if already known. An average that fastema owns was then allocated for
        them just now, and overlaps nothing.
    transient : bool
        Whether tensors outside of a module's state dict are watched, too.
    keep : bool
        False if :meth:`forget_container` is called: then nothing of the model may be kept alive.
    """

    def __init__(
        self,
        dst: Any,
        src: Any,
        match: Matcher,
        *,
        labels: tuple[str, str] = ("average of ", ""),
        look: Callable[[Any], Leaves] = leaves_of,
        leaves: Leaves | None = None,
        transient: bool = True,
        keep: bool = True,
    ) -> None:
        self._match, self._labels, self._look = match, labels, look
        self._transient, self._keep = transient, keep
        self._bound = self._bind((dst, src), match, leaves)

    def _bind(
        self, containers: tuple[Any, Any], match: Matcher, leaves: Leaves | None = None
    ) -> _BoundState:
        """Describe the tensors of both sides and pair them."""
        owned = containers[0] is None
        dst = NO_LEAVES if owned else self._look(containers[0])
        src = self._look(containers[1]) if leaves is None else leaves
        team = openmp_of(leaf.spec.owner for leaf in src.items)
        if team is not None:
            use_openmp(*team)
        found = match(dst, src)
        pairs_by_tag = found.pairs
        refuse_emptied(
            {
                pair.name: pair.src
                for members in pairs_by_tag.values()
                for pair in members
                if pair.src.kind.real is not None
            }
        )
        fixed = [
            pair.name
            for members in pairs_by_tag.values()
            for pair in members
            if not pair.average_index and is_immutable(pair.src)
        ]
        if src.moving:
            names = {*fixed}
            pairs_by_tag = {
                tag: [_drop_owner(pair, names) for pair in pairs_by_tag[tag]]
                for tag in pairs_by_tag
            }
        pairs = [pair for members in pairs_by_tag.values() for pair in members]
        if not owned or leaves is None:
            _check_overlap(pairs, self._labels)
        sides: list[Side] = []
        for container, whole, watched, trained, keep in (
            (containers[0], dst, found.dst, (), True),
            (containers[1], src, found.src, found.trained, self._keep),
        ):
            if whole is NO_LEAVES:
                sides.append(OwnedSide())
            elif whole.moving:
                sides.append(MovingSide(whole, container))
            else:
                sides.append(
                    WatchedSide(watched, container, trained, transient=self._transient, keep=keep)
                )
        guard = None
        if dst.moving or src.moving:
            guard = OverlapGuard(
                [(pair.name, pair.dst) for pair in pairs],
                [(pair.name, pair.src) for pair in pairs if not pair.average_index],
            )
        return _BoundState(
            containers,
            match,
            pairs_by_tag,
            pairs,
            Program(pairs_by_tag, on_team=team is not None),
            (sides[0], sides[1]),
            Outline(src.names, src.roles, src.structure, src.moving, fixed),
            self._labels,
            [*{p.src.device: p.src.context for p in pairs if p.src.context is not None}.values()],
            guard,
        )

    def current(
        self,
        src: Any = None,
        *,
        write: bool = False,
        once: str = "",
        match: Matcher | None = None,
    ) -> _CurrentBlock:
        """Return a context manager that locates all tensors and yields the program for them.

        ``with binding.current(model) as program``: in the block the program runs at the current
        addresses. If the block raises, the next call continues with the previous tensors.

        Parameters
        ----------
        src : container, optional
            The model, by default the latest one.
        write : bool
            Whether the model is about to be written.
        once : str
            If not empty, immutable arrays that an earlier block has used are refused; the string
            tells the user how to pass new ones.
        match : callable, optional
            A matcher to use for this call instead of the binding's own.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            If the tensors no longer match; nothing was written.
        ArgumentError
            For immutable arrays that were used already.
        """
        return _CurrentBlock(self, src, write, once, match)

    def _locate(self, src: Any, write: bool, match: Matcher | None) -> _BoundState:
        bound = self._bound
        match = match or self._match
        container = bound.containers[1]
        if src is not None and src is not container:
            container = list_iterators(src)
        if write:
            reshard(container)
        for _ in range(3):
            fits = bound.match in (match, self._match)
            located = bound.find(container, write) if fits else None
            if located is not None:
                if bound.guard is not None or container is not bound.containers[1]:
                    bound.relocate(container, located)
                return bound
            bound = self._bind((bound.containers[0], container), match)
        raise LayoutError("another thread keeps replacing the tensors of the model")

    def _use(self, bound: _BoundState) -> None:
        """Make these the tensors as last matched."""
        if bound is not self._bound:
            # A signal handler may have matched others since this call began.
            with defer_signals():
                for steady in self._bound.steady.values():
                    steady.run.set_steps([])  # the tensors that it checks may be freed
                self._bound = bound

    def begin_steady(
        self, operations: Mapping[str, str], *, notifies: bool = False
    ) -> SteadyRun | None:
        """Return a native run of these operations over the tensors as last matched.

        None if there can be none: with tensors on a GPU, or that move at every step. With
        ``notifies``, each step also does what ``notify_write(0)`` does.
        """
        bound = self._bound
        if bound.guard is not None or bound.contexts:
            return None
        key = tuple(operations.values())
        if key not in bound.steady:
            sides = bound.sides
            run = bound.program.native(operations, [task for one in sides for task in one.tasks])
            checks = [check for one in sides for check in one.checks]
            roots = [root for one in sides for root in one.roots]
            listeners = self._write_listeners(0) if notifies else ()
            bound.steady[key] = SteadyRun(run, checks, listeners, roots)
        return bound.steady[key]

    def is_present(self, steady: SteadyRun) -> bool:
        """Return whether a run is for the tensors as last matched."""
        return steady in self._bound.steady.values()

    def accepts(self, src: Any) -> bool:
        """Return whether ``src`` is the model as last matched, or a list of the same tensors.

        It is the model from then on, unless that is forgotten. None stands for the latest one.
        """
        bound = self._bound
        latest = bound.containers[1]
        if not bound.sides[1].is_same_container(latest if src is None else src):
            return False
        if latest is not None and src is not None:
            bound.containers = bound.containers[0], src
        return True

    def is_matched_with(self, src: Any) -> bool:
        """Return whether ``src`` itself was matched last, whose changes the checks see."""
        return self._bound.sides[1].is_watching(src)

    # -- properties -------------------------------------------------------------------------------

    @property
    def watched(self) -> tuple[Leaves, Leaves]:
        """Watched tensors of average and model, as described at the latest match."""
        dst, src = self._bound.sides
        return dst.leaves, src.leaves

    @property
    def check_tables(self) -> tuple[Any, Any]:
        """The memory of the compiled checks of average and model; None for a side without any."""
        dst, src = self._bound.sides
        return dst.tables, src.tables

    def have_averages_moved(self) -> bool:
        """Return whether tensors of the average have moved or were replaced."""
        bound = self._bound
        return bound.sides[0].find(bound.containers[0], write=False) is None

    def has_moved(self, src: Any) -> bool:
        """Return whether tensors have moved or were replaced."""
        return self._bound.find(src, write=False) is None

    @property
    def container(self) -> Any:
        """The model of the latest call; None after :meth:`forget_container`."""
        return self._bound.containers[1]

    def forget_container(self) -> None:
        """Drop the reference to the model; the next call must pass it."""
        self._bound.containers = self._bound.containers[0], None

    @property
    def model(self) -> Outline:
        """Properties of the model that stay while its tensors change."""
        return self._bound.model

    @property
    def pairs(self) -> list[Pair]:
        """All pairs; inside a block of :meth:`current` at their current addresses."""
        bound = self._bound
        if bound.guard is None:
            return bound.pairs
        return [_relocate_pair(pair, bound.located) for pair in bound.pairs]

    def pair_at(self, number: int) -> Pair:
        """Return the pair at one index of :attr:`pairs`."""
        return _relocate_pair(self._bound.pairs[number], self._bound.located)

    @property
    def pairs_by_tag(self) -> Mapping[str, Sequence[Pair]]:
        """Pairs by tag, as described at the latest match."""
        return self._bound.pairs_by_tag

    @property
    def addresses(self) -> Mapping[str, int]:
        """Current addresses of the model's tensors by name; empty if they do not move."""
        return self._bound.located[1].addresses

    @property
    def weights(self) -> dict[str, TensorSpec]:
        """The model's tensors by name, as described at the latest match."""
        return self.cached(
            "weights", lambda: {p.name: p.src for p in self._bound.pairs if not p.average_index}
        )

    @property
    def contexts(self) -> dict[str, DeviceContext | None]:
        """Contexts of the weights' devices; None for the host."""
        return {pair.src.device: pair.src.context for pair in self._bound.pairs}

    def cached(self, key: Any, make: Callable[[], Result]) -> Result:
        """Return ``make()``, cached until the tensors are matched again."""
        cached = self._bound.cached
        if key not in cached:
            cached[key] = make()
        found: Result = cached[key]
        return found

    def forget(self, key: Any) -> None:
        """Drop a value from the cache of :meth:`cached`."""
        self._bound.cached.pop(key, None)

    def notify_write(self, *sides: int) -> None:
        """Notify frameworks that count writes; side 0 is the average, side 1 the model."""
        for side in sides:
            for notify, arrays in self._write_listeners(side):
                notify(arrays)

    def _write_listeners(self, side: int) -> list[Any]:
        return self.cached(
            ("listeners", side),
            lambda: write_listeners((pair.dst, pair.src)[side].owner for pair in self._bound.pairs),
        )

    def capturing(self) -> bool:
        """Return whether a weights' device is capturing its work into a graph."""
        contexts = self._bound.contexts
        if not contexts:
            return False
        refuse_forked()  # clearer than the framework's own error
        return any(context.capturing() for context in contexts)

    def wait(self) -> None:
        """Wait for all work on the weights' devices."""
        for context in self._bound.contexts:
            context.wait()
