"""The base class of moving averages of numbers such as losses, accuracies and gradient norms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from numbers import Real
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastema.errors import ArgumentError, CheckpointError, NonFiniteError
from fastema.tracking.lazy_float import LazyFloat, number

__all__ = ["MovingAverage", "OnNonFinite"]

OnNonFinite = Literal["show", "skip", "propagate", "raise"]

Floats: TypeAlias = NDArray[np.float64]
Number: TypeAlias = float | LazyFloat
Run: TypeAlias = tuple[Floats, bool, Callable[[], None]]
"""The averages of a series, whether all are finite, and a function that commits the series."""

LIGHTEST, HEAVIEST = 1e-100, 1e100
"""The smallest and largest weight whose products and sums neither overflow nor underflow."""

MAX_PENDING: Final = 1024
"""Values that may stay on a device before all of them are read."""

SCALE: Final = 2.0**-380
"""Power of 2 that scales weights exactly, so that weight times value cannot overflow.

Products below 1e-190 become subnormal or 0 instead, which the classes say."""


class MovingAverage(ABC):
    """Base class of moving averages of numbers that arrive one at a time.

    Parameters
    ----------
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        How to treat a NaN or an infinity.

        - ``"show"``: report the value as the average until the next finite value, which continues
          from the old average. The value is never averaged, so one bad batch is visible but does
          not spoil the curve (as in TensorBoard's smoothing).
        - ``"skip"``: ignore the value and keep the average.
        - ``"propagate"``: average the value, by IEEE arithmetic.
        - ``"raise"``: raise a :class:`~fastema.errors.NonFiniteError` and change nothing.
    """

    __slots__ = ("_num_skipped", "_num_updates", "_on_nonfinite", "_pending", "_reading")

    def __init__(self, on_nonfinite: OnNonFinite) -> None:
        if not isinstance(on_nonfinite, str) or on_nonfinite not in get_args(OnNonFinite):
            raise ArgumentError(
                f"on_nonfinite={on_nonfinite!r}: expected one of {', '.join(get_args(OnNonFinite))}"
            )
        self._on_nonfinite = on_nonfinite
        self._pending: list[tuple[Number, Number, LazyFloat]] = []
        self._reset_values()

    def _reset_values(self) -> None:
        self._reading = math.nan
        self._num_updates = self._num_skipped = 0

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return the constructor arguments of this average."""

    @abstractmethod
    def _push(self, x: float, weight: float) -> float:
        """Add one value and return the new average."""

    @abstractmethod
    def _average_series(self, x: Floats, weights: Floats | None) -> Run:
        """Average a series with positive weights, without changing this object yet."""

    @abstractmethod
    def _get_state(self) -> dict[str, Any]:
        """Return the state entries besides the settings and counts."""

    @abstractmethod
    def _set_state(self, memory: Mapping[str, Any]) -> None:
        """Restore the entries that :meth:`_get_state` returned."""

    # -- values ------------------------------------------------------------------------------------

    def update(self, value: Any, weight: float = 1.0) -> float:
        """Add one value and return the new average.

        Parameters
        ----------
        value : float, or scalar or array of one element of NumPy, torch, TensorFlow, JAX, CuPy
            A value that is on an accelerator or still being computed is kept, without waiting for
            it. The result is then a lazy number with the methods of a float, which is read on first
            use; convert it with ``float(number)`` before writing it to a file. After 1,024 unread
            values, all of them are read.
        weight : float
            Weight of this value relative to the others, such as the size of its batch or its number
            of tokens: from 1e-100 to 1e100, or 0, which ignores the value. 1 by default. The class
            says how small ``weight * value`` may be.

        Returns
        -------
        float
            The average after this value.

        Raises
        ------
        ArgumentError
            If the weight is out of range. For values that are kept, all errors are raised when the
            value is read.
        BridgeError
            If the value is not a single number.
        NonFiniteError
            If the value is not finite and ``on_nonfinite="raise"``.
        """
        x = value if type(value) is float else number(value)
        w = weight if type(weight) is float else number(weight)
        if self._pending or isinstance(x, LazyFloat) or isinstance(w, LazyFloat):
            return self._defer(x, w)
        return self._add(x, w)

    def _add(self, x: float, weight: float) -> float:
        if weight != 1.0:
            if not weight:
                return self._reading
            check_weight(weight)
        if x - x != 0.0 and self._on_nonfinite != "propagate":
            if self._on_nonfinite == "raise":
                raise NonFiniteError(
                    f"value {x} after {self._num_updates} values, with on_nonfinite='raise'"
                )
            self._num_skipped += 1
            if self._on_nonfinite == "show":
                self._reading = x
        else:
            self._reading = self._push(x, weight)
            self._num_updates += 1
        return self._reading

    def _defer(self, value: Number, weight: Number) -> float:
        average = LazyFloat(lambda: self._read_pending(average))
        self._pending.append((value, weight, average))
        if len(self._pending) >= MAX_PENDING:
            self._read_pending()
        return cast(float, average)

    def _read_pending(self, last: LazyFloat | None = None) -> float:
        """Read the pending values in order, up to ``last``, and return the average.

        A value that cannot be read or is refused is dropped, and its result stores the error.
        """
        while self._pending:
            value, weight, average = self._pending[0]
            try:
                result: float | Exception = self._add(float(value), float(weight))
            except Exception as error:
                result = error
            # After an interrupt before this line, the value is still pending.
            del self._pending[0]
            average.resolve(result)
            if isinstance(result, Exception):
                raise result
            if average is last:
                break
        return self._reading

    def _read_all_pending(self) -> None:
        """Read all pending values, and ignore errors."""
        while self._pending:
            with suppress(Exception):
                self._read_pending()

    def update_many(self, values: ArrayLike, weights: ArrayLike | None = None) -> Floats:
        """Add a series of values, like :meth:`update` for each value but in compiled code.

        Parameters
        ----------
        values : array_like
            One-dimensional, of any real dtype.
        weights : array_like, optional
            One weight per value, as in :meth:`update`; by default all are 1.

        Returns
        -------
        numpy.ndarray
            The average after each value, in float64.

        Raises
        ------
        ArgumentError
            If an argument is not one-dimensional and real, the lengths differ, or a weight is out
            of range.
        NonFiniteError
            If a value is not finite and ``on_nonfinite="raise"``. The error names the first one;
            nothing changes.
        """
        x = _series(values, "values")
        given = None if weights is None else _checked_weights(weights, len(x))
        self._read_pending()
        if not len(x):
            return x
        if given is None or given.all():
            averages, finite, take_in = self._average_series(x, given)
            if finite or self._on_nonfinite == "propagate":
                take_in()
                self._num_updates += len(x)
                self._reading = float(averages[-1])
                return averages
        return self._update_some(x, np.ones(len(x)) if given is None else given)

    def _update_some(self, x: Floats, weights: Floats) -> Floats:
        """Add a series in which some values have weight 0 or are not finite."""
        weighty = weights > 0.0
        odd = weighty & ~np.isfinite(x) & (self._on_nonfinite != "propagate")
        if odd.any() and self._on_nonfinite == "raise":
            first = int(np.argmax(odd))
            raise NonFiniteError(f"values[{first}] is {x[first]}, with on_nonfinite='raise'")
        taken = weighty & ~odd
        shown = x.copy()
        if taken.any():
            shown[taken], _, take_in = self._average_series(x[taken], weights[taken])
            take_in()
        visible = weighty if self._on_nonfinite == "show" else taken
        latest = np.maximum.accumulate(np.where(visible, np.arange(len(x)), -1))
        result = np.where(latest < 0, self._reading, shown[latest])
        self._num_updates += int(taken.sum())
        self._num_skipped += int(odd.sum())
        self._reading = float(result[-1])
        return result

    # -- reading -----------------------------------------------------------------------------------

    @property
    def average(self) -> float:
        """Current average; NaN before the first value."""
        if self._pending:
            self._read_pending()
        return self._reading

    def get_average(self) -> float:
        """Return :attr:`average`."""
        return self.average

    @property
    def on_nonfinite(self) -> OnNonFinite:
        """How a NaN or an infinity is treated."""
        return self._on_nonfinite

    @property
    def num_updates(self) -> int:
        """Number of values averaged so far."""
        self._read_pending()
        return self._num_updates

    @property
    def num_skipped(self) -> int:
        """Number of values that were not averaged because they were not finite."""
        self._read_pending()
        return self._num_skipped

    # -- state -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset to the initial state, without values."""
        self._read_all_pending()
        self._reset_values()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and lists, which JSON stores exactly."""
        self._read_pending()
        return {
            **self._settings(),
            "average": self._reading,
            "num_updates": self._num_updates,
            "num_skipped": self._num_skipped,
            **self._get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of an average with the same class and settings.

        Raises
        ------
        CheckpointError
            If the state has another class or settings; the error names the difference. Nothing
            changes.
        """
        check_settings(self, self._settings(), state)
        other = self.new_like()
        try:
            other._reading = float(state["average"])
            other._num_updates = int(state["num_updates"])
            other._num_skipped = int(state["num_skipped"])
            other._set_state(state)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"not the state of {self!r}: {error!r}") from None
        self._read_all_pending()
        for kind in type(self).__mro__:
            for name in getattr(kind, "__slots__", ()):
                setattr(self, name, getattr(other, name))

    def new_like(self) -> MovingAverage:
        """Return a new average with the same settings and without values."""
        return type(self)(**self._settings())

    def __reduce__(self) -> tuple[Callable[[], MovingAverage], tuple[()], dict[str, Any]]:
        return partial(type(self), **self._settings()), (), self.state_dict()

    __setstate__ = load_state_dict

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings})"


