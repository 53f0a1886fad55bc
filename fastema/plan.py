"""The low-level interface: three operations in place over any two matching sets of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, TypeAlias

from fastema.binding.binding import Binding, Match
from fastema.binding.sides import Trained
from fastema.bridges.memory import allocate
from fastema.bridges.registry import leaves_of, materialised, reshard
from fastema.engine.locks import rlock
from fastema.errors import ArgumentError, DTypeError, LayoutError, StateError, listed
from fastema.layout.device_context import LaunchArgs, checked_seed
from fastema.layout.dtypes import average_of, parse
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_unwritable, unique
from fastema.layout.spec import Leaves, Role

__all__ = ["Plan", "PolicyOf", "copy_", "lerp_", "mean_between", "swap_"]

PolicyOf: TypeAlias = Callable[[str, Role], Literal["average", "copy", "skip"]]
"""Decides what to do with a tensor of ``x``, by its name and role in the model."""

_OPERATIONS: Final = {
    "lerp": {"averaged": "lerp", "copied": "copy"},
    "copy": {"averaged": "copy", "copied": "copy"},
    "swap": {"averaged": "swap", "copied": "swap"},
}
"""Kernel operations of a plan's methods, for averaged and for copied tensors."""

_MARKS = {"nearest": "", "stochastic": "~"}
"""Marks of the kernel formats that round in a certain way."""


def _without_skipped(leaves: Leaves, policy: PolicyOf, roles: Mapping[str, Role]) -> Leaves:
    """The leaves that a policy does not skip, by the role that a name has in ``roles``."""
    kept = {name for name in leaves.roles if _decide(policy, name, roles[name]) != "skip"}
    items = [leaf for leaf in leaves.items if leaf.name in kept]
    opaque = [one for one in leaves.opaque if one.name in kept]
    return replace(leaves, items=items, opaque=opaque)


def _resharded_leaves(container: Any) -> Leaves:
    reshard(container)
    return leaves_of(container)


def _decide(policy: PolicyOf, name: str, role: Role) -> str:
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
    places = {spec.address: name for name, spec in sources.items() if name in names}
    places.pop(0, None)  # empty tensors
    problems = [
        f"{name!r} is only in {called[1]}"
        + (f", where it is {places[at]!r} under another name" if at in places else "")
        for name, at in ((name, spec.address) for name, spec in sources.items())
        if name not in names
    ]
    problems += [f"{name!r} is only in {called[0]}" for name in dst.names if name not in sources]
    if problems:
        raise LayoutError(
            f"{called[0]} and {called[1]} hold different tensors:\n" + listed(problems)
        )
    pairs = [Pair(leaf.name, leaf.spec, sources[leaf.name]) for leaf in dst.items]
    for pair in pairs:
        check_pair(pair)
    return unique(pairs)


