"""Low-level interface: interpolate, swap and copy two matching sets of arrays in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Final, TypeAlias

from fastema.binding.binding import Binding, Match
from fastema.binding.policies import Policies, Policy, Rounding, check_literal
from fastema.binding.recent import RecentRuns
from fastema.binding.sides import FreezeState
from fastema.binding.steady import SteadyRun
from fastema.bridges.memory import allocate
from fastema.bridges.registry import leaves_of, list_iterators, reshard
from fastema.engine.interrupts import defer_signals
from fastema.engine.locks import rlock
from fastema.errors import ArgumentError, DTypeError, LayoutError, StateError, format_problems
from fastema.hints import check_options
from fastema.layout.device_context import LaunchArgs, check_seed
from fastema.layout.dtypes import average_of, parse_dtype
from fastema.layout.group import Pair, check_pair, drop_repeated, refuse_overlap, refuse_unwritable
from fastema.layout.spec import Leaf, Leaves, Opaque, Role

__all__ = ["Plan", "PolicyOf", "copy_", "lerp_", "mean_between", "swap_"]

PolicyOf: TypeAlias = Callable[[str, Role], Policy]
"""``policy(name, role)`` returns what to do with a tensor."""

_OPERATIONS: Final = {
    "lerp": {"averaged": "lerp", "copied": "copy"},
    "copy": {"averaged": "copy", "copied": "copy"},
    "swap": {"averaged": "swap", "copied": "swap"},
}
"""Kernel operations of :class:`Plan` methods, for averaged and copied tensors."""

_MARKS: Final[dict[str, str]] = {"nearest": "", "stochastic": "~"}
"""Suffixes of kernel formats, by rounding."""


def _without(leaves: Leaves, skipped: Container[str]) -> Leaves:
    """Return the leaves except those with skipped names."""
    items = [leaf for leaf in leaves.items if leaf.name not in skipped]
    opaque = [one for one in leaves.opaque if one.name not in skipped]
    return replace(leaves, items=items, opaque=opaque)


def _named(*sides: Leaves) -> list[Leaf | Opaque]:
    return [one for side in sides for of_side in (side.items, side.opaque) for one in of_side]


def _roles(avg: Leaves, x: Leaves) -> dict[str, Role]:
    """Return the roles of all tensors: those in ``x``, otherwise those in ``avg``.

    In a list or dict every tensor is a weight: the buffers of ``avg`` are then those of both.
    """
    roles = {**avg.roles, **x.roles}
    if x.structure is not None:
        roles |= {one.name: one.role for one in _named(avg) if one.role == "buffer"}
    return roles


def _resharded_leaves(container: Any) -> Leaves:
    reshard(container)
    return leaves_of(container)


def match_leaves(dst: Leaves, src: Leaves, called: tuple[str, str]) -> list[Pair]:
    """Return the leaves of two containers paired by name, after checking each pair.

    Parameters
    ----------
    dst, src : Leaves
    called : (str, str)
        Names of the two containers in errors.

    Raises
    ------
    LayoutError
        Naming every tensor that only one side has; if shapes or devices of a pair differ.
    DTypeError
        If no kernel takes the two dtypes of a pair.
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
            f"{called[0]} and {called[1]} hold different tensors:\n" + format_problems(problems)
        )
    pairs = [Pair(leaf.name, leaf.spec, sources[leaf.name]) for leaf in dst.items]
    for pair in pairs:
        check_pair(pair)
    return drop_repeated(pairs)


