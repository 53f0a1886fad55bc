"""``optax.incremental_update``, ``periodic_update`` and ``ema`` for trees in host memory.

Notes
-----
Where it differs:

- Theirs: rounds ``step_size * new`` to bfloat16 for a float32 average; here: rounds only the
  result.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray
from optax import EmaState

from fastema.bridges.jax import is_traced
from fastema.errors import ArgumentError
from fastema.layout.dtypes import NAMES, parse_dtype
from fastema.layout.flat import aligned_empty
from fastema.plan import Plan

__all__ = ["EmaState", "ema", "incremental_update", "periodic_update"]


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_traced(*trees: Any) -> bool:
    """Return whether a function is being traced, or one of the trees holds tracers."""
    leaves = jax.tree.leaves(trees)
    return is_traced() or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _on_host(leaf: Any) -> bool:
    """Return whether a leaf is a NumPy array, or a JAX array on one CPU device."""
    if type(leaf) is np.ndarray:  # subclasses have rules of their own, such as masks
        return bool(leaf.dtype.isnative)
    if not isinstance(leaf, jax.Array) or leaf.is_deleted():
        return False
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


_promoted: Final[dict[tuple[Any, ...], np.dtype[Any] | None]] = {}
"""Dtypes of Optax's results, or None if it raises, cached by everything they depend on."""


def _optax_dtype(new: Any, old: Any, step_size: Any) -> np.dtype[Any] | None:
    """Return the dtype of Optax's result, computed for empty arrays; None if Optax raises."""
    sides = [(isinstance(one, np.ndarray), one.dtype) for one in (new, old)]
    weight = type(step_size), getattr(step_size, "dtype", None), _is_weak(step_size)
    key = *sides, *weight, bool(jax.config.jax_enable_x64)
    if key not in _promoted:
        empty: list[Any] = [(np if numpy else jnp).zeros(0, dtype) for numpy, dtype in sides]
        try:
            found: Any = optax.incremental_update(*empty, step_size)
            _promoted[key] = np.dtype(found.dtype)
        except TypeError:
            _promoted[key] = None
    return _promoted[key]


def _is_weak(value: Any) -> bool:
    """Return whether a value adopts the dtype of other operands, as Python's numbers do."""
    return bool(getattr(value, "weak_type", False))


def _result_dtype(new: Any, old: Any, step_size: Any) -> np.dtype[Any] | None:
    """Return the dtype of the average of two leaves; None if Optax has to compute it."""
    if not (_on_host(new) and _on_host(old) and new.shape == old.shape and old.size):
        return None
    if _is_weak(new) or _is_weak(old):
        return None
    found = _optax_dtype(new, old, step_size)
    if found is None or len(_devices(new, old, step_size)) > 1:
        return None
    codes = [NAMES.get(one.name) for one in (found, new.dtype, old.dtype)]
    kinds = [parse_dtype(code) for code in codes if code is not None and parse_dtype(code).real]
    is_ours = len(kinds) == 3 and len({one.parts for one in kinds}) == 1
    return found if is_ours else None


def _devices(*arrays: Any) -> set[Any]:
    """Return the devices that arrays are committed to; Optax raises for more than one."""
    found = [one for one in arrays if isinstance(one, jax.Array) and one.committed]
    return {device for one in found for device in one.devices()}


