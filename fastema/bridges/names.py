"""Names of tensors and dtypes: for error messages, and without the prefixes that wrappers add."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import NAMES
from fastema.layout.spec import TensorSpec

__all__ = ["LONE", "code_of", "describe_named", "plain_names", "refuse_repeated"]

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


def plain_names(names: Sequence[str]) -> list[str]:
    """Return parameter names without the path components that wrapper modules add.

    A leading ``module.`` (data parallel) is dropped if every name has it. All names stay unchanged
    if two of them would become equal.
    """
    together = "\n".join(names)
    if not any(one in together for one in _WRAPPERS) and not together.startswith("module."):
        return list(names)  # no wrappers
    paths = [[part for part in name.split(".") if part not in _WRAPPERS] for name in names]
    while paths and all(len(path) > 1 and path[0] == "module" for path in paths):
        paths = [path[1:] for path in paths]
    plain = [".".join(path) for path in paths]
    return plain if len(set(plain)) == len(plain) else list(names)