@dataclass
class _PairSelection:
    """Selects the pairs of a plan. Holds no reference to the plan: no cycle.

    A user's :class:`Policies` skip buffers with ``persistent=False``; a function is asked for each.
    """

    policy: PolicyOf
    mark: str
    called: tuple[str, str]
    is_checked: bool = False  # later calls accept patterns whose tensors are gone

    def __call__(self, avg: Leaves, x: Leaves) -> Match:
        """Return the pairs that the policy does not skip; integers and booleans are copied."""
        named = _named(avg, x)
        options = self.policy if isinstance(self.policy, Policies) else None
        if options is not None and not self.is_checked:
            options.check_used(named)
        self.is_checked = True
        chosen = {name: self.policy(name, role) for name, role in _roles(avg, x).items()}
        skipped = {name for name, policy in chosen.items() if policy == "skip"}
        if options is not None:
            skipped |= {one.name for one in named if not one.persistent}
        dst, src = (_without(side, skipped) for side in (avg, x))
        parts: dict[str, list[Pair]] = {"averaged": [], "copied": []}
        for pair in match_leaves(dst, src, self.called):
            refuse_unwritable(pair.name, pair.dst)
            is_copied = pair.dst.kind.whole or chosen[pair.name] == "copy"
            parts["copied" if is_copied else "averaged"].append(self._with_rounding(pair))
        return Match(parts, dst, src, self._policy_parameters(x))

    def _policy_parameters(self, x: Leaves) -> list[FreezeState]:
        """Return the parameters whose policy depends on ``requires_grad``."""
        return [
            FreezeState(leaf.spec.owner, leaf.spec.owner.requires_grad)
            for leaf in x.items
            if leaf.role != "buffer" and hasattr(leaf.spec.owner, "requires_grad")
            if self.policy(leaf.name, "weight") != self.policy(leaf.name, "frozen")
        ]

    def _with_rounding(self, pair: Pair) -> Pair:
        random = pair.dst.kind.random
        return pair._replace(form=f"{pair.dst.dtype}{self.mark}") if random else pair


