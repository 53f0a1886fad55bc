"""The low-level interface: three operations in place over any two matching sets of arrays."""

from __future__ import annotations

import math
from typing import Any

from fastema.bridges.memory import allocate
from fastema.bridges.registry import leaves_of, materialised, written
from fastema.engine.locks import rlock
from fastema.engine.moment import Moment, checked_seed
from fastema.engine.program import Program
from fastema.engine.watch import Watch, watch
from fastema.errors import ArgumentError, DTypeError, LayoutError, StateError, listed
from fastema.layout.dtypes import average_of, parse
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_unwritable, unique
from fastema.layout.spec import Leaves

__all__ = ["Plan", "copy_", "lerp_", "mean_between", "swap_"]

_TAG = "all"

_MARKS = {"nearest": "", "stochastic": "~"}
"""How a kernel's format says how it rounds."""


def matched(dst: Leaves, src: Leaves) -> list[Pair]:
    """Leaves of two containers paired by name, checked.

    Raises
    ------
    LayoutError
        Naming every tensor that only one side has.
    """
    dst.refuse_opaque()
    src.refuse_opaque()
    sources = {leaf.name: leaf.spec for leaf in src.items}
    problems = [f"{name!r} is only in the second" for name in sources if name not in set(dst.names)]
    problems += [f"{name!r} is only in the first" for name in dst.names if name not in sources]
    if problems:
        raise LayoutError("the two containers hold different tensors:\n" + listed(problems))
    pairs = [Pair(leaf.name, leaf.spec, sources[leaf.name]) for leaf in dst.items]
    for pair in pairs:
        check_pair(pair)
    return unique(pairs)


class Plan:
    """A cached plan over two parallel containers, for the same operation at every step.

    Where the tensors lie is looked up once; each call checks that it is still so and looks again
    if not (``p.data = ...``, a replaced dict entry, ``array.resize``).

    Parameters
    ----------
    avg, x : array, list, tuple, dict or torch module
        Any mix of frameworks, same names or positions and same shapes. ``avg`` is written; ``x``
        only by :meth:`swap_`. Dtypes may differ: float64, float32, float16, bfloat16, complex64
        and complex128 with their own kind; integers and booleans only with themselves, and not in
        :meth:`lerp_`.
    rounding : {"nearest", "stochastic"}
        Of 16-bit floats in :meth:`lerp_`. To nearest, what is smaller than half the last place of
        ``avg`` is lost; at random it is not, on average.
    seed : int
        Of the random bits, at least 0. They also depend on the number of the call, the tensor's
        name and the element's place in it.

    Raises
    ------
    LayoutError
        If names, shapes or devices differ, if ``avg`` overlaps ``x`` or itself, or is expanded or
        read-only.
    DTypeError
        For a dtype or a pair of dtypes without a kernel.
    BridgeError
        For an object of no known framework.

    Examples
    --------
    >>> import numpy as np
    >>> avg, x = [np.zeros(2, np.float32)], [np.ones(2, np.float32)]
    >>> plan = Plan(avg, x)
    >>> plan.lerp_(0.25); plan.lerp_(0.25)
    >>> avg[0]
    array([0.4375, 0.4375], dtype=float32)
    """

    def __init__(self, avg: Any, x: Any, *, rounding: str = "nearest", seed: int = 0) -> None:
        if rounding not in _MARKS:
            raise ArgumentError(f"rounding={rounding!r}: expected one of {', '.join(_MARKS)}")
        self._mark, self._seed, self._calls = _MARKS[rounding], checked_seed(seed), 0
        self._containers = (materialised(avg), materialised(x))
        self._lock = rlock()
        self._build()

    def _build(self) -> None:
        dst, src = (leaves_of(container) for container in self._containers)
        self._pairs = [self._rounded(pair) for pair in matched(dst, src)]
        for name, spec, *_ in self._pairs:
            refuse_unwritable(name, spec)
        refuse_overlap(
            [(f"avg {name}", spec) for name, spec, *_ in self._pairs],
            [(f"x {name}", spec) for name, _, spec, *_ in self._pairs],
        )
        self._exact = [pair for pair in self._pairs if not pair.dst.kind.real]
        self._swappable = False
        self._program = Program({_TAG: self._pairs})
        self._written = written(spec.owner for _, spec, *_ in self._pairs)
        self._swapped = written(spec.owner for _, _, spec, *_ in self._pairs)
        self._watches: tuple[Watch, Watch] = (watch(dst), watch(src))

    def _rounded(self, pair: Pair) -> Pair:
        narrow = pair.dst.dtype in ("f16", "bf16")
        return pair._replace(form=f"{pair.dst.dtype}{self._mark}") if narrow else pair

    def _run(self, operation: str, weight: float = 0.0) -> None:
        with self._lock:
            if any(watched.changed() for watched in self._watches):
                self._build()
            self._check(operation)
            if operation == "lerp" and self._mark:
                self._refuse_capture()
            self._program.run({_TAG: operation}, Moment((weight,), self._seed, self._calls))
            self._calls += 1
            for tell, arrays in self._written + (self._swapped if operation == "swap" else []):
                tell(arrays)

    def _check(self, operation: str) -> None:
        if self._exact and operation == "lerp":
            raise DTypeError(
                "only floats are averaged:\n"
                + listed(f"{name!r} is {dst.dtype}" for name, dst, *_ in self._exact)
                + "\nLeave them out, or use fastema.EMA, which copies integers exactly."
            )
        if operation == "swap" and not self._swappable:
            for name, _, spec, *_ in self._pairs:
                refuse_unwritable(name, spec)
            refuse_overlap([(f"x {name}", spec) for name, _, spec, *_ in self._pairs])
            self._swappable = True

    def _refuse_capture(self) -> None:
        homes = {pair.dst.device: pair.dst.home for pair in self._pairs}
        if any(home is not None and home.capturing() for home in homes.values()):
            raise StateError(
                "random bits captured in a graph would be the same at every replay: use "
                "fastema.EMA(..., capturable=True), whose steps advance on the GPU"
            )

    def lerp_(self, weight: float) -> None:
        """``avg += weight * (x - avg)``, computed in float32 (float64 where either side is).

        Parameters
        ----------
        weight : float
            Of the new value: ``1 - decay``. At 1 the result is ``x`` itself.

        Raises
        ------
        ArgumentError
            If it is not a finite number.
        DTypeError
            If a tensor is of an integer or boolean dtype.
        StateError
            With ``rounding="stochastic"`` while the stream is captured into a CUDA graph.
        """
        if not math.isfinite(weight):
            raise ArgumentError(f"weight={weight!r}: expected a finite number, 1 - decay")
        self._run("lerp", weight)

    def swap_(self) -> None:
        """Exchange the contents, each rounded to the other's dtype where they differ.

        Raises
        ------
        LayoutError
            If ``x`` is read-only, expanded or overlaps itself.
        """
        self._run("swap")

    def copy_(self) -> None:
        """``avg = x``, rounded to the dtype of ``avg``."""
        self._run("copy")


