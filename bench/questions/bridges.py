"""Measure the cost per leaf of each framework's bridge, and a large JAX tree against optax.

The cost per leaf comes from an update of a thousand small arrays: nearly all of it is spent on
locating them in memory. The tree of 100 million weights is averaged by fastema on the host, and by
``optax.incremental_update`` inside ``jit``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.experimental import io_callback

import fastema
from bench.race.contest import Job, contest
from bench.race.durations import summarize_times
from bench.race.question import Question, Settings
from bench.race.report import Row, Rows
from fastema.cli.clock import interleave

LEAVES, ELEMENTS, DECAY = 1_000, 64, 0.999


def _torch(rng: np.random.Generator) -> Job:
    return fastema.EMA([torch.from_numpy(one) for one in _arrays(rng)], DECAY).update


def _numpy(rng: np.random.Generator) -> Job:
    return fastema.EMA(_arrays(rng), DECAY).update


def _jax(rng: np.random.Generator) -> Job:
    ema = fastema.EMA([jnp.array(one) for one in _arrays(rng)], DECAY)
    # As in training, each update gets new arrays that one computation returned.
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.9, tree))
    trees = [step([jnp.array(one) for one in _arrays(rng)]) for _ in range(2)]

    def update() -> None:
        trees.reverse()
        ema.update(trees[0])

    return update


def _tensorflow(rng: np.random.Generator) -> Job:
    import tensorflow as tf

    return fastema.EMA([tf.Variable(one) for one in _arrays(rng)], DECAY).update


def _arrays(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.normal(size=ELEMENTS).astype(np.float32) for _ in range(LEAVES)]


BRIDGES: dict[str, Callable[[np.random.Generator], Job]] = {
    "torch (exchange API, one compiled loop)": _torch,
    "NumPy (array interface)": _numpy,
    "JAX (buffer pointers, new arrays at each step)": _jax,
    "TensorFlow variables (read by a function, DLPack capsules)": _tensorflow,
}


def leaves(rounds: int) -> Iterator[Row]:
    """Yield the cost per leaf of every installed framework."""
    jobs = {}
    for name, make in BRIDGES.items():
        try:
            jobs[name] = make(np.random.default_rng(0))
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    for job in jobs.values():  # TensorFlow traces in the third call
        for _ in range(4):
            job()
    for name, times in interleave(jobs, rounds, hot=True).items():
        yield Row("A leaf", name, summarize_times(times, "us", LEAVES))


def _tree(rng: np.random.Generator, elements: int, dtype: Any) -> dict[str, Any]:
    """Return a tree of 12 square matrices and 12 vectors, as in a transformer."""
    width = round((elements / 12) ** 0.5)
    shapes = {f"matrix_{i}": (width, width) for i in range(12)}
    shapes |= {f"vector_{i}": (width,) for i in range(12)}
    return {
        name: jnp.array(rng.standard_normal(shape, np.float32), dtype)
        for name, shape in shapes.items()
    }


def _optax(params: Any, average: Any, **options: Any) -> Job:
    step = jax.jit(lambda new, old: optax.incremental_update(new, old, 1 - DECAY), **options)
    held = [jax.tree.map(lambda x: jnp.array(x, average), params)]

    def update() -> None:
        held[0] = jax.block_until_ready(step(params, held[0]))

    return update


def tree(rounds: int, elements: int) -> Iterator[Row]:
    """Race fastema against optax on one large tree, in two mixes of dtypes."""
    for title, weights, average in (
        ("float32", jnp.float32, jnp.float32),
        ("bfloat16, average float32", jnp.bfloat16, jnp.float32),
    ):
        params = _tree(np.random.default_rng(0), elements, weights)
        ema = fastema.EMA(params, DECAY, shadow_dtype=np.dtype(average).name)
        params = jax.tree.map(lambda x: x * 2, params)
        jobs: dict[str, Job] = {
            "fastema.EMA.update(params)": lambda ema=ema, params=params: ema.update(params),
            "optax.incremental_update, jit": _optax(params, average),
            "the same, average donated": _optax(params, average, donate_argnums=1),
        }
        _check(ema, params)
        yield from contest(
            f"JAX tree, {title}",
            jobs,
            rounds=rounds,
            n_elements=sum(leaf.size for leaf in jax.tree.leaves(params)),
            bytes_per_element=np.dtype(weights).itemsize + 2 * np.dtype(average).itemsize,
        )


def time_compiled_step(rounds: int, elements: int) -> list[Row]:
    """Time a compiled step that does almost nothing, with the average outside and inside it."""
    params = _tree(np.random.default_rng(0), elements, jnp.float32)
    ema = fastema.EMA(params, DECAY)
    memory = jax.tree.map(lambda x: np.array(x), params)
    plan = fastema.Plan(memory, params)

    def moved(tree: Any) -> Any:
        return jax.tree.map(lambda x: x * 1.0001, tree)

    def with_callback(tree: Any) -> Any:
        tree = moved(tree)
        io_callback(lambda x: plan.lerp_(1 - DECAY, x), None, tree, ordered=True)
        return tree

    def with_optax(tree: Any, average: Any) -> Any:
        tree = moved(tree)
        return tree, optax.incremental_update(tree, average, 1 - DECAY)

    def job(step: Any, count: int, after: Callable[[Any], object]) -> Job:
        compiled = jax.jit(step, donate_argnums=tuple(range(count)))
        held = [jax.tree.map(jnp.copy, params) for _ in range(count)]

        def run() -> None:
            made = compiled(*held)
            held[:] = made if count > 1 else [made]
            jax.effects_barrier()
            after(jax.block_until_ready(held)[0])

        return run

    jobs = {
        "the step alone": job(moved, 1, lambda tree: None),
        "then fastema.EMA.update(params)": job(moved, 1, ema.update),
        "fastema in the step, by io_callback": job(with_callback, 1, lambda tree: None),
        "optax.incremental_update in the step": job(with_optax, 2, lambda tree: None),
    }
    title = "A step of JAX that multiplies the weights by a number"
    return contest(title, jobs, rounds=rounds, n_elements=elements)


def _check(ema: Any, params: Any) -> None:
    """Assert that an update agrees with the formula."""
    before = {name: np.asarray(leaf, np.float64) for name, leaf in ema.shadow.items()}
    ema.update(params)
    for name, old in before.items():
        new = np.asarray(params[name], np.float64)
        expected = old + (1 - DECAY) * (new - old)
        error = np.abs(np.asarray(ema.shadow[name], np.float64) - expected).max()
        assert error < 1e-6 * np.abs(expected).max(), (name, error)


def rows(settings: Settings) -> Rows:
    """Yield the rows of leaves, the tree, and a compiled step."""
    quick = settings.quick
    yield from leaves(20 if quick else 200)
    yield from tree(*((5, 2_000_000) if quick else (25, 100_000_000)))
    yield from time_compiled_step(*((5, 2_000_000) if quick else (25, 10_000_000)))


METHOD = f"""\
A leaf: an update of {LEAVES:,} arrays of {ELEMENTS} float32, medians of interleaved rounds, divided
by the number of arrays; what the kernel does is included. The tree: 24 arrays; *limit* moves the
same bytes by the better of two plain memory kernels in the same run. The compiled step multiplies
weights by a number and donates them: what an average costs outside of it, after waiting for it, and
inside."""

PACKAGES = ("numpy", "numba", "torch", "jax", "jaxlib", "optax", "tensorflow-cpu", "tensorflow")

QUESTION = Question("What the bridges cost", METHOD, rows, packages=PACKAGES)