class Plan:
    """Cached plan to run ``lerp_``, ``swap_`` or ``copy_`` on two containers at every step.

    :meth:`lerp_` computes ``avg += weight * (x - avg)`` over all tensors in one pass. The plan
    locates the tensors once; each call checks for moved or replaced ones (``p.data = ...``, a new
    dict entry, ``array.resize``) and locates them again. JAX arrays and TensorFlow variables, which
    move at every step, are located at every call.

    Parameters
    ----------
    avg, x : array, list, tuple, dict, JAX pytree, module or model
        Containers with the same names or positions and shapes, from any mix of frameworks. ``avg``
        is written; ``x`` only by :meth:`swap_`. JAX arrays, TensorFlow tensors and read-only NumPy
        arrays can only be in ``x``. Dtypes may differ among float64, float32, float16 and bfloat16,
        and between complex64 and complex128. Integers and booleans need equal dtypes and are
        copied.
    rounding : {"nearest", "stochastic"}
        Rounding of 16-bit floats in :meth:`lerp_`, to nearest by default. Rounding to nearest loses
        changes below half of the last place of ``avg``; stochastic rounding keeps them on average.
    seed : int
        Seed for stochastic rounding, from 0 (the default) to 2**63 - 1. The random bits also depend
        on the number of the call, the tensor's name and the element's index in the tensor.
    frozen : {"average", "copy", "skip"}
        What :meth:`lerp_` does with parameters of ``x`` that need no gradient: average them (the
        default), copy or skip them. Skipped tensors take part in no operation and may be missing on
        either side.
    buffers : {"copy", "average", "skip"}
        What :meth:`lerp_` does with buffers of modules, such as BatchNorm statistics: ``copy`` (the
        default) keeps those of ``x``, ``average`` averages floats. Integers and booleans are always
        copied. Buffers registered with ``persistent=False`` are always skipped.
    policy : mapping of str to {"average", "copy", "skip"}, optional
        What to do with names that match a pattern (:mod:`fnmatch`), such as ``{"*.expert_bias":
        "average", "visual.*": "skip"}``, instead of ``frozen`` and ``buffers``; see
        :class:`fastema.EMA`. The first matching pattern wins.

    Attributes
    ----------
    calls : int
        Operations so far; with stochastic rounding, set it when resuming.
    binding : Binding
        Pairs and current locations of the tensors.

    Raises
    ------
    ArgumentError
        If an option is invalid, or a pattern matches no name.
    LayoutError
        If names, shapes or devices differ, if ``avg`` overlaps ``x`` or itself, or is expanded or
        read-only.
    DTypeError
        For a dtype or a pair of dtypes without a kernel.
    BridgeError
        For an object of an unknown framework.

    Examples
    --------
    >>> import numpy as np
    >>> avg, x = [np.zeros(2, np.float32)], [np.ones(2, np.float32)]
    >>> plan = Plan(avg, x)
    >>> plan.lerp_(0.25); plan.lerp_(0.25)
    >>> avg[0]
    array([0.4375, 0.4375], dtype=float32)

    A target network, whose parameters follow and whose BatchNorm statistics are copied:

    >>> import copy, torch
    >>> online = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    >>> target = copy.deepcopy(online)
    >>> plan = Plan(target, online)
    >>> plan.lerp_(0.005)
    """

    _container_labels: ClassVar = ("the first", "the second")
    _keeps_model: ClassVar = True

    @check_options
    def __init__(
        self,
        avg: Any,
        x: Any,
        *,
        rounding: str = "nearest",
        seed: int = 0,
        frozen: Policy = "average",
        buffers: Policy = "copy",
        policy: Mapping[str, Policy] | None = None,
    ) -> None:
        self._bind(avg, x, Policies.of(frozen, buffers, policy), rounding, seed)

    def _bind(self, avg: Any, x: Any, policy: PolicyOf, rounding: str, seed: int) -> None:
        check_literal(rounding, "rounding", Rounding)
        self._seed, self._calls = check_seed(seed), 0
        self._has_options = isinstance(policy, Policies)
        self.lock = rlock()
        self._steady: dict[str, SteadyRun] = {}
        self.binding = Binding(
            list_iterators(avg),
            list_iterators(x),
            _PairSelection(policy, _MARKS[rounding], self._container_labels),
            labels=("avg ", "x "),
            look=_resharded_leaves,
            keep=self._keeps_model,
        )

    def _run(
        self, operation: str, check: Callable[[], None], x: Any = None, weight: float = 0.0
    ) -> None:
        binding, swaps = self.binding, operation == "swap"
        once = "" if swaps else f"plan.{operation}_(x=...)"
        with self.lock:
            if self.step(operation, x, weight):
                return
            with binding.current(x, write=swaps, once=once) as program:
                check()
                args = LaunchArgs((weight,), self._seed, self._calls)
                program.run(_OPERATIONS[operation], args)
                self._calls += 1
                binding.notify_write(*((0, 1) if swaps else (0,)))
            steady = None
            if not swaps:
                steady = binding.begin_steady(_OPERATIONS[operation], notifies=True)
            if steady is not None:
                with defer_signals():
                    steady.run.set_steps([args], repeat=True)
                self._steady[operation] = steady

    def step(self, operation: str, x: Any, weight: float) -> bool:
        """Run an operation in one native call, if no tensor has moved; return whether it did.

        Call it with :attr:`lock` held.
        """
        steady = self._steady.get(operation)
        if steady is None or not self.binding.accepts(x):
            return False
        if not steady.repeat(weight, self._calls):
            return False
        self._calls += 1
        return True

    @property
    def calls(self) -> int:
        """Operations so far; with stochastic rounding, set it when resuming."""
        return self._calls

    @calls.setter
    def calls(self, calls: int) -> None:
        self._calls = check_seed(calls, "calls")

    def _check_lerp(self) -> None:
        exact, is_random = self.binding.cached("lerp", self._inspect_lerp)
        if exact:
            raise DTypeError(
                "lerp_() has no average of these tensors:\n"
                + format_problems(exact)
                + "\nUse copy_(), or leave them out by policy={'name': 'skip'}."
            )
        if is_random and self.binding.capturing():
            raise StateError(
                "random bits captured in a graph would be the same at every replay: use "
                "fastema.EMA(..., capturable=True), whose steps advance on the GPU"
            )

    def _inspect_lerp(self) -> tuple[list[str], bool]:
        """Return tensors that make an average impossible, and whether rounding is stochastic.

        A user's integers and booleans are copied beside other tensors; alone they are a mistake.
        """
        averaged, copied = (self.binding.pairs_by_tag[tag] for tag in ("averaged", "copied"))
        alone = self._has_options and not averaged and all(one.dst.kind.whole for one in copied)
        exact = [
            f"{pair.name!r} is {pair.dst.dtype}"
            for pair in (copied if alone else averaged)
            if pair.dst.kind.real is None
        ]
        return exact, any(pair.form.endswith("~") for pair in averaged)

    def _check_swap(self) -> None:
        self.binding.cached("swap", self._refuse_unswappable)

    def _refuse_unswappable(self) -> None:
        pairs = self.binding.pairs
        for pair in pairs:
            refuse_unwritable(pair.name, pair.src)
        refuse_overlap([(f"x {pair.name}", pair.src) for pair in pairs])

    def lerp_(self, weight: float, x: Any = None) -> None:
        """Interpolate in place: ``avg += weight * (x - avg)``.

        Computed in float32, or in float64 if either side is float64, and rounded once.

        Parameters
        ----------
        weight : float
            Weight of the new value, ``1 - decay``; any finite number. At 1 the result is ``x``.
        x : optional
            New source from this call on, with the same names and shapes; by default the previous
            one. JAX users pass it at every step: immutable arrays are used only once.

        Raises
        ------
        ArgumentError
            If ``weight`` is not a finite number, or if ``x`` is left out although the previous call
            used its immutable arrays.
        DTypeError
            If all tensors are integers or booleans, or if a float8 tensor is neither copied nor
            skipped.
        LayoutError, BridgeError
            If tensors no longer match; nothing was written.
        StateError
            With ``rounding="stochastic"`` while the stream is captured into a CUDA graph.

        Examples
        --------
        >>> import numpy as np
        >>> avg, x = np.zeros(2), np.ones(2)
        >>> Plan(avg, x).lerp_(0.25)
        >>> avg
        array([0.25, 0.25])
        """
        self._run("lerp", self._check_lerp, x, _checked_weight(weight))

    def check(self, x: Any = None) -> None:
        """Raise the errors that :meth:`lerp_` would raise, without writing anything.

        Parameters
        ----------
        x : optional
            See :meth:`lerp_`.
        """
        with self.lock, self.binding.current(x):
            self._check_lerp()

    @contextmanager
    def swappable(self, x: Any) -> Iterator[Binding]:
        """Yield the binding, locked and checked for a swap with ``x``."""
        with self.lock, self.binding.current(x, write=True):
            self._check_swap()
            yield self.binding

    def swap_(self) -> None:
        """Exchange the contents of ``avg`` and ``x`` in place.

        If the dtypes differ, values are rounded to the dtype of the tensor that receives them.

        Raises
        ------
        LayoutError
            If ``x`` is read-only, expanded or overlaps itself, or if tensors no longer match.
        """
        self._run("swap", self._check_swap)

    def copy_(self, x: Any = None) -> None:
        """Copy ``x`` into ``avg``, rounded to the dtype of ``avg``.

        Parameters
        ----------
        x : optional
            See :meth:`lerp_`.
        """
        self._run("copy", lambda: None, x)


