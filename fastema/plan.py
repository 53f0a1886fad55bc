"""The low-level interface: three operations in place over any two matching sets of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, ClassVar, Final, Literal, TypeAlias

from fastema.bridges.memory import allocate
from fastema.bridges.moving import Located, Locator
from fastema.bridges.registry import leaves_of, materialised, reshard, written
from fastema.engine.locks import rlock
from fastema.engine.moment import Moment, checked_seed
from fastema.engine.program import Program
from fastema.engine.watch import Watch, watch
from fastema.errors import ArgumentError, DTypeError, LayoutError, StateError, listed
from fastema.layout.dtypes import average_of, parse
from fastema.layout.group import (
    Guard,
    Pair,
    check_pair,
    refuse_overlap,
    refuse_unwritable,
    unique,
)
from fastema.layout.spec import Leaves, Role, TensorSpec

__all__ = ["Plan", "PolicyOf", "copy_", "lerp_", "mean_between", "swap_"]

PolicyOf: TypeAlias = Callable[[str, Role], Literal["average", "copy", "skip"]]
"""What is done with a tensor of ``x``, by its name and what the model uses it for."""

_OPERATIONS: Final = {
    "lerp": {"averaged": "lerp", "copied": "copy"},
    "copy": {"averaged": "copy", "copied": "copy"},
    "swap": {"averaged": "swap", "copied": "swap"},
}
"""What each operation of a plan does with the tensors that are averaged, and with the others."""

_MARKS = {"nearest": "", "stochastic": "~"}
"""How a kernel's format says how it rounds."""


def _without_skipped(leaves: Leaves, policy: PolicyOf, roles: Mapping[str, Role]) -> Leaves:
    """The leaves that a policy does not skip, by the role that a name has in ``roles``."""
    kept = {name for name in leaves.roles if _answer(policy, name, roles[name]) != "skip"}
    items = [leaf for leaf in leaves.items if leaf.name in kept]
    opaque = [one for one in leaves.opaque if one.name in kept]
    return replace(leaves, items=items, opaque=opaque)


def _answer(policy: PolicyOf, name: str, role: Role) -> str:
    answer = policy(name, role)
    if answer not in ("average", "copy", "skip"):
        raise ArgumentError(
            f"policy({name!r}, {role!r}) is {answer!r}: expected 'average', 'copy' or 'skip'"
        )
    return answer


def matched(dst: Leaves, src: Leaves, called: tuple[str, str]) -> list[Pair]:
    """Leaves of two containers paired by name, checked.

    Parameters
    ----------
    dst, src : Leaves
    called : (str, str)
        What an error calls them.

    Raises
    ------
    LayoutError
        Naming every tensor that only one side has.
    """
    dst.refuse_opaque()
    src.refuse_opaque()
    sources = {leaf.name: leaf.spec for leaf in src.items}
    names = set(dst.names)
    problems = [f"{name!r} is only in {called[1]}" for name in sources if name not in names]
    problems += [f"{name!r} is only in {called[0]}" for name in dst.names if name not in sources]
    if problems:
        raise LayoutError(
            f"{called[0]} and {called[1]} hold different tensors:\n" + listed(problems)
        )
    pairs = [Pair(leaf.name, leaf.spec, sources[leaf.name]) for leaf in dst.items]
    for pair in pairs:
        check_pair(pair)
    return unique(pairs)