def lerp_(avg: Any, x: Any, weight: float) -> None:
    """``avg += weight * (x - avg)`` in place, once; see :class:`Plan` for the same at every step.

    Parameters
    ----------
    avg, x : array, list, tuple, dict or torch module
    weight : float
        Of the new value, ``1 - decay``.

    Raises
    ------
    LayoutError, DTypeError, BridgeError, ArgumentError
        As :class:`Plan` and :meth:`Plan.lerp_`; nothing is written then.

    Examples
    --------
    >>> import numpy as np
    >>> avg = np.array([1.0, 2.0])
    >>> lerp_(avg, np.array([3.0, 2.0]), 0.5)
    >>> avg
    array([2., 2.])
    """
    Plan(avg, x).lerp_(weight)


def swap_(a: Any, b: Any) -> None:
    """Exchange the contents of two containers in place; see :meth:`Plan.swap_`.

    Parameters
    ----------
    a, b : array, list, tuple, dict or torch module
        Each takes the other's contents, rounded to its own dtype.

    Raises
    ------
    LayoutError, DTypeError, BridgeError
        As :class:`Plan`; nothing is written then.
    """
    Plan(a, b).swap_()


def copy_(dst: Any, src: Any) -> None:
    """Copy a container's contents into another in place; see :meth:`Plan.copy_`.

    Parameters
    ----------
    dst, src : array, list, tuple, dict or torch module
        ``dst`` takes the contents of ``src``, rounded to its own dtype.

    Raises
    ------
    LayoutError, DTypeError, BridgeError
        As :class:`Plan`; nothing is written then.
    """
    Plan(dst, src).copy_()


def mean_between(later: Any, n: int, earlier: Any, m: int) -> dict[str, Any]:
    """The mean of the weights between two states of a cumulative mean, in float64.

    ``(n * later - m * earlier) / (n - m)``, for means of the first ``n`` and ``m`` updates of one
    run: any window of a run from two saved means. The difference of two long means loses digits:
    keep them in float64 (``SWA(..., shadow_dtype="float64")``), the error is then about
    ``2 * n / (n - m)`` units in the last place of a float64.

    Parameters
    ----------
    later, earlier : array, list, tuple, dict or torch module
        Such as ``swa.shadow`` then, and a copy of it earlier (``swa.state_dict()["shadow"][0]``).
    n, m : int
        How many updates each is the mean of, ``n > m >= 1``.

    Returns
    -------
    dict of str to array
        New arrays in float64 (complex128 for complex weights), by name; without the integers,
        of which there is no mean.

    Raises
    ------
    ArgumentError
        If not ``n > m >= 1``.
    LayoutError, DTypeError
        If the two do not match.
    """
    if not (isinstance(n, int) and isinstance(m, int) and n > m >= 1):
        raise ArgumentError(f"n={n!r}, m={m!r}: expected whole numbers with n > m >= 1")
    means = leaves_of(materialised(later))
    floats = [leaf for leaf in means.items if leaf.spec.kind.real is not None]
    kinds = [average_of(leaf.spec.kind, parse("f64")) for leaf in floats]
    memories = allocate(zip((leaf.spec for leaf in floats), kinds, strict=True))
    found = {leaf.name: array for leaf, (array, _) in zip(floats, memories, strict=True)}
    last = {leaf.name: leaf.spec.owner for leaf in floats}
    others = {leaf.name for leaf in means.items} - set(found)
    first = {
        leaf.name: leaf.spec.owner
        for leaf in leaves_of(materialised(earlier)).items
        if leaf.name not in others
    }
    difference = Plan(found, first)
    copy_(found, last)
    difference.lerp_(-m / (n - m))
    return found
