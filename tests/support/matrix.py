"""Reduction of large test matrices from all combinations to all pairs of values."""

from collections import defaultdict
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Final

WIDE: Final = 24
"""Up to this many cases of a two-argument test all run; of more, enough to cover each value."""

Value = tuple[str, Hashable]


def reduce_cases(
    cases: Sequence[tuple[str, Mapping[str, Any]]], thin: Container[str] = ()
) -> set[int]:
    """Return the indices of the cases to run.

    For a test with three or more arguments, they cover every pair of values that occurs in some
    case; for one with two arguments and more than :data:`WIDE` cases, every value.
    """
    of_test: defaultdict[str, list[int]] = defaultdict(list)
    for number, (test, _) in enumerate(cases):
        of_test[test].append(number)
    chosen: set[int] = set()
    for test, numbers in of_test.items():
        values = [_values(cases[number][1]) for number in numbers]
        if test in thin:
            needs: list[set[Hashable]] = [set(_within(v)) for v in values]
        elif len(values[0]) == 2:
            needs = (
                [set(v) for v in values] if len(numbers) > WIDE else [{tuple(v)} for v in values]
            )
        else:
            needs = [set(combinations(v, 2)) or set(v) for v in values]
        chosen.update(numbers[i] for i in cover(needs))
    return chosen


def cover(needs: Sequence[Iterable[Hashable]]) -> list[int]:
    """Return the indices of a few sets that cover the union of all sets, chosen greedily."""
    left = [set(one) for one in needs]
    found = []
    while any(left):
        best = max(range(len(left)), key=lambda i: len(left[i]))  # the first of equals
        found.append(best)
        covered = set(left[best])
        for one in left:
            one -= covered
    return found


def _values(parameters: Mapping[str, Any]) -> list[Value]:
    found: list[Value] = []
    for name, value in sorted(parameters.items(), key=lambda item: item[0]):
        try:
            hash(value)
        except TypeError:
            found.append((name, (object, id(value))))
        else:
            found.append((name, (type(value), value)))
    return found


def _within(values: Iterable[Value]) -> Iterator[Hashable]:
    for name, (kind, value) in values:
        if isinstance(value, tuple):
            yield from _within((f"{name}.{i}", (type(v), v)) for i, v in enumerate(value))
        else:
            yield name, kind, value
