"""Moving averages of numbers that come one by one: losses, accuracies, gradient norms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastema.engine import series
from fastema.errors import ArgumentError, CheckpointError, NonFiniteError
from fastema.rules.checks import checked_decay, checked_whole
from fastema.tracking.deferred import Deferred, number
from fastema.tracking.window import WindowSum

__all__ = ["ExponentialMovingAverage", "MovingAverage", "OnNonFinite", "SimpleMovingAverage"]

OnNonFinite = Literal["show", "skip", "propagate", "raise"]

Floats: TypeAlias = NDArray[np.float64]
Number: TypeAlias = float | Deferred

LIGHTEST, HEAVIEST = 1e-100, 1e100
"""Weights between which products and sums of them neither overflow nor vanish."""

LARGEST_WINDOW: Final = 10**9

MOST_PENDING: Final = 1024
"""Values that may wait on a device; then they are read, whoever looks or not."""


class MovingAverage(ABC):
    """What the moving averages of numbers have in common.

    Parameters
    ----------
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        What a NaN or an infinity does. ``"show"``: the average reads as that value until the next
        finite one, with which it goes on from before; it is never taken in, so that one bad batch
        neither hides nor spoils the curve (TensorBoard's smoothing draws it so). ``"skip"``: it is
        left out, the average stays. ``"propagate"``: IEEE arithmetic. ``"raise"``: a
        :class:`~fastema.errors.NonFiniteError`, with nothing changed.

    Attributes
    ----------
    average : float
        Now; NaN before the first value.
    num_updates : int
        Values taken in.
    num_skipped : int
        Values that were not finite and not taken in.
    """

    __slots__ = ("_num_skipped", "_num_updates", "_on_nonfinite", "_pending", "_reading")

    def __init__(self, on_nonfinite: OnNonFinite) -> None:
        if on_nonfinite not in get_args(OnNonFinite):
            raise ArgumentError(
                f"on_nonfinite={on_nonfinite!r}: expected one of {', '.join(get_args(OnNonFinite))}"
            )
        self._on_nonfinite = on_nonfinite
        self._pending: list[tuple[Number, Number, Deferred]] = []
        self._begin()

    def _begin(self) -> None:
        self._reading = math.nan
        self._num_updates = self._num_skipped = 0

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The arguments that it was made with."""

    @abstractmethod
    def _push(self, x: float, weight: float) -> float:
        """Take in a value; the average."""

    @abstractmethod
    def _run(self, x: Floats, weights: Floats | None) -> tuple[Floats, bool, Callable[[], None]]:
        """The running average of values, whether all of it is finite, and what takes them in."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """What the averages to come depend on."""

    @abstractmethod
    def _remember(self, memory: Mapping[str, Any]) -> None:
        """Take that over."""

    # -- values ------------------------------------------------------------------------------------

    def update(self, value: Any, weight: float = 1.0) -> float:
        """Take in one value.

        Parameters
        ----------
        value : float, or scalar or array of one element of NumPy, torch, TensorFlow, JAX, CuPy
            What lies on an accelerator, or is still being computed, is kept and not waited for.
        weight : float
            Of this value beside others, such as the size of its batch or its number of tokens;
            0 leaves it out. Numbers as for ``value``, from 1e-100 to 1e100.

        Returns
        -------
        float
            The average now. After a value that is kept, a number that is read when it is used, with
            the methods of a float; ``float(number)`` before it goes into a file. After 1,024 of
            them unread, all are read at once.

        Raises
        ------
        ArgumentError
            For a weight that is negative, not finite, or out of those bounds. Of a weight that is
            kept, when it is read.
        BridgeError
            For a value that is no number, or several.
        NonFiniteError
            For a NaN or an infinity with ``on_nonfinite="raise"``. Of a value that is kept, when it
            is read.
        """
        x = value if type(value) is float else number(value)
        w = weight if type(weight) is float else number(weight)
        if self._pending or isinstance(x, Deferred) or isinstance(w, Deferred):
            return self._kept(x, w)
        return self._take(x, w)

    def _take(self, x: float, weight: float) -> float:
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

    def _kept(self, value: Number, weight: Number) -> float:
        deferred = Deferred(lambda: self._settle(deferred))
        self._pending.append((value, weight, deferred))
        if len(self._pending) >= MOST_PENDING:
            self._settle()
        return cast(float, deferred)

    def _settle(self, last: Deferred | None = None) -> float:
        """Read what waits on a device, in order, as far as one of them; the average.

        What cannot be read, or is refused, is dropped, and its result remembers why.
        """
        while self._pending:
            value, weight, average = self._pending[0]
            try:
                found: float | Exception = self._take(float(value), float(weight))
            except Exception as error:
                found = error
            # An interrupt before here leaves it waiting.
            del self._pending[0]
            average.settle(found)
            if isinstance(found, Exception):
                raise found
            if average is last:
                break
        return self._reading

    def _read_all(self) -> None:
        """The same, whatever is dropped."""
        while self._pending:
            with suppress(Exception):
                self._settle()

    def update_many(self, values: ArrayLike, weights: ArrayLike | None = None) -> Floats:
        """Take in a series of values, as by :meth:`update` one after the other, but compiled.

        Parameters
        ----------
        values : array_like
            One-dimensional, of any real dtype.
        weights : array_like, optional
            One for each value.

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
        self._settle()
        if not len(x):
            return x
        if given is None or given.all():
            averages, finite, take_in = self._run(x, given)
            if finite or self.on_nonfinite == "propagate":
                take_in()
                self._num_updates += len(x)
                self._reading = float(averages[-1])
                return averages
        return self._update_some(x, np.ones(len(x)) if given is None else given)

    def _update_some(self, x: Floats, weights: Floats) -> Floats:
        """The same for a series with values that are left out."""
        odd = np.zeros(len(x), bool)
        if self._on_nonfinite != "propagate":
            odd = ~np.isfinite(x) & (weights > 0.0)
        if odd.any() and self._on_nonfinite == "raise":
            first = int(np.argmax(odd))
            raise NonFiniteError(f"values[{first}] is {x[first]}: the average was told to raise")
        taken = (weights > 0.0) & ~odd
        shown = x.copy()
        if taken.any():
            shown[taken], _, take_in = self._run(x[taken], weights[taken])
            take_in()
        visible = taken | odd if self._on_nonfinite == "show" else taken
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
            self._settle()
        return self._reading

    def get_average(self) -> float:
        """The same as :attr:`average`."""
        return self.average

    @property
    def on_nonfinite(self) -> OnNonFinite:
        """What a NaN or an infinity does."""
        return self._on_nonfinite

    @property
    def num_updates(self) -> int:
        """Values taken in."""
        self._settle()
        return self._num_updates

    @property
    def num_skipped(self) -> int:
        """Values that were not finite and not taken in."""
        self._settle()
        return self._num_skipped

    # -- state -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all values."""
        self._read_all()
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """All that goes on from here: numbers, strings and lists, which JSON holds exactly."""
        self._settle()
        return {
            **self._settings(),
            "average": self._reading,
            "num_updates": self._num_updates,
            "num_skipped": self._num_skipped,
            **self._memory(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another one was.

        Parameters
        ----------
        state : mapping
            Of :meth:`state_dict` of an average with the same settings.

        Raises
        ------
        CheckpointError
            For the state of another kind of average or of other settings, naming them, or with
            entries missing. The average stays as it was.
        """
        for name, mine in self._settings().items():
            if not isinstance(state, Mapping) or name not in state:
                raise CheckpointError(f"not the state of {self!r}: it has no {name!r}")
            if not is_setting(state[name], mine):
                raise CheckpointError(
                    f"this state is of {name}={state[name]!r}, the average has {name}={mine!r}: "
                    "make it with the same settings"
                )
        other = self.alike()
        try:
            other._reading = float(state["average"])
            other._num_updates = int(state["num_updates"])
            other._num_skipped = int(state["num_skipped"])
            other._remember(state)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"not the state of {self!r}: {error!r}") from None
        self._read_all()
        for name in _slots(type(self)):
            setattr(self, name, getattr(other, name))

    def alike(self) -> MovingAverage:
        """A new one with the same settings, without values."""
        return type(self)(**self._settings())

    def __reduce__(self) -> tuple[Callable[..., MovingAverage], tuple[Any, ...]]:
        return _made, (type(self), self._settings(), self.state_dict())

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings})"


class SimpleMovingAverage(MovingAverage):
    """The mean of the last ``window_size`` values, of all of them until there are so many.

    ``avg_n = (x_(n-window_size+1) + ... + x_n) / window_size``; with weights
    ``sum(w_k x_k) / sum(w_k)`` over the same values. A value costs the same for any window, and no
    error builds up, after ten million values as after ten: without weights each average is the sum
    of its window, exact but for one rounding, divided by their number. With weights the products
    are rounded too.

    Parameters
    ----------
    window_size : int
        Values, from 1 to 1e9.
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        What a NaN or an infinity does, see :class:`MovingAverage`.

    Raises
    ------
    ArgumentError
        If an argument has no valid value.

    Notes
    -----
    Memory: 24 bytes per value of the window, 48 with weights, and twice that for a moment each time
    that the window has been filled anew, which takes 10 to 20 ns per value; so does
    :meth:`update_many` at its end. To be used by one thread at a time.

    Examples
    --------
    >>> loss = SimpleMovingAverage(window_size=3)
    >>> [loss.update(x) for x in (3.0, 1.0, 2.0, 6.0)]
    [3.0, 2.0, 2.0, 3.0]
    >>> loss.get_average()
    3.0
    """

    __slots__ = ("_products", "_weights", "_window_size")

    def __init__(self, window_size: int = 20, *, on_nonfinite: OnNonFinite = "show") -> None:
        self._window_size = checked_whole(window_size, "window_size", 1)
        if window_size > LARGEST_WINDOW:
            raise ArgumentError(
                f"window_size={window_size}: expected at most {LARGEST_WINDOW:,}; for the mean of "
                "all values so far, keep their sum"
            )
        super().__init__(on_nonfinite)

    def _begin(self) -> None:
        super()._begin()
        self._products = WindowSum(self.window_size)
        self._weights: WindowSum | None = None  # until one is not 1

    @property
    def window_size(self) -> int:
        """Most values in the window."""
        return self._window_size

    @property
    def count(self) -> int:
        """Values in the window."""
        self._settle()
        return self._products.count

    def _settings(self) -> dict[str, Any]:
        return {"window_size": self.window_size, "on_nonfinite": self._on_nonfinite}

    def _push(self, x: float, weight: float) -> float:
        if weight == 1.0 and self._weights is None:
            window = self._products
            return window.push(x) / window.count
        weights = self._window_of_weights()
        return self._products.push(weight * x) / weights.push(weight)

    def _window_of_weights(self) -> WindowSum:
        if self._weights is None:
            self._weights = WindowSum(self._window_size, np.ones(self._products.count))
        return self._weights

    def _run(self, x: Floats, weights: Floats | None) -> tuple[Floats, bool, Callable[[], None]]:
        if self._weights is None and (weights is None or (weights == 1.0).all()):
            mean, finite, refill = self._windowed(self._products, x, mean=True)
            return mean, finite, refill
        given = np.ones(len(x)) if weights is None else weights
        total, finite, refill = self._windowed(self._products, given * x)
        total_weight, _, refill_weights = self._windowed(self._window_of_weights(), given)

        def take_in() -> None:
            refill()
            refill_weights()

        return total / total_weight, finite, take_in

    def _windowed(
        self, window: WindowSum, x: Floats, *, mean: bool = False
    ) -> tuple[Floats, bool, Callable[[], None]]:
        before = window.numbers()
        result, finite = series.rolling_mean(x, before, self.window_size, divide=mean)
        kept = np.concatenate([before, x[-self.window_size :]])
        return result, finite, lambda: window.refill(kept)

    def _memory(self) -> dict[str, Any]:
        weights = self._weights
        return {
            "products": self._products.numbers().tolist(),
            "weights": None if weights is None else weights.numbers().tolist(),
        }

    def _remember(self, memory: Mapping[str, Any]) -> None:
        count = min(self._num_updates, self._window_size)
        products = np.array(memory["products"], np.float64)
        if products.shape != (count,):
            raise ValueError(f"a window of shape {products.shape} where {count} were expected")
        self._products.refill(products)
        if memory["weights"] is not None:
            weights = np.array(memory["weights"], np.float64)
            if weights.shape != (count,) or not (weights > 0.0).all():
                raise ValueError("weights that are not one positive number for each value")
            self._weights = WindowSum(self._window_size, weights)


class ExponentialMovingAverage(MovingAverage):
    """The average ``avg_n = decay * avg_(n-1) + (1 - decay) * x_n``, which begins at ``x_1``.

    With ``debias=True`` it begins with nothing: ``avg_n = (1 - decay) * sum_k decay**(n-k) x_k /
    (1 - decay**n)``, the bias correction of Adam (D. Kingma and J. Ba, 2014,
    https://arxiv.org/abs/1412.6980), in which the first value does not weigh more than others; in
    pandas these are ``ewm(adjust=False)`` and ``ewm(adjust=True)``. With weights it is the average
    of ``w_k x_k`` over that of ``w_k``. What each step rounds off is carried to the next, so that
    no error builds up.

    Parameters
    ----------
    decay : float
        Weight of the old average, in [0, 1); it averages over about ``1 / (1 - decay)`` values.
    debias : bool
        Begin with nothing rather than with the first value.
    on_nonfinite : {"show", "skip", "propagate", "raise"}
        What a NaN or an infinity does, see :class:`MovingAverage`. With ``"propagate"`` the average
        never recovers.

    Raises
    ------
    ArgumentError
        If an argument has no valid value.

    Notes
    -----
    To be used by one thread at a time.

    Examples
    --------
    >>> loss = ExponentialMovingAverage(decay=0.5)
    >>> [loss.update(x) for x in (4.0, 2.0, 2.0)]
    [4.0, 3.0, 2.5]
    >>> loss = ExponentialMovingAverage(decay=0.5, debias=True)
    >>> [loss.update(x) for x in (4.0, 1.0)]
    [4.0, 2.0]
    """

    __slots__ = ("_debias", "_decay", "_state")

    def __init__(
        self, decay: float = 0.9, debias: bool = False, *, on_nonfinite: OnNonFinite = "show"
    ) -> None:
        self._decay = checked_decay(decay)
        if not isinstance(debias, bool):
            raise ArgumentError(f"debias={debias!r}: expected True or False")
        self._debias = debias
        super().__init__(on_nonfinite)

    def _begin(self) -> None:
        super()._begin()
        # Averages of products and of weights, each with what was rounded off.
        self._state: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @property
    def decay(self) -> float:
        """Weight of the old average."""
        return self._decay

    @property
    def debias(self) -> bool:
        """Whether it begins with nothing, and is corrected for that."""
        return self._debias

    @property
    def count(self) -> int:
        """Values in the average."""
        return self.num_updates

    def _settings(self) -> dict[str, Any]:
        return {"decay": self.decay, "debias": self.debias, "on_nonfinite": self._on_nonfinite}

    def _started(self, x: float, weight: float) -> tuple[float, float, float, float]:
        """What the next value meets: without a correction the first one is all of the past."""
        if self._num_updates or self._debias:
            return self._state
        return weight * x, 0.0, weight, 0.0

    def _push(self, x: float, weight: float) -> float:
        average, lost, total, lost_weight = self._started(x, weight)
        average, lost = _stepped(average, lost, weight * x, self._decay)
        if weight == 1.0 == total:
            self._state = (average, lost, total, lost_weight)
            return average
        total, lost_weight = _stepped(total, lost_weight, weight, self._decay)
        self._state = (average, lost, total, lost_weight)
        # To first order in what was rounded off: without it the quotient would be off by both.
        ratio = average / total
        return ratio + (lost - ratio * lost_weight) / total

    def _run(self, x: Floats, weights: Floats | None) -> tuple[Floats, bool, Callable[[], None]]:
        given = np.ones(len(x)) if weights is None else weights
        product, lost, total, lost_weight = self._started(float(x[0]), float(given[0]))
        average, (product, lost) = series.ewm_mean(
            x if weights is None else given * x, self._decay, (product, lost)
        )
        finite = math.isfinite(average[-1])
        if (given != 1.0).any() or total != 1.0:
            weight, (total, lost_weight) = series.ewm_mean(given, self._decay, (total, lost_weight))
            average /= weight
        state = product, lost, total, lost_weight
        return average, finite, lambda: setattr(self, "_state", state)

    def _memory(self) -> dict[str, Any]:
        return {"state": list(self._state)}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        product, lost, total, lost_weight = map(float, memory["state"])
        self._state = (product, lost, total, lost_weight)


def _stepped(average: float, lost: float, x: float, decay: float) -> tuple[float, float]:
    """``decay (average + lost) + (1 - decay) x``, and what that rounds off."""
    # From the side that weighs more: 1 - decay is exact then, and the step is the smaller part.
    if decay >= 0.5:
        share, here, here_rest, there, there_rest = 1.0 - decay, average, lost, x, 0.0
    else:
        share, here, here_rest, there, there_rest = decay, x, 0.0, average, lost
    apart = there - here
    took = apart - there
    rest = ((there - (apart - took)) - (here + took)) + (there_rest - here_rest)
    step = share * apart
    after = here + step
    took = after - here
    lost = here_rest + ((here - (after - took)) + (step - took) + share * rest)
    result = after + lost
    if result - result != 0.0:  # differences of the largest floats, or infinities, are none
        return decay * average + (1.0 - decay) * x, 0.0
    return result, lost - (result - after)


def is_setting(found: Any, mine: Any) -> bool:
    """Whether a saved setting is that of an average; an array, which compares to none, is not."""
    return isinstance(found, Real | str | None) and found == mine


def check_weight(weight: float) -> None:
    if not LIGHTEST <= weight <= HEAVIEST:
        raise ArgumentError(
            f"weight={weight!r}: expected 0, or a number from {LIGHTEST:g} to {HEAVIEST:g}"
        )


def _made(
    kind: type[MovingAverage], settings: dict[str, Any], state: dict[str, Any]
) -> MovingAverage:
    made = kind(**settings)
    made.load_state_dict(state)
    return made


def _slots(kind: type) -> Iterator[str]:
    for one in kind.__mro__:
        yield from getattr(one, "__slots__", ())


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
