"""The common base of moving averages of numbers: losses, accuracies, gradient norms."""

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
"""Averages of a series, whether all are finite, and a function that takes the series in."""

LIGHTEST, HEAVIEST = 1e-100, 1e100
"""Weights between which products and sums of them neither overflow nor vanish."""

MOST_PENDING: Final = 1024
"""Values that may wait on a device before they are read, whether asked for or not."""

SCALE: Final = 2.0**-380
"""Weights are multiplied by this, which rounds nothing: no product of one and a value overflows."""


class MovingAverage(ABC):
    """A moving average of numbers that come one by one.

    Parameters
    ----------
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        What to do with a NaN or an infinity. ``"show"``: the average reads as that value until the
        next finite one, and then continues from before; the value is never averaged, so that one
        bad batch neither hides nor spoils the curve (as in TensorBoard's smoothing). ``"skip"``:
        leave it out, keep the average. ``"propagate"``: IEEE arithmetic. ``"raise"``: a
        :class:`~fastema.errors.NonFiniteError`, with nothing changed.
    """

    __slots__ = ("_num_skipped", "_num_updates", "_on_nonfinite", "_pending", "_reading")

    def __init__(self, on_nonfinite: OnNonFinite) -> None:
        if on_nonfinite not in get_args(OnNonFinite):
            raise ArgumentError(
                f"on_nonfinite={on_nonfinite!r}: expected one of {', '.join(get_args(OnNonFinite))}"
            )
        self._on_nonfinite = on_nonfinite
        self._pending: list[tuple[Number, Number, LazyFloat]] = []
        self._begin()

    def _begin(self) -> None:
        self._reading = math.nan
        self._num_updates = self._num_skipped = 0

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The arguments that it was made with."""

    @abstractmethod
    def _push(self, x: float, weight: float) -> float:
        """Take in a value; return the average."""

    @abstractmethod
    def _run(self, x: Floats, weights: Floats | None) -> Run:
        """Average a series with positive weights, without taking it in yet."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """Return what the next averages depend on, beside the settings and counts."""

    @abstractmethod
    def _remember(self, memory: Mapping[str, Any]) -> None:
        """Restore what :meth:`_memory` returned."""

    # -- values ------------------------------------------------------------------------------------

    def update(self, value: Any, weight: float = 1.0) -> float:
        """Take in one value; the average now.

        Parameters
        ----------
        value : float, or scalar or array of one element of NumPy, torch, TensorFlow, JAX, CuPy
            What lies on an accelerator, or is still being computed, is kept and not waited for. The
            average after it is a number that is read when it is used, with the methods of a float;
            ``float(number)`` before it goes into a file. After 1,024 unread ones all are read.
        weight : float
            Of this value beside others, such as the size of its batch or its number of tokens: from
            1e-100 to 1e100, or 0, which leaves it out.

        Raises
        ------
        ArgumentError
            For any other weight. For what is kept, this and the others are raised when it is read.
        BridgeError
            For a value that is no number, or several.
        NonFiniteError
            For a NaN or an infinity with ``on_nonfinite="raise"``.
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
                    f"value {x} after {self._num_updates} values: the average was told to raise"
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
        if len(self._pending) >= MOST_PENDING:
            self._read_pending()
        return cast(float, average)

    def _read_pending(self, last: LazyFloat | None = None) -> float:
        """Read what waits on a device, in order, as far as one of them; the average.

        What cannot be read, or is refused, is dropped, and its result remembers why.
        """
        while self._pending:
            value, weight, average = self._pending[0]
            try:
                result: float | Exception = self._add(float(value), float(weight))
            except Exception as error:
                result = error
            # An interrupt before here leaves it waiting.
            del self._pending[0]
            average.resolve(result)
            if isinstance(result, Exception):
                raise result
            if average is last:
                break
        return self._reading

    def _read_all_pending(self) -> None:
        """Read all that waits, whatever is dropped."""
        while self._pending:
            with suppress(Exception):
                self._read_pending()

    def update_many(self, values: ArrayLike, weights: ArrayLike | None = None) -> Floats:
        """Take in a series of values, as by :meth:`update` one after the other, but compiled.

        Parameters
        ----------
        values, weights : array_like
            One-dimensional, of any real dtype; a weight for each value, if any.

        Returns
        -------
        numpy.ndarray
            float64, of the same length: the average after each value.

        Raises
        ------
        ArgumentError
            For anything that is not one-dimensional and real, and for weights that do not fit.
        NonFiniteError
            With ``on_nonfinite="raise"``, naming the first such value; nothing is taken in.
        """
        x = _series(values, "values")
        given = None if weights is None else _checked_weights(weights, len(x))
        self._read_pending()
        if not len(x):
            return x
        if given is None or given.all():
            averages, finite, take_in = self._run(x, given)
            if finite or self._on_nonfinite == "propagate":
                take_in()
                self._num_updates += len(x)
                self._reading = float(averages[-1])
                return averages
        return self._update_some(x, np.ones(len(x)) if given is None else given)

    def _update_some(self, x: Floats, weights: Floats) -> Floats:
        """Take in a series with values that are left out."""
        weighty = weights > 0.0
        odd = weighty & ~np.isfinite(x) & (self._on_nonfinite != "propagate")
        if odd.any() and self._on_nonfinite == "raise":
            first = int(np.argmax(odd))
            raise NonFiniteError(f"values[{first}] is {x[first]}: the average was told to raise")
        taken = weighty & ~odd
        shown = x.copy()
        if taken.any():
            shown[taken], _, take_in = self._run(x[taken], weights[taken])
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
        """The average now; NaN before the first value."""
        if self._pending:
            self._read_pending()
        return self._reading

    def get_average(self) -> float:
        """The same as :attr:`average`."""
        return self.average

    @property
    def on_nonfinite(self) -> OnNonFinite:
        """What to do with a NaN or an infinity."""
        return self._on_nonfinite

    @property
    def num_updates(self) -> int:
        """Values taken in."""
        self._read_pending()
        return self._num_updates

    @property
    def num_skipped(self) -> int:
        """Values that were not finite and not taken in."""
        self._read_pending()
        return self._num_skipped

    # -- state -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all values."""
        self._read_all_pending()
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to continue: numbers, strings and lists, exact in JSON."""
        self._read_pending()
        return {
            **self._settings(),
            "average": self._reading,
            "num_updates": self._num_updates,
            "num_skipped": self._num_skipped,
            **self._memory(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another one of the same kind and settings was.

        Raises
        ------
        CheckpointError
            For any other state, naming what differs. The average stays as it was.
        """
        check_settings(self, self._settings(), state)
        other = self.new_like()
        try:
            other._reading = float(state["average"])
            other._num_updates = int(state["num_updates"])
            other._num_skipped = int(state["num_skipped"])
            other._remember(state)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"not the state of {self!r}: {error!r}") from None
        self._read_all_pending()
        for kind in type(self).__mro__:
            for name in getattr(kind, "__slots__", ()):
                setattr(self, name, getattr(other, name))

    def new_like(self) -> MovingAverage:
        """A new one with the same settings, without values."""
        return type(self)(**self._settings())

    def __reduce__(self) -> tuple[Callable[[], MovingAverage], tuple[()], dict[str, Any]]:
        return partial(type(self), **self._settings()), (), self.state_dict()

    __setstate__ = load_state_dict

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings})"


def check_settings(owner: object, settings: Mapping[str, Any], state: Any) -> None:
    """Refuse the state of something else, or of one with other settings."""
    for name, mine in settings.items():
        if not isinstance(state, Mapping) or name not in state:
            raise CheckpointError(f"not the state of {owner!r}: it has no {name!r}")
        saved = state[name]
        # An array compares to none.
        if not isinstance(saved, Real | str | None) or saved != mine:
            raise CheckpointError(
                f"this state is of {name}={saved!r}, but {name}={mine!r} here: use the same "
                "settings"
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
