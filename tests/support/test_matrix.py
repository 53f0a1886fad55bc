"""Reduced test matrices keep every pair of values."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from .matrix import WIDE, reduce_cases


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, unique=True))
def test_reduced_matrix_keeps_every_pair_of_values(rows: list[tuple[int, ...]]) -> None:
    cases = [("test", dict(zip("abcd", row, strict=True))) for row in rows]
    kept = reduce_cases(cases)

    def pairs(numbers: set[int]) -> set[tuple[object, ...]]:
        return {pair for i in numbers for pair in combinations(sorted(cases[i][1].items()), 2)}

    assert pairs(kept) == pairs(set(range(len(rows))))
    assert kept == reduce_cases(cases)


def test_two_arguments_are_reduced_only_above_the_limit() -> None:
    def product(n: int, m: int) -> set[int]:
        return reduce_cases([("test", {"a": i, "b": j}) for i in range(n) for j in range(m)])

    assert len(product(4, WIDE // 4)) == WIDE
    assert len(product(5, WIDE // 4)) == 6


def test_thin_tests_keep_every_value_inside_tuples() -> None:
    made = [("lerp", (a, b)) for a in range(5) for b in range(6)] + [("copy", (0, 0))]
    cases = [("test", {"kernel": kernel, "layout": n % 2}) for n, kernel in enumerate(made)]
    assert len(reduce_cases(cases)) > 6
    kept = [made[i] for i in reduce_cases(cases, {"test"})]
    assert len(kept) in (7, 8)
    for values in (lambda k: k[0], lambda k: k[1][0], lambda k: k[1][1]):
        assert set(map(values, kept)) == set(map(values, made))
    assert {cases[i][1]["layout"] for i in reduce_cases(cases, {"test"})} == {0, 1}
