"""Where averages lie: per tensor the averages, their residuals and rings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, ClassVar, Final, NamedTuple

from fastema.average.entries import Selection, ShadowFormat, companion
from fastema.binding.sides import NO_LEAVES
from fastema.binding.swap import SPLIT
from fastema.bridges.memory import Memory, allocate
from fastema.bridges.registry import bridge_of, describe, memory_by, select_part
from fastema.engine.program import Program
from fastema.errors import BridgeError, DTypeError, format_problems
from fastema.layout.dtypes import DType
from fastema.layout.group import Pair
from fastema.layout.spec import Leaves, TensorSpec

__all__ = ["PARTS", "SYNC", "Averages", "Entry", "Owned", "Tensors", "converter"]

PARTS: Final = ("shadow", "residual", "ring")
"""Parts of a tensor's average: the average itself, its residual, the ring of a windowed mean."""

SYNC: Final = {"averaged": "copy", "copied": "copy"}
"""Kernel operations that copy the weights into all averages and copied tensors."""

Tensors = dict[str, list[dict[str, Any]]]
"""For each part, a list with one mapping per average, from names to arrays or descriptions."""


class Entry(NamedTuple):
    """One average of one tensor."""

    name: str
    averaged: bool  # False: copied
    form: str  # kernel format; empty for that of the dtype
    to_framework: Callable[[Any], Any]
    parts: dict[str, Memory]  # keys of PARTS; "shadow" has the weights' shape and axis order

    @property
    def spec(self) -> TensorSpec:
        """Description of the average's tensor."""
        return self.parts["shadow"][1]

    @property
    def ring_on_host(self) -> bool:
        """Whether the ring is in host memory and the average on another device."""
        return "ring" in self.parts and self.parts["ring"][1].device != self.spec.device

    def pair(self, weights: TensorSpec, which: int) -> Pair:
        """Return the pair of this average, as number ``which``, and its weights."""
        residual, ring = self.parts.get("residual"), self.parts.get("ring")
        slots = None
        if ring is not None:
            _, spec = ring
            stride = spec.strides[0] * spec.kind.itemsize
            # The average's device reads a ring in host memory at the same addresses.
            one = replace(
                spec,
                shape=spec.shape[1:],
                strides=spec.strides[1:],
                whole=self.spec.whole,
                offset=self.spec.offset,
                device=self.spec.device,
                context=self.spec.context,
            )
            slots = one, stride
        companion = None if residual is None else residual[1]
        return Pair(self.name, self.spec, weights, self.form, companion, slots, which)