def _checked_weight(weight: Any) -> float:
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise ArgumentError(
            f"weight={weight!r}: expected a finite number, 1 - decay (float(weight) for a tensor)"
        )
    return float(weight)


_recent: Final = {
    operation: RecentRuns(writes_both=operation == "swap") for operation in _OPERATIONS
}


def _run_once(operation: str, dst: Any, src: Any, weight: float = 0.0) -> None:
    """Run an operation on containers without a plan; remember those that are lists of tensors."""
    dst, src = list_iterators(dst), list_iterators(src)
    if _recent[operation].step(dst, src, weight):
        return
    plan = Plan(dst, src)
    arguments = (weight,) if operation == "lerp" else ()
    getattr(plan, f"{operation}_")(*arguments)
    _recent[operation].remember(dst, src, plan.binding, _OPERATIONS[operation])


def lerp_(avg: Any, x: Any, weight: float) -> None:
    """Interpolate once in place: ``avg += weight * (x - avg)``.

    To do so at every step, build a :class:`Plan`, which caches the preparation.

    Parameters
    ----------
    avg, x : array, list, tuple, dict, JAX pytree, module or model
        Containers with the same names or positions and shapes; ``avg`` is written.
    weight : float
        Weight of the new value, ``1 - decay``; any finite number. At 1 the result is ``x``.

    Raises
    ------
    LayoutError, DTypeError, BridgeError, ArgumentError
        See :class:`Plan` and :meth:`Plan.lerp_`; nothing was written.

    Examples
    --------
    >>> import numpy as np
    >>> avg = np.array([1.0, 2.0])
    >>> lerp_(avg, np.array([3.0, 2.0]), 0.5)
    >>> avg
    array([2., 2.])
    """
    _run_once("lerp", avg, x, _checked_weight(weight))


