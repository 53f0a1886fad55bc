"""Compare what the code does now with the stored corpus, one test per family."""

from pathlib import Path

import pytest

from ..support.requirements import require_packages
from .__main__ import format_difference
from .store import FAMILIES, differences, load, record


def _mark(name: str) -> object:
    marks = [pytest.mark.tensorflow] if "tensorflow" in name else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("family", list(map(_mark, FAMILIES)))
def test_values_equal_the_stored_corpus(family: str) -> None:
    require_packages(*FAMILIES[family].needs)
    found = differences(family, record(family))
    shown = "\n".join(format_difference(family, one) for one in found[:20])
    assert not found, f"{len(found)} differ (python -m tests.corpus compare {family})\n{shown}"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_stored_tensors_are_not_constant(family: str) -> None:
    for case, values in load(family).items():
        for path, value in values.items():
            head, _, numbers = str(value).partition("): ")
            if head.startswith(("f64 (", "f32 (", "f16 (", "bf16 (")):
                if "residual" in path:  # its first values may be 0
                    continue

                shown = [one for one in numbers.split() if one[0] not in ".#"]
                assert len(shown) < 3 or len(set(shown)) > 1, (case, path, value)


def test_every_file_belongs_to_a_family() -> None:
    stored = Path(__file__).parent / "stored"
    assert {one.stem for one in stored.glob("*.json")} <= set(FAMILIES)
