"""Options that averages and plans share: policies of tensors, by name pattern and role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from fastema.errors import ArgumentError, format_problems
from fastema.layout.spec import Leaf, Opaque, Role

__all__ = ["Policies", "Policy", "Rounding", "check_literal"]

Policy = Literal["average", "copy", "skip"]
Rounding = Literal["nearest", "stochastic"]


def check_literal(value: Any, name: str, known: Any) -> Any:
    """Return a value of a literal type; raise an ArgumentError with the valid ones otherwise."""
    if not isinstance(value, str) or value not in get_args(known):
        raise ArgumentError(f"{name}={value!r}: expected one of {', '.join(get_args(known))}")
    return value


@dataclass(frozen=True)
class Policies:
    """The policy of every tensor: that of the first matching pattern, otherwise of its role."""

    frozen: Policy
    buffers: Policy
    patterns: Mapping[str, Policy]

    @classmethod
    def of(cls, frozen: Any, buffers: Any, policy: Any) -> Policies:
        """Return the policies that the arguments of a user describe.

        Raises
        ------
        ArgumentError
            Naming the invalid argument and what it accepts.
        """
        patterns = {} if policy is None else policy
        if not isinstance(patterns, Mapping) or not all(isinstance(one, str) for one in patterns):
            raise ArgumentError(
                f"policy={policy!r}: expected a mapping of name patterns to policies, such as "
                "{'*.expert_bias': 'average', 'visual.*': 'skip'}"
            )
        return cls(
            check_literal(frozen, "frozen", Policy),
            check_literal(buffers, "buffers", Policy),
            {
                pattern: check_literal(value, f"policy[{pattern!r}]", Policy)
                for pattern, value in patterns.items()
            },
        )

    def by_pattern(self, name: str) -> Policy | None:
        """Return the policy of the first pattern that matches a name; None if there is none."""
        matching = (policy for one, policy in self.patterns.items() if fnmatchcase(name, one))
        return next(matching, None)

    def __call__(self, name: str, role: Role) -> Policy:
        """Return the policy of the tensor with this name and role."""
        by_role: dict[Role, Policy] = {
            "weight": "average",
            "frozen": self.frozen,
            "buffer": self.buffers,
        }
        return self.by_pattern(name) or by_role[role]

    def check_used(self, tensors: Iterable[Leaf | Opaque]) -> None:
        """Raise an ArgumentError for patterns that match none of the persistent tensors' names."""
        names = [*dict.fromkeys(one.name for one in tensors if one.persistent)]
        unused = [
            pattern
            for pattern in self.patterns
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        if unused:
            raise ArgumentError(
                "policy: no name matches\n"
                + format_problems(map(repr, unused))
                + f"\nThe model has {', '.join(map(repr, names[:3]))}"
                + (f" and {len(names) - 3} more; " if len(names) > 3 else "; ")
                + "a name is matched as a whole ('*.bias'), and buffers registered with "
                "persistent=False are never averaged."
            )
