"""Checks of the keywords that all averages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, get_args

from fastema.binding.swap import SPLIT
from fastema.bridges.registry import bridge_of, dtype_code
from fastema.errors import ArgumentError, BridgeError, DTypeError
from fastema.layout.dtypes import DType, parse
from fastema.shadow.entries import Policy, Rounding, ShadowFormat

__all__ = [
    "OnNonFinite",
    "Policy",
    "Rounding",
    "WatchMode",
    "checked",
    "checked_which",
    "destination",
    "dtype_of",
    "format_of",
    "options_in",
    "patterns_of",
]

OnNonFinite = Literal["propagate", "skip", "raise"]
WatchMode = Literal["all", "sample"]
WhenBehind = Literal["wait", "skip"]


_OPTIONS: Final = (
    *("shadow_dtype", "rounding", "seed", "update_every", "start_after", "frozen", "buffers"),
    *("policy", "on_nonfinite", "drift", "capturable", "watch"),
)


def checked_which(which: int | None, decay: Any) -> int | None:
    """Check which of the averages of these decays a callback evaluates and saves."""
    count = len(decay) if isinstance(decay, Sequence) else 1
    if which not in range(-count, count) and (which is not None or count > 1):
        raise ArgumentError(
            f"which={which!r}: expected a number from 0 to {count - 1}, that of the average of "
            f"decay={decay!r} to evaluate and to save"
        )
    return which


def options_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the keywords that all averages share from the ``locals()`` of a constructor."""
    return {name: value for name, value in arguments.items() if name in _OPTIONS}


def patterns_of(policy: Any) -> dict[str, Policy]:
    """Check the patterns of names that a user gave, each with a policy."""
    if policy is None:
        return {}
    if not isinstance(policy, Mapping):
        raise ArgumentError(
            f"policy={policy!r}: expected patterns of names and what is done with them, such as "
            "{'*.expert_bias': 'average', 'visual.*': 'skip'}"
        )
    return {
        str(pattern): checked(value, f"policy[{pattern!r}]", Policy)
        for pattern, value in policy.items()
    }


def checked(value: Any, name: str, known: Any) -> Any:
    """A value of a literal type, or an :class:`ArgumentError` that lists the known ones."""
    if value not in get_args(known):
        raise ArgumentError(f"{name}={value!r}: expected one of {', '.join(get_args(known))}")
    return value


def dtype_of(value: Any) -> DType | None:
    """The dtype a user named: None, a name such as ``"float32"``, or a framework's own object."""
    if value is None:
        return None
    return parse(value if isinstance(value, str) else dtype_code(value))


def destination(target: Sequence[Any], device: Any, dtype: Any) -> tuple[Any, Any]:
    """Name the device and the dtype in the arguments of ``to()``; None for what stays.

    ``target`` has the positional ones, as :meth:`torch.Tensor.to` takes them: a device, a dtype, or
    both in this order, or an array whose device and dtype are meant.
    """
    found: dict[str, Any] = {"device": device, "dtype": dtype}
    for given in target:
        for name, value in _named_target(given).items():
            if found[name] is not None:
                raise ArgumentError(
                    f"to(): got two values for {name}, {found[name]!r} and {value!r}; expected "
                    "to(device), to(dtype), to(device, dtype) or to(tensor)"
                )
            found[name] = value
    return found["device"], found["dtype"]


def _named_target(given: Any) -> dict[str, Any]:
    """One positional argument of ``to()``, by what it is."""
    if given is None:
        return {}
    if isinstance(given, bool):
        raise ArgumentError(
            f"to({given!r}): expected a device, a dtype or a tensor; non_blocking goes by keyword"
        )
    if not isinstance(given, str | int):
        with suppress(BridgeError):
            array = bridge_of(given).describe(given)
            return {"device": array.device, "dtype": given.dtype}
    return {"dtype" if _is_dtype(given) else "device": given}


def _is_dtype(value: Any) -> bool:
    if isinstance(value, str) and value == SPLIT:
        return True
    try:
        dtype_of(value)
    except (ArgumentError, DTypeError):
        return False
    return True


def format_of(shadow_dtype: Any, rounding: Any, num_averages: int) -> ShadowFormat:
    """Return how averages are to be stored, as the keywords say."""
    split = isinstance(shadow_dtype, str) and shadow_dtype == SPLIT
    if rounding is not None:
        checked(rounding, "rounding", Rounding)
    wanted = dtype_of("bf16" if split else shadow_dtype)
    return ShadowFormat(wanted, split, rounding != "nearest", num_averages)
