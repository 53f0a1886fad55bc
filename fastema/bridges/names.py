"""Names of tensors and dtypes: for error messages, and without the prefixes that wrappers add."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import NAMES
from fastema.layout.spec import TensorSpec

__all__ = [
    "LONE",
    "code_of",
    "describe_named",
    "plain_names",
    "refuse_repeated",
    "strip_wrapper_prefixes",
    "unwrapped_names",
]

Value = TypeVar("Value")

LONE: Final = "array"
"""Name of an array that was passed on its own, outside of a container."""

_WRAPPERS: Final = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Path components that compile, sharding and checkpointing wrappers add to names."""


def code_of(framework: str, name: str) -> str:
    """Return fastema's code of a dtype name; raise a DTypeError if it has no kernel."""
    if name not in NAMES:
        raise DTypeError(
            f"{framework} dtype {name} has no kernel; leave such arrays out. Known dtypes: "
            + ", ".join(NAMES)
        )
    return NAMES[name]


def describe_named(name: str, describe: Callable[[Any], TensorSpec], array: Any) -> TensorSpec:
    """Return ``describe(array)``; put the array's name in front of any error."""
    try:
        return describe(array)
    except (BridgeError, DTypeError) as error:
        raise type(error)(f"{name}: {error}") from None


def refuse_repeated(names: Iterable[str]) -> None:
    """Raise a BridgeError if two names are equal."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BridgeError(f"two entries are called {name!r}; give them distinct names")
        seen.add(name)


def unwrapped_names(names: Sequence[str], parallel: Iterable[str] = ()) -> list[str]:
    """Return names without the path components that wrapper modules add.

    All names stay unchanged if two of them would become equal.

    Parameters
    ----------
    names : sequence of str
    parallel : iterable of str
        Paths of the data parallel modules, whose only child is called ``module``.
    """
    inner = sorted((f"{path}.module." if path else "module." for path in parallel), key=len)
    together = "\n".join(names)
    if not inner and not any(one in together for one in _WRAPPERS):
        return list(names)
    plain = []
    for name in names:
        for prefix in reversed(inner):  # the innermost first: its path has the outer ones
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        plain.append(".".join(part for part in name.split(".") if part not in _WRAPPERS))
    return plain if len(set(plain)) == len(plain) else list(names)


def plain_names(names: Sequence[str], parallel: Iterable[str] = ()) -> list[str]:
    """Return :func:`unwrapped_names`, without a leading ``module.`` that all names have.

    Checkpoints and the containers of other libraries do not tell whether it is the component of a
    data parallel wrapper.
    """
    plain = unwrapped_names(names, parallel)
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    return plain if len(set(plain)) == len(plain) else list(names)


def strip_wrapper_prefixes(named: Mapping[str, Value]) -> dict[str, Value]:
    """Return a mapping with its names as :func:`plain_names` returns them."""
    return dict(zip(plain_names(list(named)), named.values(), strict=True))
