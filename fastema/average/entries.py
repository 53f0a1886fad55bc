"""Select which tensors of a model are averaged, copied or skipped, and their storage format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastema.binding.policies import Policies, Policy, Rounding
from fastema.binding.swap import SPLIT
from fastema.errors import DTypeError, LayoutError, format_problems
from fastema.layout.dtypes import DType, average_of, parse_dtype
from fastema.layout.group import refuse_shared_elements
from fastema.layout.spec import Leaf, Leaves, Opaque, TensorSpec

__all__ = [
    "Names",
    "Selection",
    "ShadowFormat",
    "companion",
    "select",
]


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a model's tensors that need special treatment."""

    skipped: set[str]
    frozen: set[str]  # frozen parameters that are copied
    buffers: set[str]  # buffers that are copied or averaged
    aliases: dict[str, str]  # further name of a tied weight: the name it is averaged under
    policies: Policies  # the user's
    parameters: list[str] | None = None  # of a torch module, in order, skipped ones too
    shared: frozenset[str] = frozenset()  # skipped: the average's container has the model's own

    def may_appear(self, name: str) -> bool:
        """Return whether a pattern skips a new tensor, for example an adapter added later."""
        return self.policies.by_pattern(name) == "skip"

    def must_stay_frozen(self, name: str) -> bool:
        """Return whether a parameter has no average because it is frozen."""
        held_back = name in self.frozen or (name in self.skipped and name not in self.shared)
        return held_back and self.policies.by_pattern(name) is None


class Selection(NamedTuple):
    """The leaves that an average holds, without aliases."""

    averaged: list[Leaf]
    copied: list[Leaf]
    names: Names


def select(leaves: Leaves, policies: Policies) -> Selection:
    """Sort a container's leaves by policy, tied weights once; refuse tensors without an average.

    Non-persistent buffers, such as cached tables and masks, are skipped under every policy: they
    may change shape, appear and disappear.

    Raises
    ------
    LayoutError
        If nothing is averaged, or a tensor is expanded.
    DTypeError
        For floats that no kernel averages.
    ArgumentError
        For a pattern that matches no name.
    """
    named: list[Leaf | Opaque] = [*leaves.items, *leaves.opaque]
    policies.check_used(named)
    chosen: dict[str, Policy] = {one.name: policies(one.name, one.role) for one in named}

    for one in leaves.opaque:
        if one.persistent and chosen[one.name] != "skip":
            raise one.error
    skipped = {one.name for one in leaves.opaque}
    skipped |= {
        leaf.name for leaf in leaves.items if not leaf.persistent or chosen[leaf.name] == "skip"
    }
    held = [leaf for leaf in leaves.items if leaf.name not in skipped]
    wanted = [leaf for leaf in held if chosen[leaf.name] == "average"]
    averages = {leaf.name for leaf in wanted if leaf.spec.kind.real is not None}
    problems = [
        f"{leaf.name}: {leaf.spec.dtype} is not averaged, only copied"
        for leaf in wanted
        if leaf.name not in averages and not leaf.spec.kind.whole
    ]
    if problems:
        raise DTypeError(
            "there is no average of these tensors:\n"
            + format_problems(problems)
            + "\nKeep them in another dtype, or pass buffers='copy' or frozen='copy'."
        )
    # Tied tensors keep the name of an averaged one, if there is any.
    first: dict[object, str] = {}
    for leaf in sorted(held, key=lambda leaf: leaf.name not in averages):
        if leaf.spec.writable:  # immutable arrays that share memory are not tied
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
    listed = leaves.parameters
    parameters = None if listed is None else [aliases.get(name, name) for name in listed]
    names = Names(skipped, still, statistics, aliases, policies, parameters)
    return Selection(averaged, copied, names)


def _memory(spec: TensorSpec) -> object:
    """Return a key that tied tensors share. Empty tensors are tied only if they are one object."""
    return spec if spec.size else id(spec.owner)


def companion(kind: DType, weights: DType, form: str) -> DType:
    """Return the dtype of an average's residual: its second half, or a mean's rounding error."""
    if form == SPLIT:
        return parse_dtype("i16")
    real = "f64" if "f64" in (kind.real, weights.real) else "f32"
    return average_of(kind, parse_dtype(real))


class ShadowFormat(NamedTuple):
    """Storage format of averages."""

    dtype: DType | None = None  # None: the dtype of the weights
    split: bool = False  # a float32 in two halves
    random: bool = True  # stochastic rounding of 16-bit averages
    num_averages: int = 1  # updated in one pass
    window: int = 0  # slots of the ring; 0 without one
    ring: DType | None = None  # None: the dtype of the weights
    ring_on_host: bool = False

    @property
    def rounding(self) -> Rounding:
        """Rounding of 16-bit averages."""
        return "stochastic" if self.random else "nearest"

    def stored(self, weights: DType) -> tuple[DType, str]:
        """Return the dtype and the kernel format of an average of weights with this dtype.

        Raises
        ------
        DTypeError
            If weights of this dtype cannot be stored in this format.
        """
        if self.split:
            if self.window:
                raise DTypeError(
                    "a windowed mean has its own residual and cannot be split into two halves"
                )
            if weights.parts > 1:
                raise DTypeError(f"an average of {weights.code} weights cannot be split")
        kind = average_of(weights, self.dtype)
        if self.split:
            return kind, SPLIT
        return kind, f"{kind.code}~" if self.random and kind.random else ""
