"""Averages in tensors that somebody else owns, such as those of a second module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NoReturn

from fastema.average.entries import Selection, ShadowFormat
from fastema.average.memory import Averages, Entry, converter
from fastema.average.options import check_flag
from fastema.binding.policies import Policies
from fastema.bridges.registry import leaves_of, list_iterators
from fastema.engine.program import Program
from fastema.errors import ArgumentError, BridgeError, LayoutError, format_problems
from fastema.layout.group import refuse_unwritable
from fastema.layout.spec import Leaf, Leaves
from fastema.rules import Schedule

__all__ = ["Given", "check_overwriting", "claim"]


class Given(Averages):
    """One average of each tensor, in the tensors of a module, list or dict.

    They are watched like the weights. Building the average writes nothing: it begins with what
    they hold.
    """

    moves: ClassVar[bool] = True

    def __init__(
        self,
        container: Any,
        leaves: Leaves,
        averaged: dict[str, bool],
        shared: frozenset[str],
        aliases: dict[str, str],
        stored_as: ShadowFormat,
    ) -> None:
        self.container, self.format = container, stored_as
        self._averaged, self._shared, self._aliases = averaged, shared, aliases
        self._shapes = {
            leaf.name: leaf.spec.full_shape for leaf in leaves.items if leaf.name in averaged
        }
        self.locate(leaves)
        super().__init__(self.sets, stored_as)

    def locate(self, found: Leaves, model: Leaves | None = None) -> Leaves:
        """See :class:`Averages`.

        Raise a LayoutError for tensors that are missing, cannot be written, or are no longer tied
        or shared.
        """
        leaves = {leaf.name: leaf for leaf in found.items}
        for one in found.opaque:
            if one.name in self._averaged:
                raise one.error
        problems = [f"{name!r} is missing" for name in self._averaged if name not in leaves]
        problems += [
            f"{name!r} is {list(leaves[name].spec.full_shape)}, was {list(shape)}"
            for name, shape in self._shapes.items()
            if name in leaves and leaves[name].spec.full_shape != shape
        ]
        if problems:
            raise LayoutError(
                f"into= does not match the model:\n{format_problems(problems)}\nLeave such tensors "
                "out by policy={'name': 'skip'}."
            )
        untied = [
            f"{name!r} is not tied to {kept!r}"
            for name, kept in self._aliases.items()
            if name in leaves and kept in leaves and leaves[name].spec != leaves[kept].spec
        ]
        if untied:
            raise LayoutError(
                f"into= does not tie the weights that the model ties:\n{format_problems(untied)}"
            )
        for name in self._averaged:
            refuse_unwritable(f"into= {name}", leaves[name].spec)
        if model is not None:
            own = {leaf.name: leaf.spec for leaf in model.items}
            parted = [
                f"{name!r} was the model's own tensor and no longer is"
                for name in sorted(self._shared)
                if name in own and (name not in leaves or leaves[name].spec != own[name])
            ]
            if parted:
                raise LayoutError(
                    f"into= shares other tensors with the model now:\n{format_problems(parted)}\n"
                    "Build a new average."
                )
        self.sets = [{name: self._entry(leaves[name]) for name in self._averaged}]
        self.located = found.select_names({*self._averaged, *self._aliases, *self._shared})
        return self.located

    def _entry(self, leaf: Leaf) -> Entry:
        spec, averaged = leaf.spec, self._averaged[leaf.name]
        form = self.format.stored(spec.kind)[1] if averaged else ""
        parts = {"shadow": (spec.tensor, spec)}
        return Entry(leaf.name, averaged, form, converter(spec), parts)

    def begin(self, program: Program) -> None:
        """Write nothing: the average begins with what the tensors hold."""

    def on(self, device: str, *, ring_on_host: bool = False) -> NoReturn:
        """Raise an ArgumentError: their owner moves them."""
        self._refuse_to_move()

    def cast(self, stored_as: ShadowFormat) -> NoReturn:
        """Raise an ArgumentError: their owner casts them."""
        self._refuse_to_move()

    def _refuse_to_move(self) -> NoReturn:
        raise ArgumentError(
            "to(): this average is in tensors of your own (into=): move or cast those"
        )

    def with_rounding(self, stored_as: ShadowFormat) -> Given:
        """See :class:`Averages`."""
        leaves = leaves_of(self.container)
        return Given(self.container, leaves, self._averaged, self._shared, self._aliases, stored_as)


def check_overwriting(schedule: Schedule, into: Any, overwrite: Any) -> None:
    """Raise an ArgumentError if an update replaces the given average without having been asked to.

    Means do so first, and so do averages with bias correction and those that start later.
    """
    may_overwrite = check_flag(overwrite, "overwrite")
    if into is None:
        if may_overwrite:
            raise ArgumentError("overwrite=True is about tensors of yours: pass into= as well")
        return
    if schedule.window:
        raise ArgumentError("into= has no room for the ring of a windowed mean")
    if not may_overwrite and schedule.discards(0):
        raise ArgumentError(
            f"the first update by {schedule} replaces what into= holds by the weights: pass "
            "overwrite=True if that is meant"
        )


def claim(
    container: Any,
    model: Leaves,
    chosen: Selection,
    stored_as: ShadowFormat,
    *,
    buffers_given: bool,
) -> tuple[Given, Selection]:
    """Return the averages in a container, and the selection without tensors that it shares.

    Parameters
    ----------
    container : object
        What ``into=`` was given.
    model : Leaves
        The model's tensors.
    chosen : Selection
        What the policies select of them.
    stored_as : ShadowFormat
        The format that the options ask for.
    buffers_given : bool
        Whether the user said what becomes of buffers.

    Raises
    ------
    ArgumentError
        If buffers are averaged or copied without having been asked for; if nothing is left.
    LayoutError
        If names, shapes or ties differ.
    BridgeError
        For immutable arrays.
    """
    if stored_as.num_averages > 1 or stored_as.dtype is not None or stored_as.split:
        raise ArgumentError(
            "into= holds one average in the dtypes of its tensors: pass one decay, and leave "
            "shadow_dtype= out"
        )
    container = list_iterators(container)
    leaves = leaves_of(container)
    theirs = {leaf.name: leaf for leaf in leaves.items}
    own = {leaf.name: leaf for leaf in model.items}
    if leaves.moving or not all(leaf.spec.writable for leaf in leaves.items):
        raise BridgeError(
            "into= needs tensors that stay in place and can be written, such as PyTorch's or "
            "NumPy's; JAX's arrays, and variables of TensorFlow and of Keras on TensorFlow or JAX, "
            "are replaced or moved by their framework"
        )
    shared = frozenset(
        name
        for name, leaf in theirs.items()
        if name in own and leaf.spec.size and leaf.spec == own[name].spec
    )
    averaged = [leaf for leaf in chosen.averaged if leaf.name not in shared]
    copied = [leaf for leaf in chosen.copied if leaf.name not in shared]
    if not averaged:
        raise ArgumentError(
            "into= is the model itself, or shares all its averaged tensors; pass a copy, such as "
            "copy.deepcopy(model)"
        )
    _check_names(chosen.names.policies, own, theirs)
    statistics = [
        leaf.name for leaf in (*averaged, *copied) if leaf.role == "buffer" and leaf.name in theirs
    ]
    if statistics and not buffers_given:
        raise ArgumentError(
            "into= has buffers:\n"
            + format_problems(map(repr, statistics))
            + "\nSay what becomes of them: buffers='copy' takes the model's (a target network in "
            "eval mode), 'average' averages them, 'skip' leaves them alone (a teacher in train "
            "mode keeps its own BatchNorm statistics)."
        )
    names = replace(chosen.names, skipped=chosen.names.skipped | shared, shared=shared)
    kinds = {leaf.name: True for leaf in averaged} | {leaf.name: False for leaf in copied}
    aliases = {name: kept for name, kept in names.aliases.items() if name not in shared}
    memory = Given(container, leaves, kinds, shared, aliases, stored_as)
    return memory, Selection(averaged, copied, names)


def _check_names(policies: Policies, own: dict[str, Leaf], theirs: dict[str, Leaf]) -> None:
    """Refuse parameters that only the container has, and tensors that differ in shape."""
    problems = [
        f"{leaf.name!r} is not in the model"
        for leaf in theirs.values()
        if leaf.role != "buffer" and leaf.name not in own
        if policies(leaf.name, "weight") != "skip"
    ]
    problems += [
        f"{name!r} is {list(leaf.spec.full_shape)}, in the model {list(own[name].spec.full_shape)}"
        for name, leaf in theirs.items()
        if name in own and leaf.spec.full_shape != own[name].spec.full_shape
        if policies(name, own[name].role) != "skip" and leaf.persistent
    ]
    if problems:
        raise LayoutError(
            f"into= does not match the model:\n{format_problems(problems)}\nLeave such tensors out "
            "by policy={'name': 'skip'}."
        )
