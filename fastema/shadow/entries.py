"""Selection: which tensors of a model are averaged, by which policy, in which format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from fastema.binding.swap import SPLIT
from fastema.errors import ArgumentError, DTypeError, LayoutError, listed
from fastema.layout.dtypes import DType, average_of, parse
from fastema.layout.group import refuse_shared_elements
from fastema.layout.spec import Leaf, Leaves, Opaque, Role, TensorSpec

__all__ = [
    "Names",
    "Policy",
    "Rounding",
    "Selection",
    "ShadowFormat",
    "companion",
    "select",
]

Policy = Literal["average", "copy", "skip"]
Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True, slots=True)
class Names:
    """Names that are skipped, frozen or aliases."""

    skipped: set[str]
    frozen: set[str]  # copied
    buffers: set[str]  # copied or averaged
    aliases: dict[str, str]  # further names of tied weights, to the name that is kept
    chosen: set[str]  # those whose policy a pattern gives
    patterns: Mapping[str, Policy]  # of the user's

    def may_come(self, name: str) -> bool:
        """Return whether a new tensor is skipped by a pattern, as an adapter of its own may be."""
        matching = (policy for one, policy in self.patterns.items() if fnmatchcase(name, one))
        return next(matching, None) == "skip"

    @property
    def still(self) -> set[str]:
        """Names that have to stay frozen."""
        return (self.skipped | self.frozen) - self.chosen


class Selection(NamedTuple):
    """The leaves that an average holds: by policy, each memory once."""

    averaged: list[Leaf]
    copied: list[Leaf]
    names: Names


def by_pattern(leaves: Leaves, patterns: Mapping[str, Policy]) -> dict[str, Policy]:
    """Find the names that patterns match, each with the policy of the first that does."""
    found: dict[str, Policy] = {}
    unused = dict.fromkeys(patterns)
    named: list[Leaf | Opaque] = [*leaves.items, *leaves.opaque]
    for one in named:
        matching = [pattern for pattern in patterns if fnmatchcase(one.name, pattern)]
        if matching and one.persistent:
            found[one.name] = patterns[matching[0]]
            for pattern in matching:
                unused.pop(pattern, None)
    if unused:
        names = [one.name for one in named if one.persistent]
        raise ArgumentError(
            "policy: no name matches\n"
            + listed(map(repr, unused))
            + f"\nThe model has {', '.join(map(repr, names[:3]))}"
            + (f" and {len(names) - 3} more; " if len(names) > 3 else "; ")
            + "a name is matched as a whole ('*.bias'), and buffers registered with "
            "persistent=False are never averaged."
        )
    return found


def select(
    leaves: Leaves,
    frozen: Policy,
    buffers: Policy,
    patterns: Mapping[str, Policy] | None = None,
) -> Selection:
    """Sort a container's leaves by policy, each memory once; refuse what cannot be averaged.

    Buffers that a module's own state leaves out, such as tables and masks that it keeps for speed,
    are skipped by any policy: they may change their shape, come and go.
    """
    of_role: dict[Role, Policy] = {"weight": "average", "frozen": frozen, "buffer": buffers}
    chosen = by_pattern(leaves, patterns or {})

    def policy(one: Leaf | Opaque) -> Policy:
        return chosen.get(one.name, of_role[one.role])

    for one in leaves.opaque:
        if one.persistent and policy(one) != "skip":
            raise one.error
    skipped = {one.name for one in leaves.opaque}
    skipped |= {leaf.name for leaf in leaves.items if not leaf.persistent or policy(leaf) == "skip"}
    held = [leaf for leaf in leaves.items if leaf.name not in skipped]
    wanted = [leaf for leaf in held if policy(leaf) == "average"]
    averages = {leaf.name for leaf in wanted if leaf.spec.kind.real is not None}
    problems = [
        f"{leaf.name}: {leaf.spec.dtype} is not averaged, only copied"
        for leaf in wanted
        if leaf.name not in averages and not leaf.spec.kind.whole
    ]
    if problems:
        raise DTypeError(
            "there is no average of these tensors:\n"
            + listed(problems)
            + "\nKeep them in another dtype, or pass buffers='copy' or frozen='copy'."
        )
    # Of several names of one memory, one that is averaged is kept.
    first: dict[object, str] = {}
    for leaf in sorted(held, key=lambda leaf: leaf.name not in averages):
        if leaf.spec.writable:  # what never changes is tied to nothing
            first.setdefault(_memory(leaf.spec), leaf.name)
    aliases = {
        leaf.name: first[_memory(leaf.spec)]
        for leaf in held
        if first.get(_memory(leaf.spec), leaf.name) != leaf.name
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
        refuse_shared_elements(leaf.name, leaf.spec)
    still = {leaf.name for leaf in copied if leaf.role == "frozen"}
    statistics = {leaf.name for leaf in held if leaf.role == "buffer"}
    names = Names(skipped, still, statistics, aliases, {*chosen}, patterns or {})
    return Selection(averaged, copied, names)


def _memory(spec: TensorSpec) -> object:
    """Return a key of a tensor's memory; an empty part is tied if its object is."""
    return spec if spec.size else id(spec.owner)


def companion(kind: DType, weights: DType, form: str) -> DType:
    """The dtype of what an average keeps beside itself: its other half, or a mean's remainder."""
    if form == SPLIT:
        return parse("i16")
    real = "f64" if "f64" in (kind.real, weights.real) else "f32"
    return average_of(kind, parse(real))


class ShadowFormat(NamedTuple):
    """Storage format of averages."""

    dtype: DType | None = None  # None for that of the weights
    split: bool = False  # a float32 in two halves
    random: bool = True  # 16-bit averages are rounded by random bits
    num_averages: int = 1  # kept together
    window: int = 0  # slots of a ring
    ring: DType | None = None  # None for that of the weights
    ring_on_host: bool = False

    def stored(self, weights: DType) -> tuple[DType, str]:
        """Return the dtype and the kernel format of an average of such weights."""
        if self.split:
            if self.window:
                raise DTypeError(
                    "a windowed mean keeps a remainder of its own and cannot be in two halves"
                )
            if weights.parts > 1:
                raise DTypeError(f"an average of {weights.code} weights cannot be in two halves")
        kind = average_of(weights, self.dtype)
        if self.split:
            return kind, SPLIT
        return kind, f"{kind.code}~" if self.random and kind.random else ""