def _copy_array(array: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    memory = aligned_empty(array.shape, dtype)
    np.copyto(memory, np.asarray(array), casting="same_kind")
    return memory


def _to_jax(memory: NDArray[Any], *like: Any) -> Any:
    """Turn memory that nothing else references into a JAX array on the device of ``like``."""
    arrays = [one for one in like if isinstance(one, jax.Array)]
    chosen = next((one for one in arrays if one.committed), arrays[0] if arrays else None)
    (device,) = (None,) if chosen is None else chosen.devices()
    default = jax.config.jax_default_device or jax.devices()[0]
    return jax.device_put(memory, None if device == default else device)


def _lerp(
    new: Any, old: Any, weight: Any, step: int | None, kept: np.dtype[Any] | None = None
) -> Any:
    """Return ``old + weight * (new - old)`` as a new tree; host leaves take one kernel call.

    ``old=None`` means zero for all leaves. If ``kept`` is given, real leaves are rounded from the
    float32 of the computation to this dtype, not to the one that Optax returns.
    """
    others, treedef = jax.tree.flatten(new, is_leaf=_is_none)
    leaves = others if old is None else treedef.flatten_up_to(old)
    pairs = {str(place): pair for place, pair in enumerate(zip(others, leaves, strict=True))}
    averages: dict[str, NDArray[Any]] = {}
    for place, (x, avg) in pairs.items():
        dtype = _result_dtype(x, avg, weight)
        if dtype is None:
            continue
        if kept is not None and parse_dtype(NAMES[dtype.name]).parts == 1:
            dtype = kept
        averages[place] = (
            _copy_array(avg, dtype) if old is not None else aligned_empty(x.shape, dtype)
        )
        if old is None:
            averages[place].fill(0)
    if averages:
        xs = {place: pairs[place][0] for place in averages}
        plan = Plan(averages, xs, rounding="nearest" if step is None else "stochastic")
        plan.calls = step or 0
        plan.lerp_(float(weight))
    made = []
    for place, (x, avg) in pairs.items():
        memory = averages.get(place)
        if memory is None:
            made.append(optax.incremental_update(x, 0.0 if old is None else avg, weight))
        elif not any(isinstance(one, jax.Array) for one in (x, avg, weight)):
            made.append(memory if memory.ndim else memory[()])
        else:
            made.append(_to_jax(memory, avg, x, weight))
    return treedef.unflatten(made)


def incremental_update(
    new_tensors: Any, old_tensors: Any, step_size: Any, *, step: int | None = None
) -> Any:
    """Return ``step_size * new + (1 - step_size) * old`` of two trees, as a new tree.

    Leaves of the result are JAX arrays, or NumPy arrays if both inputs are, with the dtype that
    Optax returns.

    Parameters
    ----------
    new_tensors, old_tensors : pytree of JAX or NumPy arrays
        Trees of the same structure, which are not changed. None stands for a leaf to leave out.
    step_size : float or scalar array
        Weight of the *new* values, ``1 - decay``.
    step : int, optional
        Number of the update. If given, averages in float16 and bfloat16 are rounded at random, with
        bits that are a function of ``step``, the leaf's place in the tree and the element. By
        default they are rounded to nearest, as in Optax, and stop moving at a small ``step_size``.

    Raises
    ------
    ArgumentError
        If ``step_size`` is not finite, or ``step`` is given where Optax's function is called.

    Notes
    -----
    One call of a compiled kernel computes in float32 and rounds once; Optax (0.2.8) makes two
    temporaries and three passes per leaf. Optax's own function is called within ``jax.jit``, where
    XLA fuses it into one pass; with an array of step sizes; and for leaves on an accelerator, of
    integers, of subclasses of NumPy's arrays, or that are broadcast. To keep one average in place
    over a run, use :class:`fastema.EMA`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> old, new = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    >>> incremental_update(new, old, 0.25)["w"].tolist()
    [0.25, 0.25]
    """
    if not _is_traced(new_tensors, old_tensors, step_size) and np.ndim(step_size) == 0:
        return _lerp(new_tensors, old_tensors, step_size, step)
    if step is not None:
        raise ArgumentError(
            f"step={step!r}: not supported within a traced function or with an array of step "
            "sizes, where Optax rounds to nearest"
        )
    return optax.incremental_update(new_tensors, old_tensors, step_size)


def periodic_update(new_tensors: Any, old_tensors: Any, steps: Any, update_period: Any) -> Any:
    """Return the new tree if ``steps`` is a multiple of ``update_period``, otherwise the old one.

    JAX arrays are not copied; NumPy arrays are copied to JAX arrays. Within ``jax.jit``, and for
    floating-point steps, Optax's own function (0.2.8) is called. A period below 1 raises an
    ArgumentError; trees that differ in more than their values raise a TypeError.

    >>> import jax.numpy as jnp
    >>> old, new = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    >>> [periodic_update(new, old, step, 2)["w"][0].item() for step in (1, 2)]
    [0.0, 1.0]
    """
    trees = new_tensors, old_tensors
    is_theirs = (
        _is_traced(*trees, steps, update_period)
        or not (_is_whole(steps) and _is_whole(update_period))
        or _signature_of(new_tensors) != _signature_of(old_tensors)
    )
    if is_theirs:
        return optax.periodic_update(*trees, steps, update_period)
    if int(update_period) < 1:
        raise ArgumentError(f"update_period={update_period!r}: expected at least 1")
    chosen = old_tensors if int(steps) % int(update_period) else new_tensors
    return jax.tree.map(_as_jax, chosen)


def _is_whole(number: Any) -> bool:
    """Return whether a number is an integer or a scalar array of integers."""
    return np.ndim(number) == 0 and jnp.issubdtype(jnp.result_type(number), jnp.integer)


def _signature_of(tree: Any) -> Any:
    """Return a tree's structure, shapes and dtypes, which two trees must share."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _as_jax(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    return _to_jax(_copy_array(array, jnp.result_type(leaf)))


def ema(
    decay: Any, debias: bool = True, accumulator_dtype: Any | None = None
) -> optax.GradientTransformation:
    """Return a gradient transformation that keeps a moving average of updates.

    ``ema = decay * ema + (1 - decay) * update``, starting from zero. The transformed update at the
    n-th step is ``ema / (1 - decay ** n)`` with ``debias``, and ``ema`` itself without. The state
    is Optax's own :class:`EmaState`, with ``count`` and ``ema``.

    Parameters
    ----------
    decay : float or scalar array
        Weight of the old average.
    debias : bool
        Divide by the total weight of the updates in the average (default).
    accumulator_dtype : dtype, optional
        Dtype of the average in the state. Default: that of the parameters.

    Notes
    -----
    Outside of ``jax.jit``, for leaves in host memory, one kernel call averages and another one
    divides; 16-bit averages are rounded at random, with bits that are a function of ``count``, the
    leaf's place in the tree and the element. Within ``jax.jit``, Optax's own (0.2.8) is called.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> transform = ema(0.9)
    >>> state = transform.init({"w": jnp.zeros(2)})
    >>> updates, state = transform.update({"w": jnp.ones(2)}, state)
    >>> updates["w"].tolist(), int(state.count)
    ([1.0, 1.0], 1)
    """
    theirs = optax.ema(decay, debias, accumulator_dtype)
    if not isinstance(decay, Real):
        return theirs
    kept = None if accumulator_dtype is None else jax.dtypes.canonicalize_dtype(accumulator_dtype)
    is_narrow = kept in (jnp.bfloat16, jnp.float16)
    old_weight = float(decay)

    def update(updates: Any, state: EmaState, params: Any = None) -> tuple[Any, EmaState]:
        if _is_traced(updates, state):
            found: tuple[Any, EmaState] = theirs.update(updates, state, params)
            return found
        count = optax.safe_increment(state.count)
        steps = int(count)
        weight = 1.0 - old_weight
        average = _lerp(updates, state.ema, weight, steps)
        share = 1.0 - old_weight**steps
        shown = _lerp(average, None, 1.0 / share, None) if debias and share else average
        if is_narrow and any(jnp.result_type(leaf) != kept for leaf in jax.tree.leaves(average)):
            # Average again from the same numbers, to round only once, at random.
            average = _lerp(updates, state.ema, weight, steps, kept)
        return shown, EmaState(count, optax.tree.cast(average, kept))

    return optax.GradientTransformation(theirs.init, update)
