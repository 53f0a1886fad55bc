"""An average tied to a model: pairs by name, and a program that runs where both lie now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias, TypeVar

from fastema.binding.sides import NOTHING, STAYED, Moving, Owned, Side, Trained, Watched
from fastema.bridges.moving import Located
from fastema.bridges.registry import bridge_of, leaves_of, materialised, reshard, write_listeners
from fastema.engine.cuda import refuse_forked
from fastema.engine.program import Program
from fastema.errors import LayoutError
from fastema.layout.device_context import DeviceContext
from fastema.layout.group import OverlapGuard, Pair, refuse_overlap
from fastema.layout.spec import Leaves, Role, Structure, TensorSpec

__all__ = ["Binding", "Match", "Matcher", "Outline", "can_be_assigned", "is_fixed"]

Result = TypeVar("Result")


class Match(NamedTuple):
    """The pairs that a surface selected from the tensors of both sides.

    ``pairs`` are checked, each memory once, by the tag under which the program knows them; averages
    that are updated together follow each other, tensor by tensor. ``dst`` and ``src`` are to be
    watched. Another match is made if a parameter in ``trained`` is frozen or unfrozen.
    """

    pairs: Mapping[str, Sequence[Pair]]
    dst: Leaves
    src: Leaves
    trained: Sequence[Trained] = ()


Matcher: TypeAlias = Callable[[Leaves, Leaves], Match]
"""``match(average, model)``: the selection of a surface; it raises if the two do not fit."""


def can_be_assigned(spec: TensorSpec) -> bool:
    """Return whether the owner of a tensor is given another array instead of being written."""
    return not spec.writable and hasattr(bridge_of(spec.owner), "assign")


def is_fixed(spec: TensorSpec) -> bool:
    """Return whether a tensor never changes: the next step has another one in its place."""
    return not (spec.writable or can_be_assigned(spec))


class Outline(NamedTuple):
    """The parts of a model that stay while its tensors change.

    ``order`` has all names in the container's order. ``fixed`` names tensors in pairs that never
    change: the next step has others.
    """

    order: list[str]
    roles: dict[str, Role]
    structure: Structure | None
    moving: bool
    fixed: list[str]


@dataclass(eq=False)
class _Bound:
    """Both sides as they were looked at, and where they were found by the call that runs."""

    containers: tuple[Any, Any]
    match: Matcher
    tagged: Mapping[str, Sequence[Pair]]
    pairs: list[Pair]
    program: Program
    sides: tuple[Side, Side]
    model: Outline
    labels: tuple[str, str]
    contexts: list[DeviceContext]  # devices of the weights that are not the host
    guard: OverlapGuard | None  # if one of the sides moves
    located: tuple[Located, Located] = (STAYED, STAYED)
    cached: dict[Any, Any] = field(default_factory=dict)  # by others, for these pairs

    def find(self, container: Any, write: bool) -> tuple[Located, Located] | None:
        """Find both sides; None where one has to be looked at again."""
        ours, theirs = self.sides
        dst = STAYED if self.containers[0] is None else ours.find(self.containers[0], write=True)
        src = None if dst is None else theirs.find(container, write=write)
        return None if dst is None or src is None else (dst, src)

    def relocate(self, container: Any, located: tuple[Located, Located]) -> None:
        """Let the program run on what was found, unless a tensor lies where others are written."""
        if self.guard is not None:
            dst, src = (one.addresses or None for one in located)
            if self.guard.may_overlap(dst, src):
                _check_overlap([_relocated(pair, located) for pair in self.pairs], self.labels)
            self.program.relocate(dst, src)
            self.located = located
        self.containers = self.containers[0], container


def _relocated(pair: Pair, located: tuple[Located, Located]) -> Pair:
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


def _without_owner(pair: Pair, fixed: set[str]) -> Pair:
    """Do not keep a tensor that never changes: all of them are a copy of the model."""
    return pair._replace(src=pair.src.with_owner(None)) if pair.name in fixed else pair


class _Current:
    """See :meth:`Binding.current`."""

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
        binding._bound = bound
        return bound.program

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        binding = self._binding
        bound = binding._bound
        if kind is not None:  # the next call continues with the tensors of the one before
            binding._bound = self._before
        if bound.guard is not None:
            if kind is None and self._once:
                bound.sides[1].notify_used(bound.located[1])
            bound.located = STAYED, STAYED  # the memory is the framework's to reuse


class Binding:
    """Pairs an average's tensors with a model's, and finds them wherever they lie.

    It knows no roles and no policies: ``match`` selects, and is asked again whenever the tensors
    are no longer those that were looked at.

    Parameters
    ----------
    dst : container, optional
        What is written; None for memory of ours that stays where it is: ``match`` knows it.
    src : container
        The model.
    match : callable
    labels : (str, str)
        What errors put before the name of a tensor of ``dst`` and of ``src``.
    watch : type of Watched
    look : callable
        ``container -> Leaves``.
    leaves : Leaves, optional
        The model's, if it was just looked at.
    """

    def __init__(
        self,
        dst: Any,
        src: Any,
        match: Matcher,
        *,
        labels: tuple[str, str] = ("average of ", ""),
        watch: type[Watched] = Watched,
        look: Callable[[Any], Leaves] = leaves_of,
        leaves: Leaves | None = None,
    ) -> None:
        self._match, self._labels, self._watch, self._look = match, labels, watch, look
        self._bound = self._bind((dst, src), match, leaves)

    def _bind(
        self, containers: tuple[Any, Any], match: Matcher, leaves: Leaves | None = None
    ) -> _Bound:
        """Look at both sides and pair them."""
        owned = containers[0] is None
        dst = NOTHING if owned else self._look(containers[0])
        src = self._look(containers[1]) if leaves is None else leaves
        found = match(dst, src)
        tagged = found.pairs
        fixed = [
            pair.name
            for members in tagged.values()
            for pair in members
            if not pair.average_index and is_fixed(pair.src)
        ]
        if src.moving:
            names = {*fixed}
            tagged = {tag: [_without_owner(pair, names) for pair in tagged[tag]] for tag in tagged}
        pairs = [pair for members in tagged.values() for pair in members]
        _check_overlap(pairs, self._labels)
        sides: list[Side] = []
        for container, whole, watched, trained in (
            (containers[0], dst, found.dst, ()),
            (containers[1], src, found.src, found.trained),
        ):
            if whole is NOTHING:
                sides.append(Owned())
            elif whole.moving:
                sides.append(Moving(whole, container))
            else:
                sides.append(self._watch(watched, container, trained, transient=not owned))
        guard = None
        if dst.moving or src.moving:
            guard = OverlapGuard(
                [(pair.name, pair.dst) for pair in pairs],
                [(pair.name, pair.src) for pair in pairs if not pair.average_index],
            )
        return _Bound(
            containers,
            match,
            tagged,
            pairs,
            Program(tagged),
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
    ) -> _Current:
        """Find all tensors: ``with binding.current(model) as program``.

        The program runs where they lie now, in the block. If the block raises, the next call goes
        on as if there had not been one.

        Parameters
        ----------
        src : container, optional
            The model, if it is not the latest one.
        write : bool
            It is about to be written.
        once : str
            Arrays that never change are used by one block of this kind alone; the string says how
            to give others. Empty: they may be used again.
        match : callable, optional
            Besides the binding's own, for this call.

        Raises
        ------
        LayoutError, DTypeError, BridgeError
            If they are no longer the same; nothing was written.
        ArgumentError
            For used arrays.
        """
        return _Current(self, src, write, once, match)

    def _locate(self, src: Any, write: bool, match: Matcher | None) -> _Bound:
        bound = self._bound
        match = match or self._match
        container = bound.containers[1]
        if src is not None and src is not container:
            container = materialised(src)
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
        raise LayoutError("the tensors change while they are looked at, by another thread")

    # -- what the surfaces ask --------------------------------------------------------------------

    @property
    def watched(self) -> tuple[Leaves, Leaves]:
        """Both sides' tensors as they were looked at, of sides that are watched."""
        dst, src = self._bound.sides
        return dst.leaves, src.leaves

    def has_moved(self, src: Any) -> bool:
        """Return whether tensors are elsewhere than they were, or others."""
        return self._bound.find(src, write=False) is None

    @property
    def container(self) -> Any:
        """The model of the latest call; None after :meth:`forget_container`."""
        return self._bound.containers[1]

    def forget_container(self) -> None:
        """Do not keep the model alive; the next call has to give it."""
        self._bound.containers = self._bound.containers[0], None

    @property
    def model(self) -> Outline:
        """The parts of the model that stay while its tensors change."""
        return self._bound.model

    @property
    def pairs(self) -> list[Pair]:
        """All pairs; in a block of :meth:`current` where they lie now."""
        bound = self._bound
        if bound.guard is None:
            return bound.pairs
        return [_relocated(pair, bound.located) for pair in bound.pairs]

    def pair_at(self, number: int) -> Pair:
        """Return one of :attr:`pairs` by its number."""
        return _relocated(self._bound.pairs[number], self._bound.located)

    @property
    def tagged(self) -> Mapping[str, Sequence[Pair]]:
        """The pairs by tag, as they were looked at."""
        return self._bound.tagged

    @property
    def addresses(self) -> Mapping[str, int]:
        """Addresses of the model's tensors, by name, if they move."""
        return self._bound.located[1].addresses

    @property
    def weights(self) -> dict[str, TensorSpec]:
        """The model's tensors by name, as they were looked at."""
        return self.cached(
            "weights", lambda: {p.name: p.src for p in self._bound.pairs if not p.average_index}
        )

    @property
    def contexts(self) -> dict[str, DeviceContext | None]:
        """The devices of the weights."""
        return {pair.src.device: pair.src.context for pair in self._bound.pairs}

    def cached(self, key: Any, make: Callable[[], Result]) -> Result:
        """Make something of these pairs once, until the tensors are looked at again."""
        cached = self._bound.cached
        if key not in cached:
            cached[key] = make()
        found: Result = cached[key]
        return found

    def forget(self, key: Any) -> None:
        """Drop a cached value; the next call of :meth:`cached` makes it again."""
        self._bound.cached.pop(key, None)

    def notify_write(self, *sides: int) -> None:
        """Tell frameworks that count writes that tensors of these sides (0, 1) were written."""
        for side in sides:
            for notify, arrays in self.cached(("listeners", side), partial(self._listeners, side)):
                notify(arrays)

    def _listeners(self, side: int) -> list[Any]:
        return write_listeners((pair.dst, pair.src)[side].owner for pair in self._bound.pairs)

    def capturing(self) -> bool:
        """Return whether work on the weights' devices is being captured into a graph."""
        contexts = self._bound.contexts
        if not contexts:
            return False
        refuse_forked()  # a framework that is asked for its stream says it less clearly
        return any(context.capturing() for context in contexts)

    def wait(self) -> None:
        """Wait for the weights' devices."""
        for context in self._bound.contexts:
            context.wait()