class Averages(ABC):
    """One or more averages of a model's tensors in one kind of memory.

    Attributes
    ----------
    sets : list of dict of str to Entry
        The entries of each average by name; all share the copied tensors.
    format : ShadowFormat
    averaged : set of str
        Names of the averaged tensors; all others are copied.
    container : object
        What holds the averages, if it is not ours.
    moves : bool
        Whether the averages may move, so that reading them must locate them first.
    located : Leaves
        The latest result of :meth:`locate`.
    """

    container: Any = None
    moves: ClassVar[bool] = False
    located: Leaves = NO_LEAVES

    def __init__(self, sets: list[dict[str, Entry]], stored_as: ShadowFormat) -> None:
        self.sets, self.format = sets, stored_as
        self.averaged = {name for name, entry in sets[0].items() if entry.averaged}

    @abstractmethod
    def begin(self, program: Program) -> None:
        """Give the averages their first values; ``program`` has them paired with the weights."""

    def locate(self, found: Leaves, model: Leaves | None = None) -> Leaves:
        """Find the averages among the tensors of :attr:`container`; return those to watch.

        Check what must hold between them and the model's tensors, if these are given.
        """
        return found

    @abstractmethod
    def on(self, device: str, *, ring_on_host: bool = False) -> Averages:
        """Return a copy on a device; with ``ring_on_host`` its rings stay in host memory."""

    @abstractmethod
    def cast(self, stored_as: ShadowFormat) -> Averages:
        """Return the averages converted to another format, in new memory."""

    @abstractmethod
    def with_rounding(self, stored_as: ShadowFormat) -> Averages:
        """Return averages in the same memory, with the format's rounding of 16-bit averages."""

    def __iter__(self) -> Iterator[tuple[int, Entry]]:
        """Yield every entry once with the index of its average, tensor by tensor."""
        for entries in zip(*(one.values() for one in self.sets), strict=True):
            yield from enumerate(entries if entries[0].averaged else entries[:1])

    def pairs(self, weights: Mapping[str, TensorSpec]) -> list[Pair]:
        """Return the pair of every entry with the weights of its name."""
        return [entry.pair(weights[entry.name], which) for which, entry in self]

    def specs(self) -> Tensors:
        """Return the descriptions of all memory, in the structure of :meth:`tensors`."""
        return self._collect(lambda memory: memory[1])

    def tensors(self) -> Tensors:
        """Return the arrays as a state dict holds them, without parts that no entry has."""
        return self._collect(_tensor_to_save)

    def _collect(self, what: Any) -> Tensors:
        found: Tensors = {}
        for part in PARTS:
            of_part = [
                {
                    name: what(e.parts[part])
                    for name, e in one.items()
                    if part in e.parts and (e.averaged or not i)  # copied tensors are shared
                }
                for i, one in enumerate(self.sets)
            ]
            if any(of_part):
                found[part] = of_part
        return found

    @property
    def on_host(self) -> bool:
        """Whether rings are in host memory and their averages on another device."""
        return any(e.ring_on_host for _, e in self)

    def duplicate(self, *, row_major: bool = False) -> Owned:
        """Return a copy in new memory, with the same strides or row-major."""
        return self._copy_from(lambda part, memory: memory[1], self.on_host, row_major)

    def _copy_from(
        self,
        source: Callable[[str, Memory], TensorSpec],
        ring_on_host: bool,
        row_major: bool = False,
    ) -> Owned:
        """Return averages in new memory of the same dtypes, filled from ``source(part, old)``."""
        old = {id(entry): entry for _, entry in self}
        keys = [(key, part) for key, entry in old.items() for part in entry.parts]
        sources = [source(part, old[key].parts[part]) for key, part in keys]
        made: dict[int, dict[str, Memory]] = {key: {} for key in old}
        slots = {of.shape[0] for (_, part), of in zip(keys, sources, strict=True) if part == "ring"}
        for count in (0, *slots):  # averages first: ring slots have their layout
            chosen = [
                (key, part, of)
                for (key, part), of in zip(keys, sources, strict=True)
                if (of.shape[0] if part == "ring" else 0) == count
            ]
            likes = [(made[k]["shadow"][1] if count else of, of.kind) for k, _, of in chosen]
            on_host = bool(count) and ring_on_host
            memories = allocate(likes, count, on_host=on_host, row_major=row_major)
            for (key, part, _), memory in zip(chosen, memories, strict=True):
                made[key][part] = memory
        copies = [
            Pair(part, made[key][part][1], of)
            for (key, part), of in zip(keys, sources, strict=True)
        ]
        Program({"all": copies}).run({"all": "copy"})
        entries = {key: e._replace(parts=made[key]) for key, e in old.items()}
        return Owned(
            [{name: entries[id(e)] for name, e in one.items()} for one in self.sets], self.format
        )

    def load(self, tensors: Mapping[str, Iterable[Mapping[str, Any]]]) -> Program:
        """Return a program whose ``{"all": "copy"}`` copies a state's checked tensors here."""
        pairs = []
        for part, of_part in self.specs().items():
            for specs, arrays in zip(of_part, tensors[part], strict=True):
                for name, spec in specs.items():
                    array = _transfer_array(select_part(arrays[name], spec), spec.device)
                    pairs.append(Pair(name, spec, describe(array)))
        return Program({"all": pairs})


