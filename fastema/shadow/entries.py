"""What is averaged: which tensors of a model, by which policy, and the memory of the average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fastema.bridges.registry import bridge_of, describe, dtype_code
from fastema.errors import ArgumentError, DTypeError, LayoutError, listed
from fastema.layout.dtypes import DType, average_of, parse
from fastema.layout.flat import dense_strides, place
from fastema.layout.group import refuse_overlap, refuse_unwritable
from fastema.layout.spec import Leaf, Leaves, Role, TensorSpec

__all__ = [
    "Entry",
    "Names",
    "Policy",
    "Selection",
    "allocate",
    "checked_policy",
    "dtype_of",
    "kinds",
    "select",
]

Policy = Literal["average", "copy", "skip"]


def checked_policy(value: Any, name: str) -> Policy:
    """A policy, or an :class:`ArgumentError` that lists the known ones."""
    if value not in get_args(Policy):
        raise ArgumentError(f"{name}={value!r}: expected one of {', '.join(get_args(Policy))}")
    return value  # type: ignore[no-any-return]


def dtype_of(value: Any) -> DType | None:
    """The dtype a user named: None, a name such as ``"float32"``, or a framework's own object."""
    if value is None:
        return None
    return parse(value if isinstance(value, str) else dtype_code(value))


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the average.

    ``shadow`` is a view into a flat buffer, with the weights' shape and order of axes; ``spec``
    describes it. ``averaged`` is False where the weights are copied instead.
    """

    name: str
    averaged: bool
    shadow: Any
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Names:
    """What became of the names that are not averaged under their own.

    Attributes
    ----------
    skipped : set of str
        What is left out.
    frozen : set of str
        What is copied because it is frozen.
    aliases : dict of str to str
        Further names of the same memory (tied weights), to the name that is kept.
    """

    skipped: set[str]
    frozen: set[str]
    aliases: dict[str, str]


class Selection(NamedTuple):
    """Which leaves an average holds: by policy, each memory once."""

    averaged: list[Leaf]
    copied: list[Leaf]
    names: Names


def select(leaves: Leaves, frozen: Policy, buffers: Policy) -> Selection:
    """Sort a container's leaves by policy, each memory once.

    Raises
    ------
    LayoutError
        If nothing is left to average, or a tensor cannot be swapped: expanded, read-only, or
        partly sharing memory with another.
    BridgeError, DTypeError
        For a tensor that cannot be described and is not skipped.
    """
    policies: dict[Role, Policy] = {"weight": "average", "frozen": frozen, "buffer": buffers}
    for one in leaves.opaque:
        if policies[one.role] != "skip":
            raise one.error
    skipped = {one.name for one in leaves.opaque}
    skipped |= {leaf.name for leaf in leaves.items if policies[leaf.role] == "skip"}
    held = [leaf for leaf in leaves.items if leaf.name not in skipped]
    averages = {
        leaf.name
        for leaf in held
        if policies[leaf.role] == "average" and leaf.spec.kind.real is not None
    }
    # Of several names of one memory, one that is averaged is kept.
    first: dict[TensorSpec, str] = {}
    for leaf in sorted(held, key=lambda leaf: leaf.name not in averages):
        if leaf.spec.size:
            first.setdefault(leaf.spec, leaf.name)
    aliases = {
        leaf.name: first[leaf.spec]
        for leaf in held
        if leaf.spec.size and first[leaf.spec] != leaf.name
    }
    held = [leaf for leaf in held if leaf.name not in aliases]
    averaged = [leaf for leaf in held if leaf.name in averages]
    copied = [leaf for leaf in held if leaf.name not in averages]
    if not averaged:
        count = len(leaves.items) + len(leaves.opaque)
        raise LayoutError(
            "nothing to average: "
            + (
                f"all {count} tensors are frozen, buffers or integers; pass frozen='average' to "
                "average parameters that need no gradient"
                if count
                else "the container holds no tensors"
            )
        )
    for leaf in held:
        refuse_unwritable(leaf.name, leaf.spec)
    refuse_overlap([(leaf.name, leaf.spec) for leaf in held])
    still = {leaf.name for leaf in copied if leaf.role == "frozen"}
    return Selection(averaged, copied, Names(skipped, still, aliases))


def allocate(wanted: Iterable[tuple[str, bool, TensorSpec, DType]]) -> list[Entry]:
    """Entries for tensors like these: (name, averaged, spec to be like, dtype).

    One flat buffer per framework, device and dtype; dense tensors keep their order of axes, others
    become row-major.
    """
    wanted = list(wanted)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, (_, _, like, kind) in enumerate(wanted):
        key = (bridge_of(like.owner).__name__, like.device, kind.code)
        groups.setdefault(key, []).append(i)
    made: dict[int, Entry] = {}
    for (_, device, code), members in groups.items():
        bridge = bridge_of(wanted[members[0]][2].owner)
        itemsize = wanted[members[0]][3].itemsize
        placed = place([wanted[i][2].size for i in members], itemsize)
        flat = bridge.zeros(placed.length, code, device)
        for i, offset in zip(members, placed.offsets, strict=True):
            name, averaged, like, _ = wanted[i]
            view = bridge.view(flat, offset, like.shape, dense_strides(like))
            made[i] = Entry(name, averaged, view, describe(view))
    return [made[i] for i in range(len(wanted))]


def kinds(selection: Selection, wanted: DType | None) -> list[tuple[str, bool, TensorSpec, DType]]:
    """What :func:`allocate` needs for a selection.

    Raises
    ------
    DTypeError
        Naming every tensor whose average cannot have the wanted dtype.
    """
    found, problems = [], []
    for leaf in selection.averaged:
        try:
            found.append((leaf.name, True, leaf.spec, average_of(leaf.spec.kind, wanted)))
        except DTypeError as error:
            problems.append(f"{leaf.name}: {error}")
    if problems:
        raise DTypeError("shadow_dtype does not fit:\n" + listed(problems))
    return found + [(leaf.name, False, leaf.spec, leaf.spec.kind) for leaf in selection.copied]
