"""Comparison of a peer's class or function with the interface that fastema replaces."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final

__all__ = ["compare_interfaces"]

_OPEN: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NAMED: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def compare_interfaces(theirs: Any, ours: Any) -> list[str]:
    """List the differences between the interfaces of a peer's class or function and ours.

    Parameters and defaults must be the same, except for keyword-only parameters that only ours has.
    Every public method and property of a peer's class must exist in ours.
    """
    is_class = inspect.isclass(ours)
    if inspect.isclass(theirs) is not is_class or not callable(theirs):
        # Something else replaces it already, such as a mock.
        expected = "class" if is_class else "function"
        return [f"{ours.__name__} is a {type(theirs).__name__}, not a {expected}"]
    if not is_class:
        return list(_compare_parameters(ours.__name__, theirs, ours))
    found = list(_compare_parameters(theirs.__name__, theirs.__init__, ours.__init__))
    for name in _public(theirs):
        method, mine = (inspect.getattr_static(one, name, None) for one in (theirs, ours))
        label = f"{theirs.__name__}.{name}"
        if mine is None:
            found.append(f"{label} is not known")
        elif inspect.isfunction(method) and inspect.isfunction(mine):
            found += _compare_parameters(label, method, mine)
    return found


def _public(theirs: type) -> list[str]:
    """Return names of methods and properties that the peer itself defines, not its framework."""
    package = theirs.__module__.partition(".")[0]
    names: dict[str, None] = {}
    for base in theirs.__mro__:
        if base.__module__.partition(".")[0] == package and base.__name__ not in ("Module",):
            names.update(
                (name, None)
                for name, value in vars(base).items()
                if not name.startswith("_")
                and (callable(value) or isinstance(value, property | classmethod | staticmethod))
            )
    return list(names)


def _compare_parameters(
    label: str, theirs: Callable[..., Any], ours: Callable[..., Any]
) -> Iterator[str]:
    try:
        known, found = (dict(inspect.signature(one).parameters) for one in (ours, theirs))
    except ValueError:  # a C function without a signature
        yield f"{label} has no signature"
        return
    for name, parameter in found.items():
        if parameter.kind in _OPEN:
            continue
        if name not in known:
            if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
                yield f"{label} takes {name!r}, which is not known"
        elif repr(parameter.default) != repr(known[name].default):
            yield (f"{label} has {name}={parameter.default!r}, expected {known[name].default!r}")
    places = [[n for n, p in side.items() if p.kind in _NAMED] for side in (found, known)]
    for name in places[1]:
        if name not in found:
            yield f"{label} does not take {name!r}"
    shared = [[name for name in side if name in found and name in known] for side in places]
    if shared[0] != shared[1]:
        yield f"{label} takes {', '.join(places[0])}, in another order"