class Owned(Averages):
    """Averages in flat buffers of our own, with their residuals and rings."""

    @classmethod
    def of(cls, selection: Selection, stored_as: ShadowFormat) -> Owned:
        """Allocate the averages of a selection.

        Raises
        ------
        DTypeError
            Naming every tensor that cannot be stored in this format.
        """
        problems = []
        kinds = {}
        for leaf in selection.averaged:
            try:
                kinds[leaf.name] = stored_as.stored(leaf.spec.kind)
            except DTypeError as error:
                problems.append(f"{leaf.name}: {error}")
        if problems:
            raise DTypeError("shadow_dtype does not fit:\n" + format_problems(problems))
        likes = {leaf.name: leaf.spec for leaf in selection.averaged}
        copied = {leaf.name: (leaf.spec, leaf.spec.kind) for leaf in selection.copied}
        held = {
            name: Entry(name, False, "", converter(copied[name][0]), {"shadow": memory})
            for name, memory in zip(copied, allocate(copied.values()), strict=True)
        }
        return cls(
            [
                {**_allocate_averages(likes, kinds, stored_as), **held}
                for _ in range(stored_as.num_averages)
            ],
            stored_as,
        )

    def begin(self, program: Program) -> None:
        """Copy the weights into the new averages; see :meth:`Averages.begin`."""
        program.run(SYNC)

    def on(self, device: str, *, ring_on_host: bool = False) -> Owned:
        """See :class:`Averages`."""

        def there(part: str, memory: Memory) -> TensorSpec:
            array, spec = memory
            if part == "ring" and ring_on_host:
                return spec
            return describe(bridge_of(array).transfer(array, device)).sharded_like(spec)

        return self._copy_from(there, ring_on_host)

    def cast(self, stored_as: ShadowFormat) -> Owned:
        """See :class:`Averages`."""
        sets = []
        pairs: dict[str, list[Pair]] = {"copy": [], "cast_back": []}
        for one in self.sets:
            likes = {name: e.spec for name, e in one.items() if e.averaged}
            kinds = {name: stored_as.stored(spec.kind) for name, spec in likes.items()}
            made = _allocate_averages(likes, kinds, stored_as)
            for name, entry in made.items():
                made[name] = entry._replace(to_framework=one[name].to_framework)
                operation, of_entry = _plan_conversion(one[name], entry)
                pairs[operation] += of_entry
            sets.append({name: made.get(name, e) for name, e in one.items()})
        Program(pairs).run({operation: operation for operation in pairs})
        return Owned(sets, stored_as)

    def with_rounding(self, stored_as: ShadowFormat) -> Owned:
        """See :class:`Averages`."""
        as_stored = stored_as._replace(dtype=None)

        def entry(old: Entry) -> Entry:
            if not old.averaged or old.form == SPLIT:
                return old
            return old._replace(form=as_stored.stored(old.spec.kind)[1])

        return Owned([{name: entry(e) for name, e in one.items()} for one in self.sets], stored_as)


def _transfer_array(array: Any, device: str) -> Any:
    """Return an array of any framework on a device; raise a BridgeError if it cannot be moved."""
    transfer = getattr(bridge_of(array), "transfer", None)
    if transfer is not None:
        return transfer(array, device)
    if device != "cpu":
        raise BridgeError(
            f"a {type(array).__module__}.{type(array).__qualname__} cannot be moved to {device}; "
            "pass a NumPy array, or a tensor of the average's framework"
        )
    return array


def _allocate_averages(
    likes: Mapping[str, TensorSpec], kinds: Mapping[str, tuple[DType, str]], stored_as: ShadowFormat
) -> dict[str, Entry]:
    """Allocate one average of each tensor."""
    parts: dict[str, dict[str, Memory]] = {name: {} for name in likes}

    def add(part: str, wanted: Mapping[str, DType], slots: int = 0) -> None:
        on_host = bool(slots) and stored_as.ring_on_host
        of = [(likes[name], kind) for name, kind in wanted.items()]
        memories = allocate(of, slots, on_host=on_host)
        for name, memory in zip(wanted, memories, strict=True):
            parts[name][part] = memory

    add("shadow", {name: kind for name, (kind, _) in kinds.items()})
    beside = {
        name: companion(kind, likes[name].kind, form)
        for name, (kind, form) in kinds.items()
        if form == SPLIT or stored_as.window
    }
    add("residual", beside)
    if stored_as.window:
        rings = {
            name: stored_as._replace(dtype=stored_as.ring, split=False, random=False).stored(
                spec.kind
            )[0]
            for name, spec in likes.items()
        }
        add("ring", rings, stored_as.window)
    return {
        name: Entry(name, True, kinds[name][1], converter(likes[name]), parts[name])
        for name in likes
    }


def _tensor_to_save(memory: Memory) -> Any:
    array, spec = memory
    return bridge_of(array).alias(array) if spec.division is None else spec.division.tensor(array)


def converter(like: TensorSpec) -> Callable[[Any], Any]:
    """Return the function that turns our arrays into tensors like a given one."""
    return _converter_by(bridge_of(like.owner)) if like.division is None else like.division.tensor


@cache
def _converter_by(bridge: ModuleType) -> Callable[[Any], Any]:
    convert: Callable[[Any], Any] = getattr(bridge, "to_framework", None) or memory_by(bridge).alias
    return convert


def _plan_conversion(old: Entry, new: Entry) -> tuple[str, list[Pair]]:
    """Return the operation and the pairs that fill an average from one in another format."""
    if old.form == SPLIT and new.form == SPLIT:
        return "copy", [Pair(old.name, new.parts[p][1], old.parts[p][1]) for p in new.parts]
    if old.form == SPLIT:
        return "cast_back", [old.pair(new.spec, 0)]
    return "copy", [new.pair(old.spec, 0)]
