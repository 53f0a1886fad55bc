"""The comparison of a peer's interface with ours names each difference."""

from collections.abc import Callable
from typing import Any

import pytest

from fastema.compat.signatures import compare_interfaces


class Theirs:
    def __init__(self, model: Any, decay: float = 0.99, *, device: Any = None) -> None: ...

    def update(self, model: Any = None) -> None: ...

    @property
    def module(self) -> Any: ...

    @staticmethod
    def make(path: str) -> None: ...

    def _private(self) -> None: ...


class Ours:
    def __init__(
        self, model: Any, decay: float = 0.99, *, device: Any = None, exact: bool = False
    ) -> None: ...

    def update(self, model: Any = None, *, step: int = 0) -> None: ...

    def further(self) -> None: ...

    @property
    def module(self) -> Any: ...

    @staticmethod
    def make(path: str) -> None: ...


def with_changes(**changes: Any) -> type:
    return type("Theirs", (Theirs,), {"__module__": Theirs.__module__, **changes})


def init_more(self: Any, model: Any, decay: float = 0.99, *, device: Any = None, new: int = 1): ...
def init_less(self: Any, model: Any, *, device: Any = None): ...
def init_default(self: Any, model: Any, decay: float = 0.9, *, device: Any = None): ...
def init_order(self: Any, decay: float = 0.99, model: Any = None, *, device: Any = None): ...
def update_more(self: Any, model: Any = None, step: int = 0, when: int = 0): ...


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"__init__": init_more}, "Theirs takes 'new', which is not known"),
        ({"__init__": init_less}, "Theirs does not take 'decay'"),
        ({"__init__": init_default}, "Theirs has decay=0.9, expected 0.99"),
        ({"__init__": init_order}, "in another order"),
        ({"update": update_more}, r"Theirs.update takes 'when', which is not known"),
        ({"fresh": lambda self: None}, "Theirs.fresh is not known"),
        ({"state": property(lambda self: None)}, "Theirs.state is not known"),
    ],
)
def test_each_difference_is_reported(changes: dict[str, Callable[..., Any]], said: str) -> None:
    found = compare_interfaces(with_changes(**changes), Ours)
    assert any(said in one for one in found), found
