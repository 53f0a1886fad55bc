import threading

import pytest

from fastema.engine import registry
from fastema.errors import DTypeError


def test_an_unknown_operation_is_refused_with_a_list_of_known_ones() -> None:
    with pytest.raises(DTypeError, match=r"no kernel for median.*copy.*lerp"):
        registry.kernel("median", ("f32", "f32"), "flat")


def test_a_kernel_is_made_once_for_concurrent_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_loaded", {})
    made = []
    begun = threading.Barrier(4)

    def ask() -> None:
        begun.wait(10)
        made.append(registry.kernel("copy", ("raw1", "raw1"), "flat"))

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(made) == 4
    assert len({id(one) for one in made}) == 1
    assert len(registry._loaded) == 1
