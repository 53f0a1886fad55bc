"""Declare, check and parse the keyword arguments that all averages share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any, Final, Literal, NamedTuple, TypedDict, TypeVar, get_type_hints

from fastema.average.entries import ShadowFormat
from fastema.binding.policies import Policies, Policy, Rounding, check_literal
from fastema.binding.swap import SPLIT
from fastema.bridges.registry import bridge_of, dtype_code
from fastema.errors import ArgumentError, BridgeError, DTypeError
from fastema.hints import check_options
from fastema.layout.device_context import check_seed
from fastema.layout.dtypes import DType, parse_dtype
from fastema.rules import Constant, Rule, Schedule, Window, debiased

__all__ = [
    "AverageOptions",
    "OnNonFinite",
    "Policy",
    "Rounding",
    "Settings",
    "check_ema_options",
    "check_flag",
    "check_literal",
    "check_which",
    "document_options",
    "dtype_of",
    "expand_options",
    "format_of",
    "parse_destination",
    "parse_rules",
    "parse_settings",
    "shared_parameters",
]

OnNonFinite = Literal["propagate", "skip", "raise"]
WhenBehind = Literal["wait", "skip"]


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


class AverageOptions(TypedDict, total=False):
    """List the options that all averages share; :func:`parse_settings` has their defaults.

    Parameters
    ----------
    shadow_dtype : dtype or str, optional
        Dtype of the average, such as ``torch.float32`` or ``"float32"``; by default that of the
        weights. ``"bf16+16"`` splits a float32 average into two halves: ``shadow`` holds the
        nearest bfloat16, ready to use or save, and a second buffer the remaining 16 bits.
    rounding : {"stochastic", "nearest"}, optional
        Rounding of 16-bit averages, stochastic by default. Rounded to nearest, an average stops
        moving once ``w * |x - avg|`` is below half of its last place. The random bits are a
        function of ``seed``, the step, the tensor's name and the element's index in the tensor, so
        a resumed or resharded run gets the same bits. Wider averages round to nearest even.
    seed : int
        Seed for stochastic rounding, from 0 (the default) to 2**63 - 1.
    update_every : int
        Average at every k-th call only, >= 1 (the default). The rule's weight for k steps is used,
        such as ``1 - decay ** k``, so that the horizon in steps does not change.
    start_after : int
        Start averaging after this many calls, >= 0 (the default). Until then the average equals
        the weights.
    frozen : {"skip", "copy", "average"}
        What to do with parameters that need no gradient. Skipped ones (the default) cost no memory
        and no time and are not part of the average; unfreezing one later is an error.
    buffers : {"copy", "average", "skip"}
        What to do with buffers, such as BatchNorm statistics: ``copy`` (the default) keeps those of
        the latest update, ``average`` averages floats. Integers and booleans are always copied
        exactly. Buffers registered with ``persistent=False`` are always skipped.
    policy : mapping of str to {"average", "copy", "skip"}, optional
        What to do with names that match a pattern (:mod:`fnmatch`), such as ``{"*.expert_bias":
        "average", "visual.*": "skip"}``, instead of ``frozen`` and ``buffers``. The first matching
        pattern wins. Tensors that match a ``"skip"`` may come and go later, as adapters do.
    on_nonfinite : {"propagate", "skip", "raise"}
        What to do with a NaN or an infinity in the weights or in copied floats: average it (the
        default), skip the whole call and count it in ``num_skipped``, or raise. ``"skip"`` and
        ``"raise"`` read the tensors once more first, and wait for a GPU. Ranks that share DTensors
        decide together, by an all-reduce of one number. With ``capturable=True`` the GPU skips
        updates without waiting, and ``"raise"`` is an error.
    capturable : bool
        Count the updates on the GPU, so that :meth:`update` can be captured in a CUDA graph whose
        replays follow the schedule, warm-ups and random bits included. Costs one small kernel per
        update; reading :attr:`num_updates` or :attr:`num_skipped` waits for the GPU. Call
        :meth:`update` once on the capturing stream first, or build the average there. False by
        default.
    """

    shadow_dtype: Any
    rounding: Rounding | None
    seed: int
    update_every: int
    start_after: int
    frozen: Policy
    buffers: Policy
    policy: Mapping[str, Policy] | None
    on_nonfinite: OnNonFinite
    capturable: bool


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


_ENTRY: Final = """\
**options : AverageOptions
    Options that all averages share; see :class:`fastema.average.AverageOptions`.
"""
"""What stands in a class's docstring for the options of :class:`AverageOptions`."""

_Class = TypeVar("_Class", bound=type)


def document_options(doc: str) -> str:
    """Replace ``**options`` in a docstring by the texts of :class:`AverageOptions`."""
    shared = inspect.cleandoc(AverageOptions.__doc__ or "").partition("----------\n")[2]
    return inspect.cleandoc(doc).replace(_ENTRY, f"{shared}\n")


def shared_parameters() -> list[inspect.Parameter]:
    """Return the options of :class:`AverageOptions` with their types and defaults."""
    types = get_type_hints(AverageOptions)
    settings = inspect.signature(parse_settings).parameters
    return [settings[name].replace(annotation=types[name]) for name in types]


def expand_options(average: _Class) -> _Class:
    """Give a class whose constructor takes ``**options`` the options of :class:`AverageOptions`.

    Its signature, type hints and docstring then list them, and its constructor raises an
    OptionError for other options.
    """
    constructor = vars(average)["__init__"]
    signature = inspect.signature(constructor)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    parameters = [*own, *shared_parameters()]
    constructor.__signature__ = signature.replace(parameters=parameters)
    hints = {one.name: one.annotation for one in parameters if one.name != "self"}
    constructor.__annotations__ = {**hints, "return": None}
    average.__init__ = check_options(  # type: ignore[misc]
        constructor, AverageOptions.__annotations__
    )
    if average.__doc__:  # None with python -OO
        average.__doc__ = document_options(average.__doc__)
    return average


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
