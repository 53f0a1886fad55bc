"""Whether a peer's class or function has the interface that ours stands in for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final

__all__ = ["differences"]

_OPEN: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NAMED: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def differences(theirs: Any, ours: Any) -> list[str]:
    """List what a peer's class or function has and ours lacks, and the reverse.

    Parameters and their defaults have to be the same, but for further ones of ours that are given
    by keyword; every public method and property of theirs has to be there.
    """
    is_class = inspect.isclass(ours)
    if inspect.isclass(theirs) is not is_class or not callable(theirs):
        # Something else stands in for it: a mock, say.
        expected = "class" if is_class else "function"
        return [f"{ours.__name__} is a {type(theirs).__name__}, and no {expected}"]
    if not is_class:
        return list(_parameters(ours.__name__, theirs, ours))
    found = list(_parameters(theirs.__name__, theirs.__init__, ours.__init__))
    for name in _public(theirs):
        method, mine = (inspect.getattr_static(one, name, None) for one in (theirs, ours))
        label = f"{theirs.__name__}.{name}"
        if mine is None:
            found.append(f"{label} is not known")
        elif inspect.isfunction(method) and inspect.isfunction(mine):
            found += _parameters(label, method, mine)
    return found


def _public(theirs: type) -> list[str]:
    """Methods and properties of the peer's own; those of a framework's base class are inherited."""
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


def _parameters(label: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> Iterator[str]:
    try:
        known, found = (dict(inspect.signature(one).parameters) for one in (ours, theirs))
    except ValueError:  # of a function in C that does not say
        yield f"{label} has no signature"
        return
    for name, parameter in found.items():
        if parameter.kind in _OPEN:
            continue
        if name not in known:
            if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
                yield f"{label} takes {name!r}, which is not known"
        elif repr(parameter.default) != repr(known[name].default):
            yield (f"{label} has {name}={parameter.default!r}, known is {known[name].default!r}")
    places = [[n for n, p in side.items() if p.kind in _NAMED] for side in (found, known)]
    for name in places[1]:
        if name not in found:
            yield f"{label} does not take {name!r}"
    shared = [[name for name in side if name in found and name in known] for side in places]
    if shared[0] != shared[1]:
        yield f"{label} takes {', '.join(places[0])}, in another order"