@dataclass(frozen=True)
class _PairSelection:
    """Selects the pairs of a plan; holds no reference to the plan, so that there is no cycle."""

    policy: PolicyOf | None
    mark: str
    called: tuple[str, str]

    def __call__(self, avg: Leaves, x: Leaves) -> Match:
        """Pair what the policy does not skip; integers are copied where there is a policy."""
        policy, roles = self.policy, {**avg.roles, **x.roles}
        dst, src = avg, x
        if policy is not None:
            dst, src = (_without_skipped(side, policy, roles) for side in (avg, x))
        pairs = [self._rounded(pair) for pair in matched(dst, src, self.called)]
        parts: dict[str, list[Pair]] = {"averaged": [], "copied": []}
        for pair in pairs:
            refuse_unwritable(pair.name, pair.dst)
            is_copied = policy is not None and (
                pair.dst.kind.whole or policy(pair.name, roles[pair.name]) == "copy"
            )
            parts["copied" if is_copied else "averaged"].append(pair)
        return Match(parts, dst, src, self._policy_parameters(x))

    def _policy_parameters(self, x: Leaves) -> list[Trained]:
        """Parameters whose policy depends on whether they are trained."""
        policy = self.policy
        if policy is None:
            return []
        return [
            Trained(leaf.spec.owner, leaf.spec.owner.requires_grad)
            for leaf in x.items
            if leaf.role != "buffer" and hasattr(leaf.spec.owner, "requires_grad")
            if policy(leaf.name, "weight") != policy(leaf.name, "frozen")
        ]

    def _rounded(self, pair: Pair) -> Pair:
        random = pair.dst.kind.random
        return pair._replace(form=f"{pair.dst.dtype}{self.mark}") if random else pair


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
        Operations so far; set it when resuming, for the random bits.
    binding : Binding
        Where both sides lie.

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
        self._seed, self.calls = checked_seed(seed), 0
        self._lock = rlock()
        self.binding = Binding(
            materialised(avg),
            materialised(x),
            _PairSelection(policy, _MARKS[rounding], self._called),
            labels=("avg ", "x "),
            look=_resharded_leaves,
        )

    def _run(
        self, operation: str, check: Callable[[], None], x: Any = None, weight: float = 0.0
    ) -> None:
        binding, swaps = self.binding, operation == "swap"
        once = "" if swaps else f"plan.{operation}_(x=...)"
        with self._lock, binding.current(x, write=swaps, once=once) as program:
            check()
            program.run(_OPERATIONS[operation], LaunchArgs((weight,), self._seed, self.calls))
            self.calls += 1
            binding.notify_write(*((0, 1) if swaps else (0,)))

    def _check_lerp(self) -> None:
        exact, is_random = self.binding.cached("lerp", self._lerped)
        if exact:
            raise DTypeError(
                "only floats are averaged:\n"
                + listed(exact)
                + "\nLeave them out, or give a policy: integers are then copied, as by fastema.EMA."
            )
        if is_random and self.binding.capturing():
            raise StateError(
                "random bits captured in a graph would be the same at every replay: use "
                "fastema.EMA(..., capturable=True), whose steps advance on the GPU"
            )

    def _lerped(self) -> tuple[list[str], bool]:
        """List averaged tensors that are no floats, and tell whether random bits are used."""
        pairs = self.binding.tagged["averaged"]
        exact = [f"{one.name!r} is {one.dst.dtype}" for one in pairs if one.dst.kind.real is None]
        return exact, any(pair.form.endswith("~") for pair in pairs)

    def _check_swap(self) -> None:
        self.binding.cached("swap", self._refuse_unswappable)

    def _refuse_unswappable(self) -> None:
        pairs = self.binding.pairs
        for pair in pairs:
            refuse_unwritable(pair.name, pair.src)
        refuse_overlap([(f"x {pair.name}", pair.src) for pair in pairs])

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
        self._run("lerp", self._check_lerp, x, weight)

    def check(self, x: Any = None) -> None:
        """Raise what :meth:`lerp_` would; nothing is written.

        Parameters
        ----------
        x : optional
            See :meth:`lerp_`.
        """
        with self._lock, self.binding.current(x):
            self._check_lerp()

    @contextmanager
    def swappable(self, x: Any) -> Iterator[Binding]:
        """Hold the binding, checked for a swap with ``x``, in a block."""
        with self._lock, self.binding.current(x, write=True):
            self._check_swap()
            yield self.binding

    def swap_(self) -> None:
        """Exchange the contents, each rounded to the other's dtype where they differ.

        Raises
        ------
        LayoutError
            If ``x`` is read-only, expanded or overlaps itself.
        """
        self._run("swap", self._check_swap)

    def copy_(self, x: Any = None) -> None:
        """``avg = x``, rounded to the dtype of ``avg``.

        Parameters
        ----------
        x : optional
            See :meth:`lerp_`.
        """
        self._run("copy", lambda: None, x)


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
        which have no mean.

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
