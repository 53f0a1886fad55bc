"""Names of tensors and dtypes: in errors, and without what wrappers add to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from fastema.errors import BridgeError, DTypeError
from fastema.layout.dtypes import NAMES
from fastema.layout.spec import TensorSpec

__all__ = ["LONE", "code_of", "named", "plain_names", "refuse_repeated"]

LONE: Final = "array"
"""Name of an array that is in no container."""

_WRAPPERS: Final = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Path components that compile, sharding and checkpointing wrappers put into names."""


def code_of(framework: str, name: str) -> str:
    """Return the code of a framework's dtype."""
    if name not in NAMES:
        raise DTypeError(
            f"{framework} dtype {name} has no kernel; leave such arrays out. Known are "
            + ", ".join(NAMES)
        )
    return NAMES[name]


def named(name: str, describe: Callable[[Any], TensorSpec], array: Any) -> TensorSpec:
    """Describe an array; an error says which one it was."""
    try:
        return describe(array)
    except (BridgeError, DTypeError) as error:
        raise type(error)(f"{name}: {error}") from None


def refuse_repeated(names: Iterable[str]) -> None:
    """Refuse two tensors of one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BridgeError(f"two entries are called {name!r}; give them distinct names")
        seen.add(name)


def plain_names(names: Sequence[str]) -> list[str]:
    """Return the names a module would give without wrappers around it or inside it.

    A leading ``module.`` is dropped where every name has it (data parallel wrappers). Names stay as
    they are where that would make two of them equal.
    """
    together = "\n".join(names)
    if not any(one in together for one in _WRAPPERS) and not together.startswith("module."):
        return list(names)  # nothing to leave out
    paths = [[part for part in name.split(".") if part not in _WRAPPERS] for name in names]
    while paths and all(len(path) > 1 and path[0] == "module" for path in paths):
        paths = [path[1:] for path in paths]
    plain = [".".join(path) for path in paths]
    return plain if len(set(plain)) == len(plain) else list(names)
