"""The faults of planted.py apply to the current sources."""

import pytest

from .planted import FAULTS, ROOT, Fault


@pytest.mark.skipif(not (ROOT / "kernels").exists(), reason="needs a checkout")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.room}, {fault.name}")
def test_fault_has_exactly_one_place(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    assert fault.new not in (fault.old, None)
