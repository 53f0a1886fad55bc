"""Check and parse the keyword arguments that all averages share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any, Final, Literal, NamedTuple

from fastema.average.entries import ShadowFormat
from fastema.binding.policies import Policies, Policy, Rounding, check_literal
from fastema.binding.swap import SPLIT
from fastema.bridges.registry import bridge_of, dtype_code
from fastema.errors import ArgumentError, BridgeError, DTypeError
from fastema.layout.device_context import check_seed
from fastema.layout.dtypes import DType, parse_dtype
from fastema.rules import Constant, Rule, Schedule, Window, debiased

__all__ = [
    "OnNonFinite",
    "Policy",
    "Rounding",
    "Settings",
    "check_ema_options",
    "check_flag",
    "check_literal",
    "check_which",
    "dtype_of",
    "format_of",
    "parse_destination",
    "parse_rules",
    "parse_settings",
    "select_shared_options",
]

OnNonFinite = Literal["propagate", "skip", "raise"]
WhenBehind = Literal["wait", "skip"]


_OPTIONS: Final = (
    *("shadow_dtype", "rounding", "seed", "update_every", "start_after", "frozen", "buffers"),
    *("policy", "on_nonfinite", "capturable"),
)


def check_which(which: int | None, decay: Any) -> int | None:
    """Return ``which`` if it selects one of the averages of ``decay``.

    Raises
    ------
    ArgumentError
        If it is out of range, or missing with several averages.
    """
    count = len(decay) if isinstance(decay, Sequence) else 1
    is_index = isinstance(which, Integral) and not isinstance(which, bool)
    fits = is_index and which in range(-count, count)
    if not fits and (which is not None or count > 1):
        raise ArgumentError(
            f"which={which!r}: expected a number from 0 to {count - 1}, the average of "
            f"decay={decay!r} to evaluate and to save"
        )
    return which


def select_shared_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared keyword arguments among the ``locals()`` of a constructor."""
    return {name: value for name, value in arguments.items() if name in _OPTIONS}


def check_flag(value: Any, name: str) -> bool:
    """Return a boolean option; raise an ArgumentError for anything else."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name}={value!r}: expected True or False")
    return value


def dtype_of(value: Any, option: str = "dtype") -> DType | None:
    """Return the dtype for a name such as ``"float32"`` or a framework's dtype; None for None.

    An error names the option that the value was given for.
    """
    if value is None:
        return None
    return parse_dtype(value if isinstance(value, str) else dtype_code(value, option))


def parse_destination(target: Sequence[Any], device: Any, dtype: Any) -> tuple[Any, Any]:
    """Return the device and the dtype that the arguments of ``to()`` ask for; None: unchanged.

    ``target`` holds the positional arguments, as in :meth:`torch.Tensor.to`: a device, a dtype,
    both in this order, or an array whose device and dtype to use.

    Raises
    ------
    ArgumentError
        If the device or the dtype is given twice.
    """
    found: dict[str, Any] = {"device": device, "dtype": dtype}
    for given in target:
        for name, value in _parse_target(given).items():
            if found[name] is not None:
                raise ArgumentError(
                    f"to(): got two values for {name}, {found[name]!r} and {value!r}; expected "
                    "to(device), to(dtype), to(device, dtype) or to(tensor)"
                )
            found[name] = value
    return found["device"], found["dtype"]


def _parse_target(given: Any) -> dict[str, Any]:
    """Return a positional argument of ``to()`` as keywords: device, dtype, or both."""
    if given is None:
        return {}
    if isinstance(given, bool):
        raise ArgumentError(
            f"to({given!r}): expected a device, a dtype or a tensor; pass non_blocking by keyword"
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


def format_of(
    shadow_dtype: Any, rounding: Any, num_averages: int, option: str = "shadow_dtype"
) -> ShadowFormat:
    """Return the storage format that the keyword arguments of an average describe.

    Errors call ``shadow_dtype`` by the name ``option``.
    """
    split = isinstance(shadow_dtype, str) and shadow_dtype == SPLIT
    if rounding is not None:
        check_literal(rounding, "rounding", Rounding)
    wanted = dtype_of("bf16" if split else shadow_dtype, option)
    return ShadowFormat(wanted, split, rounding != "nearest", num_averages)


class Settings(NamedTuple):
    """The keyword arguments that all averages share, checked and parsed."""

    schedule: Schedule
    policies: Policies
    on_nonfinite: OnNonFinite
    capturable: bool
    seed: int
    format: ShadowFormat


def parse_settings(
    rules: Rule | Sequence[Rule],
    *,
    shadow_dtype: Any = None,
    rounding: Any = None,
    seed: Any = 0,
    update_every: Any = 1,
    start_after: Any = 0,
    frozen: Any = "skip",
    buffers: Any = "copy",
    policy: Any = None,
    on_nonfinite: Any = "propagate",
    capturable: Any = False,
) -> Settings:
    """Return the keyword arguments of an average, checked as far as no weights are needed.

    Raises
    ------
    ArgumentError, DTypeError
        Naming the invalid argument and what it accepts.
    """
    schedule = Schedule(rules, update_every, start_after)
    policies = Policies.of(frozen, buffers, policy)
    check_literal(on_nonfinite, "on_nonfinite", OnNonFinite)
    check_flag(capturable, "capturable")
    if capturable and on_nonfinite == "raise":
        raise ArgumentError(
            "on_nonfinite='raise' needs the host, which a captured graph does not ask; with "
            "capturable=True use 'skip', which leaves the update out"
        )
    seed = check_seed(seed)
    stored = format_of(shadow_dtype, rounding, len(schedule.rules))
    return Settings(schedule, policies, on_nonfinite, capturable, seed, stored)


def parse_rules(decay: Any, zero_debias: Any) -> list[Rule]:
    """Return the rules that these arguments of :class:`fastema.EMA` describe.

    Raises
    ------
    ArgumentError
        For a decay outside [0, 1), a windowed mean, or a ``zero_debias`` that is not a bool.
    """
    check_flag(zero_debias, "zero_debias")
    several = decay if isinstance(decay, Sequence) and not isinstance(decay, str) else (decay,)
    rules = [one if isinstance(one, Rule) else Constant(one) for one in several]
    if any(isinstance(rule, Window) for rule in rules):
        raise ArgumentError("a windowed mean needs a ring: build fastema.SMA(weights, window)")
    return [debiased(rule) for rule in rules] if zero_debias else rules


def check_ema_options(decay: Any, *, zero_debias: Any, **options: Any) -> None:
    """Raise the errors of :class:`fastema.EMA` for options that are invalid with any weights."""
    stored = parse_settings(parse_rules(decay, zero_debias), **options).format
    if stored.dtype is not None:
        try:
            stored.stored(parse_dtype("c64" if stored.dtype.parts > 1 else "f32"))
        except DTypeError as error:
            raise DTypeError(f"shadow_dtype does not fit: {error}") from None