class Plan:
    """A cached plan over two parallel containers, for the same operation at every step.

    Where the tensors lie is looked up once; each call checks that it is still so and looks again
    if not (``p.data = ...``, a replaced dict entry, ``array.resize``). JAX arrays and TensorFlow
    variables, which lie elsewhere after every step, are looked up at every call.

    Parameters
    ----------
    avg, x : array, list, tuple, dict, JAX pytree, module or model
        Any mix of frameworks, same names or positions and same shapes. ``avg`` is written; ``x``
        only by :meth:`swap_`. JAX arrays, TensorFlow tensors and read-only NumPy arrays can only
        be ``x``. Dtypes may differ: float64, float32, float16, bfloat16, complex64 and complex128
        with their own kind; integers and booleans only with themselves, and not in :meth:`lerp_`.
    rounding : {"nearest", "stochastic"}
        Of 16-bit floats in :meth:`lerp_`. To nearest, what is smaller than half the last place of
        ``avg`` is lost; at random it is not, on average.
    seed : int
        Of the random bits, at least 0. They also depend on the number of the call, the tensor's
        name and the element's index in it.
    policy : callable, optional
        ``policy(name, role)``: ``"average"``, ``"copy"`` or ``"skip"`` for each tensor of ``x``,
        whose role is ``"weight"``, in a module also ``"frozen"`` or ``"buffer"``. :meth:`lerp_`
        copies what is to be copied, and integers and booleans; what is skipped may be missing on
        either side. Asked when the tensors are looked up. Without one all have to be floats.

    Attributes
    ----------
    calls : int
        Operations so far; may be set, to give the random bits of a run that is gone on with.

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

    _called: ClassVar = ("the first", "the second")

    def __init__(
        self,
        avg: Any,
        x: Any,
        *,
        rounding: str = "nearest",
        seed: int = 0,
        policy: PolicyOf | None = None,
    ) -> None:
        if rounding not in _MARKS:
            raise ArgumentError(f"rounding={rounding!r}: expected one of {', '.join(_MARKS)}")
        self._mark, self._seed, self.calls = _MARKS[rounding], checked_seed(seed), 0
        self._avg, self._x = materialised(avg), materialised(x)
        self._policy = policy
        self._lock = rlock()
        self._build()

    def _build(self) -> None:
        reshard(self._avg)
        reshard(self._x)
        whole = leaves_of(self._avg), leaves_of(self._x)
        dst, src = whole
        roles = {**dst.roles, **src.roles}
        if self._policy is not None:
            dst, src = (_without_skipped(side, self._policy, roles) for side in whole)
        pairs = [self._rounded(pair) for pair in matched(dst, src, self._called)]
        for pair in pairs:
            refuse_unwritable(pair.name, pair.dst)
        avg, x = [(p.name, p.dst) for p in pairs], [(p.name, p.src) for p in pairs]
        _refuse_overlap(avg, x)
        watches = [None if leaves.moving else watch(leaves) for leaves in (dst, src)]
        locators = [
            Locator(leaves, container) if leaves.moving else None
            for leaves, container in zip(whole, (self._avg, self._x), strict=True)
        ]
        tell = [written(spec.owner for _, spec in side) for side in (avg, x)]
        if src.moving:  # what never changes is not to be kept: the next step has other arrays
            pairs = [pair._replace(src=pair.src.kept_by(None)) for pair in pairs]
        copied = self._copied(pairs, roles)
        averaged = [pair for pair in pairs if pair.name not in copied]
        self._program = Program(
            {"averaged": averaged, "copied": [pair for pair in pairs if pair.name in copied]}
        )
        self._pairs, self._guard = pairs, Guard(avg, x) if any(locators) else None
        # Of tensors that are only ever replaced nothing is kept but the last.
        self._leaves = None if dst.moving or src.moving else (dst, src)
        self._watches: Sequence[Watch | None] = watches
        self._locators: Sequence[Locator | None] = locators
        self._written, self._swapped = tell
        self._exact = [pair for pair in averaged if not pair.dst.kind.real]
        self._random = any(pair.form.endswith("~") for pair in averaged)
        self._swappable = False
        self._trained = self._told_apart(whole[1])

    def _told_apart(self, src: Leaves) -> list[tuple[Any, bool]]:
        """Parameters of which the policy asks whether they are trained, and whether they are."""
        policy = self._policy
        if policy is None:
            return []
        return [
            (leaf.spec.owner, leaf.spec.owner.requires_grad)
            for leaf in src.items
            if leaf.role != "buffer" and hasattr(leaf.spec.owner, "requires_grad")
            if policy(leaf.name, "weight") != policy(leaf.name, "frozen")
        ]

    def _copied(self, pairs: Sequence[Pair], roles: Mapping[str, Role]) -> set[str]:
        """Names of what is copied where the rest is averaged."""
        policy = self._policy
        if policy is None:
            return set()
        return {
            pair.name
            for pair in pairs
            if pair.dst.kind.whole or policy(pair.name, roles[pair.name]) == "copy"
        }

    def _found(self, x: Any, swap: bool) -> list[Located | None]:
        """Where everything lies that moves; what else moved is an occasion to look again."""
        if x is not None:
            x = materialised(x)
        if x is None or x is self._x or _same_list(x, self._x):
            return self._looked_up(swap)
        self._x = x
        return self._looked_up(swap, anew=self._locators[1] is None)

    def _looked_up(self, swap: bool, anew: bool = False) -> list[Located | None]:
        anew = anew or any(one.requires_grad is not was for one, was in self._trained)
        if anew or any(watched is not None and watched.changed() for watched in self._watches):
            self._build()
        for _ in range(2):
            sides = zip(self._locators, (self._avg, self._x), (True, swap), strict=True)
            found = [
                None if locator is None else locator.locate(container, write=write)
                for locator, container, write in sides
            ]
            located = zip(found, self._locators, strict=True)
            if all(one is not None or locator is None for one, locator in located):
                return found
            self._build()
        raise LayoutError("the tensors change while they are looked at, by another thread")

    def _rounded(self, pair: Pair) -> Pair:
        narrow = pair.dst.dtype in ("f16", "bf16")
        return pair._replace(form=f"{pair.dst.dtype}{self._mark}") if narrow else pair

    def _ready(self, operation: str, x: Any) -> list[Located | None]:
        """All checks; what is returned is to be kept until the operation is done."""
        before = dict(vars(self))
        try:
            found = self._found(x, operation == "swap")
            self._check(operation)
            if any(found):
                self._relocate(*found)
        except BaseException:  # the next call goes on as if this one had not been
            vars(self).update(before)
            raise
        return found

    def _run(self, operation: str, x: Any = None, weight: float = 0.0) -> None:
        with self._lock:
            located = self._ready(operation, x)
            locator, src = self._locators[1], located[1]
            if locator is not None and src is not None and x is None:
                locator.refuse_used(src, f"plan.{operation}_(x=...)")
            if operation == "lerp" and self._random:
                self._refuse_capture()
            moment = Moment((weight,), self._seed, self.calls)
            self._program.run(_OPERATIONS[operation], moment)
            if locator is not None and src is not None:
                locator.notify_used(src)
            del located, src
            self.calls += 1
            for tell, written in self._written + (self._swapped if operation == "swap" else []):
                tell(written)

    def _relocate(self, dst: Located | None, src: Located | None) -> None:
        there = [None if one is None else one.addresses for one in (dst, src)]
        assert self._guard is not None
        if self._guard.touched(*there):
            _refuse_overlap(
                [(pair.name, _at(pair.dst, pair.name, there[0])) for pair in self._pairs],
                [(pair.name, _at(pair.src, pair.name, there[1])) for pair in self._pairs],
            )
        self._program.relocate(*there)

    def _check(self, operation: str) -> None:
        if self._exact and operation == "lerp":
            raise DTypeError(
                "only floats are averaged:\n"
                + listed(f"{name!r} is {dst.dtype}" for name, dst, *_ in self._exact)
                + "\nLeave them out, or give a policy: integers are then copied, as by fastema.EMA."
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

    def lerp_(self, weight: float, x: Any = None) -> None:
        """``avg += weight * (x - avg)``, computed in float32 (float64 where either side is).

        Parameters
        ----------
        weight : float
            Of the new value: ``1 - decay``. At 1 the result is ``x`` itself.
        x : optional
            Where it is not the one of before, from here on: the same names and shapes. JAX users
            give it at every step: arrays that never change are used once without it.

        Raises
        ------
        ArgumentError
            If ``weight`` is not a finite number, or ``x`` is left out where its arrays never change
            and were used by the call before.
        DTypeError
            If a tensor is of an integer or boolean dtype.
        StateError
            With ``rounding="stochastic"`` while the stream is captured into a CUDA graph.
        """
        if not math.isfinite(weight):
            raise ArgumentError(f"weight={weight!r}: expected a finite number, 1 - decay")
        self._run("lerp", x, weight)

    def swap_(self) -> None:
        """Exchange the contents, each rounded to the other's dtype where they differ.

        Raises
        ------
        LayoutError
            If ``x`` is read-only, expanded or overlaps itself.
        """
        self._run("swap")

    def copy_(self, x: Any = None) -> None:
        """``avg = x``, rounded to the dtype of ``avg``.

        Parameters
        ----------
        x : optional
            See :meth:`lerp_`.
        """
        self._run("copy", x)


def _same_list(one: Any, other: Any) -> bool:
    """Whether both are lists of the same objects, such as of ``model.parameters()`` each time."""
    if not (isinstance(one, list) and isinstance(other, list) and len(one) == len(other)):
        return False
    return all(map(is_, one, other))


def _at(spec: TensorSpec, name: str, addresses: Mapping[str, int] | None) -> TensorSpec:
    return spec if addresses is None else spec.at(addresses[name])


def _refuse_overlap(
    avg: Sequence[tuple[str, TensorSpec]], x: Sequence[tuple[str, TensorSpec]]
) -> None:
    refuse_overlap(
        [(f"avg {name}", spec) for name, spec in avg], [(f"x {name}", spec) for name, spec in x]
    )


def lerp_(avg: Any, x: Any, weight: float) -> None:
    """``avg += weight * (x - avg)`` in place, once; see :class:`Plan` for the same at every step.

    Parameters
    ----------
    avg, x : array, list, tuple, dict, JAX pytree, module or model
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
    a, b : array, list, tuple, dict, JAX pytree, module or model
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
    dst, src : array, list, tuple, dict, JAX pytree, module or model
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
    later, earlier : array, list, tuple, dict, JAX pytree, module or model
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
    for leaf in floats:
        if leaf.spec.division is not None:
            found[leaf.name] = leaf.spec.division.tensor(found[leaf.name])
    return found