def swap_(a: Any, b: Any) -> None:
    """Exchange the contents of two containers in place; see :meth:`Plan.swap_`.

    Parameters
    ----------
    a, b : array, list, tuple, dict, JAX pytree, module or model
        Containers with the same names or positions and shapes, both writable. Each receives the
        other's contents, rounded to its own dtypes.

    Raises
    ------
    LayoutError, DTypeError, BridgeError
        See :class:`Plan`; nothing was written.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.array([1.0]), np.array([2.0])
    >>> swap_(a, b)
    >>> a, b
    (array([2.]), array([1.]))
    """
    _run_once("swap", a, b)


def copy_(dst: Any, src: Any) -> None:
    """Copy a container's contents into another in place; see :meth:`Plan.copy_`.

    Parameters
    ----------
    dst, src : array, list, tuple, dict, JAX pytree, module or model
        Containers with the same names or positions and shapes. ``dst`` receives the contents of
        ``src``, rounded to its own dtypes.

    Raises
    ------
    LayoutError, DTypeError, BridgeError
        See :class:`Plan`; nothing was written.

    Examples
    --------
    >>> import numpy as np
    >>> dst = np.zeros(2, np.float32)
    >>> copy_(dst, np.array([1.0, 2.0]))
    >>> dst
    array([1., 2.], dtype=float32)
    """
    _run_once("copy", dst, src)


def mean_between(later: Any, n: int, earlier: Any, m: int) -> dict[str, Any]:
    """Return the mean of updates ``m + 1`` to ``n`` from two cumulative means, in float64.

    ``(n * later - m * earlier) / (n - m)`` for means of the first ``n`` and the first ``m`` updates
    of one run: two saved means give the mean of any window between them. The difference of two long
    means loses digits: keep them in float64 (``SWA(..., shadow_dtype="float64")``). The error is
    then about ``2 * n / (n - m)`` units in the last place of a float64.

    Parameters
    ----------
    later, earlier : array, list, tuple, dict, JAX pytree, module or model
        The two means, such as ``swa.shadow`` and clones of its tensors made earlier.
    n, m : int
        Numbers of updates that ``later`` and ``earlier`` average, ``n > m >= 1``.

    Returns
    -------
    dict of str to array
        New arrays by name, in float64 (complex128 for complex weights). Integers and booleans are
        left out.

    Raises
    ------
    ArgumentError
        Unless ``n > m >= 1``.
    LayoutError, DTypeError
        If the two means do not match.

    Examples
    --------
    >>> import numpy as np
    >>> mean_between({"w": np.array([3.0])}, 4, {"w": np.array([2.0])}, 2)  # of updates 3 and 4
    {'w': array([4.])}
    """
    if not (isinstance(n, int) and isinstance(m, int) and n > m >= 1):
        raise ArgumentError(f"n={n!r}, m={m!r}: expected whole numbers with n > m >= 1")
    means = leaves_of(list_iterators(later))
    floats = [leaf for leaf in means.items if leaf.spec.kind.real is not None]
    kinds = [average_of(leaf.spec.kind, parse_dtype("f64")) for leaf in floats]
    memories = allocate(zip((leaf.spec for leaf in floats), kinds, strict=True))
    found = {leaf.name: array for leaf, (array, _) in zip(floats, memories, strict=True)}
    last = {leaf.name: leaf.spec.owner for leaf in floats}
    others = {leaf.name for leaf in means.items} - set(found)
    first = {
        leaf.name: leaf.spec.owner
        for leaf in leaves_of(list_iterators(earlier)).items
        if leaf.name not in others
    }
    difference = Plan(found, first)
    copy_(found, last)
    difference.lerp_(-m / (n - m))
    for leaf in floats:
        if leaf.spec.division is not None:
            found[leaf.name] = leaf.spec.division.tensor(found[leaf.name])
    return found
