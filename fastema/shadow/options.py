"""What all averages take by keyword, checked."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, get_args

from fastema.bridges.registry import dtype_code
from fastema.errors import ArgumentError
from fastema.layout.dtypes import DType, parse
from fastema.shadow.entries import SPLIT, Policy, Wish

__all__ = [
    "OnNonFinite",
    "Options",
    "Policy",
    "Rounding",
    "Watched",
    "checked",
    "dtype_of",
    "wish_of",
]

Rounding = Literal["nearest", "stochastic"]
OnNonFinite = Literal["propagate", "skip", "raise"]
Watched = Literal["all", "sample"]


class Options(TypedDict, total=False):
    """Keywords of :class:`fastema.shadow.Average`, which says what they mean."""

    shadow_dtype: Any
    rounding: Rounding | None
    seed: int
    update_every: int
    start_after: int
    frozen: Policy
    buffers: Policy
    on_nonfinite: OnNonFinite
    drift: bool
    capturable: bool
    watch: Watched


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


def wish_of(shadow_dtype: Any, rounding: Any, together: int) -> Wish:
    """How averages are to be stored, as the keywords say."""
    split = isinstance(shadow_dtype, str) and shadow_dtype == SPLIT
    if rounding is not None:
        checked(rounding, "rounding", Rounding)
    wanted = dtype_of("bf16" if split else shadow_dtype)
    return Wish(wanted, split, rounding != "nearest", together)