def check_settings(owner: object, settings: Mapping[str, Any], state: Any) -> None:
    """Raise a CheckpointError unless ``state`` belongs to an object with these settings."""
    for name, mine in settings.items():
        if not isinstance(state, Mapping) or name not in state:
            raise CheckpointError(f"not the state of {owner!r}: it has no {name!r}")
        saved = state[name]
        # Comparing an array would not give a bool.
        if not isinstance(saved, Real | str | None) or saved != mine:
            raise CheckpointError(
                f"this state has {name}={saved!r}, but this object has {name}={mine!r}: use the "
                "same settings"
            )


def check_weight(weight: float) -> None:
    if not LIGHTEST <= weight <= HEAVIEST:
        raise ArgumentError(
            f"weight={weight!r}: expected 0, or a number from {LIGHTEST:g} to {HEAVIEST:g}"
        )


def _series(values: ArrayLike, name: str) -> Floats:
    try:
        found: NDArray[Any] = np.asanyarray(values)
        if found.dtype.kind in "cSUmM" or found.dtype.names:
            raise TypeError(f"dtype {found.dtype}")
        if isinstance(found, np.ma.MaskedArray):
            found = np.ma.filled(found.astype(np.float64), math.nan)
        found = np.ascontiguousarray(found, np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name}: expected a series of real numbers ({error})") from None
    if np.ndim(values) != 1:
        raise ArgumentError(f"{name}: expected one dimension, got shape {np.shape(values)}")
    return found


def _checked_weights(weights: ArrayLike, count: int) -> Floats:
    found = _series(weights, "weights")
    if len(found) != count:
        raise ArgumentError(f"weights: expected one for each of {count} values, got {len(found)}")
    wrong = np.flatnonzero(~((found == 0.0) | ((found >= LIGHTEST) & (found <= HEAVIEST))))
    if len(wrong):
        raise ArgumentError(
            f"weights[{wrong[0]}]={found[wrong[0]]}: expected 0, or numbers from {LIGHTEST:g} to "
            f"{HEAVIEST:g}"
        )
    return found
