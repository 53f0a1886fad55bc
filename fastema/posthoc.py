"""Choose an average's length after training, from snapshots of power-function averages.

Save snapshots of two power-function averages during a run. Afterwards, averages of other lengths
can be synthesized at any step of the run, so no length has to be chosen in advance.

>>> import tempfile, numpy as np, fastema
>>> weights = {"w": np.zeros(3)}
>>> ema = fastema.PowerEMA(weights, sigma_rels=(0.05, 0.10))
>>> with tempfile.TemporaryDirectory() as folder:
...     for step in range(100):
...         weights["w"] += 1
...         ema.update()
...         if step % 10 == 9:
...             paths = save_snapshot(ema, folder)
...     found = synthesize(folder, sigma_rel=0.15)
>>> [round(float(value), 1) for value in found.tensors["w"]], round(found.error, 2)
([82.5, 82.5, 82.5], 0.02)

T. Karras et al., Analyzing and improving the training dynamics of diffusion models, 2023, section
3.2, https://arxiv.org/abs/2312.02696
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from fastema.average.average import Average, check_average
from fastema.average.options import dtype_of
from fastema.average.state import select_average, split_state
from fastema.binding.swap import SPLIT
from fastema.bridges.memory import Memory, allocate
from fastema.bridges.registry import bridge_of, describe
from fastema.checkpoint.files import File, read, wrap_write_errors, write
from fastema.checkpoint.sums import weighted_sum
from fastema.engine.program import Program
from fastema.errors import ArgumentError, CheckpointError, StateError, format_problems
from fastema.layout.dtypes import DType, average_of, parse_dtype
from fastema.layout.flat import row_major
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec
from fastema.plan import Plan
from fastema.rules.checks import MAX_STEPS, validate_int
from fastema.rules.posthoc import ExponentialProfile, PowerProfile, Profile, solve
from fastema.rules.power import Power, gamma_of, sigma_rel_of, validate_gamma

__all__ = ["Snapshot", "Synthesized", "find_snapshots", "save_snapshot", "synthesize"]

_KIND: Final = "fastema power snapshot"

_NOISE: Final = {"f64": 1e-4, "f32": 1e-4, "f16": 1e-2, "bf16": 1e-2}
"""Dtype to the noise level in the fit: it keeps coefficients small, since they amplify rounding."""

_POOR: Final = 0.05
"""Relative error of a profile above which to warn."""


class Snapshot(NamedTuple):
    """A file with one power-function average at one step of a run."""

    path: Path
    step: int
    start: int  # step after which averaging began
    every: int  # steps from one update to the next
    gamma: float  # exponent of the power-function profile

    @property
    def profile(self) -> PowerProfile:
        """The weights of the steps since the start in the average."""
        return PowerProfile(self.step - self.start, self.gamma)


class Synthesized(NamedTuple):
    """An average synthesized from snapshots."""

    tensors: dict[str, Any]  # NumPy arrays by name
    error: float  # relative L2 distance of the profile from the target profile
    coefficients: dict[Path, float]  # snapshot to its coefficient; they sum to 1
    step: int  # training step of the average

    def __repr__(self) -> str:
        size = sum(array.size for array in self.tensors.values())
        return (
            f"Synthesized({size:,} elements in {len(self.tensors)} tensors, step {self.step:,}, "
            f"of {len(self.coefficients)} snapshots, error {self.error:.2g})"
        )


# -- snapshots ------------------------------------------------------------------------------------


def save_snapshot(
    average: Average, folder: str | os.PathLike[str], *, dtype: Any = None
) -> list[Path]:
    """Write each power-function average to a safetensors file of its own; return the paths.

    Each file uses the names of the weights, so it is also a checkpoint that can be loaded directly.

    Parameters
    ----------
    average : PowerEMA, or another average with power-function rules
        The average or averages to save.
    folder : path
        The folder to write to; created if it does not exist. File names contain the step and
        sigma_rel (or gamma, if sigma_rel has too many digits). A file of the same name is replaced
        atomically.
    dtype : dtype or str, optional
        Dtype of the averaged tensors in the file; by default that of the average. ``"float16"`` and
        ``"bfloat16"`` halve the size of a float32 snapshot.

    Raises
    ------
    ArgumentError
        If there is no power-function average.
    StateError
        Before the first update.
    CheckpointError
        If the format cannot store the name or dtype of a tensor.
    StorageError
        If a file or the folder cannot be written.

    Notes
    -----
    All files belong to the same update: updates on other threads wait until they are written.
    """
    check_average(average, "save_snapshot()")
    rules = average.schedule.rules
    chosen = [i for i, rule in enumerate(rules) if isinstance(rule, Power)]
    if not chosen:
        raise ArgumentError(
            "no power-function average to save: build it with fastema.PowerEMA, or with rules of "
            "fastema.rules.power"
        )
    wanted = dtype_of(dtype)
    with average.lock:
        return _save(average, chosen, Path(folder), wanted)


def _save(average: Average, chosen: list[int], folder: Path, wanted: DType | None) -> list[Path]:
    schedule = average.schedule
    start, every = schedule.start_after, schedule.update_every
    step = start + (average.num_updates - start) // every * every
    if step <= start:
        raise StateError("nothing is averaged yet: save a snapshot after the first update")
    with wrap_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _, parts = split_state(average.state_dict(copy=False))
    averaged = average.averaged_names
    paths = []
    for index in chosen:
        rule = schedule.rules[index]
        assert isinstance(rule, Power)
        residual = parts.get("residual", {}).get(index, {})
        shadow = select_average(parts["shadow"], index)
        tensors = _tensors_to_write(shadow, residual, averaged, wanted)
        path = folder / f"step{step:09d}-{_width(rule.gamma)}.safetensors"
        write(
            path,
            {name: spec for name, (_, spec) in tensors.items()},
            kind=_KIND,
            step=str(step),
            start=str(start),
            every=str(every),
            gamma=repr(rule.gamma),
            copied=json.dumps(sorted(set(tensors) - averaged)),
        )
        paths.append(path)
    return paths


def _width(gamma: float) -> str:
    """Return the part of a file name for a width, unique for every gamma."""
    width, widest = sigma_rel_of(gamma), sigma_rel_of(0.0)
    for digits in range(3, 9):
        text = f"{width:.{digits}f}"
        if 0.0 < float(text) <= widest and gamma_of(float(text)) == gamma:
            return text
    return f"gamma{gamma!r}"


def _on_the_host(array: Any) -> Memory:
    there = bridge_of(array).transfer(array, "cpu")
    return there, describe(there)


def _tensors_to_write(
    arrays: Mapping[str, Any],
    residual: Mapping[str, Any],
    averaged: Container[str],
    wanted: DType | None,
) -> dict[str, Memory]:
    """Return row-major CPU tensors in the wanted dtype, without a copy where nothing changes."""
    found = {name: _on_the_host(array) for name, array in arrays.items()}
    others: list[tuple[Pair, DType]] = []
    for name, (_, spec) in found.items():
        half = _on_the_host(residual[name])[1] if name in residual else None
        kind = average_of(spec.kind, wanted) if name in averaged else spec.kind
        if half is not None and wanted is None:
            kind = parse_dtype("f32")
        row = replace(spec, strides=row_major(spec.shape))
        if half is not None or kind != spec.kind or row != spec:
            others.append((Pair(name, spec, row, SPLIT if half else "", half), kind))
    memories = allocate([(pair.src, kind) for pair, kind in others])
    pairs = []
    for (pair, _), memory in zip(others, memories, strict=True):
        found[pair.name] = memory
        pairs.append(pair._replace(src=memory[1]))
    Program({"all": pairs}).run({"all": "cast_back"})
    return found


def find_snapshots(folder: str | os.PathLike[str]) -> list[Snapshot]:
    """Return the snapshots in a folder, sorted by file name.

    Raise a CheckpointError if there are none, or if a safetensors file is not a snapshot.
    """
    files = sorted(path for path in Path(folder).glob("*.safetensors") if path.is_file())
    if not files:
        raise CheckpointError(
            f"no snapshots in {folder}; fastema.posthoc.save_snapshot writes them"
        )
    return [_parse_snapshot(read(path)) for path in files]


def _parse_snapshot(file: File) -> Snapshot:
    values = file.metadata
    try:
        if values["kind"] != _KIND:
            raise ValueError(values["kind"])
        step, start, every = (int(values[name]) for name in ("step", "start", "every"))
        if not 0 <= start < step <= MAX_STEPS or not 1 <= every <= MAX_STEPS:
            raise ValueError(f"step {step}, start {start}, every {every}")
        gamma = validate_gamma(float(values["gamma"]))
        copied = json.loads(values["copied"])
        if not isinstance(copied, list) or not all(isinstance(name, str) for name in copied):
            raise ValueError(f"copied {values['copied'][:100]!r}")
        for name in _averaged_names(file):
            if file.tensors[name].kind.real is None:
                raise ValueError(f"{name!r} has dtype {file.tensors[name].kind.code}")
        return Snapshot(file.path, step, start, every, gamma)
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.path} is not a snapshot of a power-function average ({error})"
        ) from None


# -- synthesis ------------------------------------------------------------------------------------


def synthesize(
    snapshots: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    sigma_rel: float | None = None,
    half_life: float | None = None,
    step: int | None = None,
    dtype: Any = None,
    into: Any = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Synthesized:
    """Synthesize an average that was not tracked during training, from snapshots.

    The average is ``sum of coefficient * snapshot``. The coefficients sum to 1 and are fitted in
    float64 by least squares, so that the weighted sum of the snapshots' profiles is closest to the
    target profile. The tensors are summed in float64 while they are read, a few MB at a time for
    any model size.

    Parameters
    ----------
    snapshots : path, or iterable of paths
        A folder of snapshots, or files of :func:`save_snapshot`.
    sigma_rel : float, optional
        Relative width of a power-function average, in (0, 0.288]. Give either this or
        ``half_life``.
    half_life : float, optional
        Half-life in steps of an exponential average (without the weight of the initial weights).
    step : int, optional
        Training step of the average; by default that of the latest snapshot. Best choose the step
        of a snapshot: later snapshots are not used, and steps after the last earlier snapshot are
        missing. Between two updates, the average is that of the earlier update.
    dtype : dtype or str, optional
        Dtype of the averaged tensors in the result. By default float64 for float64 snapshots and
        float32 for others.
    into : module, list, tuple or dict, optional
        Weights to overwrite with the average, rounded to their dtypes.
    out : path, optional
        A safetensors file to write the average to.
    progress : bool
        Show a progress bar (needs rich). Default False.

    Returns
    -------
    Synthesized
        The average, its coefficients and its ``error``. If the error is above 0.05, warn and
        suggest which snapshots would do better.

    Raises
    ------
    ArgumentError
        If not exactly one width is given, or all snapshots are later than ``step``.
    CheckpointError
        If the snapshots do not belong to one run, or one is damaged.
    OSError
        If a file cannot be read. A StorageError if ``out`` cannot be written.
    """
    found = _load_snapshots(snapshots)
    start, every = found[0].start, found[0].every
    last = found[-1].step if step is None else validate_int(step, "step", 0)
    if last < found[0].step:
        raise ArgumentError(f"step={last}: the first snapshot is of step {found[0].step}")
    last = start + (last - start) // every * every  # the average is constant between updates
    target = _target_profile(sigma_rel, half_life, last - start)
    latest = read(found[-1].path)
    kinds = {str(latest.tensors[name].kind.real) for name in _averaged_names(latest)}
    noise = max((_NOISE[kind] for kind in kinds), default=0.0)
    solution = solve([one.profile for one in found], target, noise=noise)
    used = [
        (one, c)
        for one, c in zip(found, solution.coefficients, strict=True)
        if c != 0 and one.step <= last
    ]
    files = [read(one.path) for one, _ in used]
    result = _memory(files, dtype_of(dtype))
    if solution.error > _POOR:
        warnings.warn(_advice(found, last, solution.error), stacklevel=2)
    averaged = _averaged_names(files[-1])
    nbytes = sum(file.tensors[name].nbytes for file in files for name in averaged)
    with _with_progress(progress, nbytes) as advance:
        weighted_sum(files, [c for _, c in used], result, averaged, advance)
    tensors = {name: array for name, (array, _) in result.items()}
    if out is not None:
        write(out, {name: spec for name, (_, spec) in result.items()}, step=str(last))
    if into is not None:
        Plan(into, tensors).copy_()
    return Synthesized(tensors, solution.error, {one.path: c for one, c in used}, last)


def _advice(found: Sequence[Snapshot], last: int, error: float) -> str:
    """Return a warning that suggests other snapshots or steps for a better fit."""
    text = f"the profile of the synthesized average is off by {error:.2g} (more than {_POOR}): "
    newest = max(one.step for one in found if one.step <= last)
    if newest < last:
        others = [str(newest)]
        others += [f"{one.step} (the next one)" for one in found if one.step > last][:1]
        return text + (
            f"no snapshot contains the weights of steps {newest + 1} to {last}; choose step="
            f"{' or '.join(others)}, or save a snapshot at step {last} in the next run"
        )
    widths = ", ".join(sorted({f"{one.profile.sigma_rel:.3g}" for one in found}))
    return text + (
        f"snapshots at more steps before {last}, or of averages nearer to the wanted width "
        f"(these have sigma_rel {widths}), would be more accurate"
    )


def _load_snapshots(snapshots: Any) -> list[Snapshot]:
    if isinstance(snapshots, str | os.PathLike):
        path = Path(snapshots)
        found = find_snapshots(path) if path.is_dir() else [_parse_snapshot(read(path))]
    else:
        found = [_parse_snapshot(read(path)) for path in snapshots]
    if not found:
        raise ArgumentError("snapshots: no files were given")
    if len({(one.start, one.every) for one in found}) > 1:
        raise CheckpointError(
            "the snapshots come from runs with different start_after or update_every"
        )
    return sorted(found, key=lambda one: (one.step, one.gamma))


def _target_profile(sigma_rel: float | None, half_life: float | None, steps: int) -> Profile:
    if sigma_rel is not None and half_life is None:
        return PowerProfile(steps, gamma_of(sigma_rel))
    if half_life is not None and sigma_rel is None:
        return ExponentialProfile(steps, half_life)
    raise ArgumentError(f"sigma_rel={sigma_rel!r}, half_life={half_life!r}: give one of the two")


def _memory(files: Sequence[File], wanted: DType | None) -> dict[str, Memory]:
    """Allocate NumPy memory for the result; raise a CheckpointError if tensors differ."""
    newest = files[-1]
    problems = []
    for file in files:
        for name in {*newest.tensors, *file.tensors}:
            ours, theirs = newest.tensors.get(name), file.tensors.get(name)
            if ours is None or theirs is None or ours[:2] != theirs[:2]:
                problems.append(f"{name!r} in {file.path.name} and {newest.path.name}")
    if problems:
        raise CheckpointError("the snapshots hold different tensors:\n" + format_problems(problems))
    averaged, owner = _averaged_names(newest), np.empty(0)
    likes = []
    for name, (kind, shape, _) in newest.tensors.items():
        like = TensorSpec(0, shape, row_major(shape), kind.code, "cpu", owner=owner)
        if name in averaged:
            kind = average_of(kind, wanted or (kind if kind.real == "f64" else parse_dtype("f32")))
        likes.append((like, kind))
    return dict(zip(newest.tensors, allocate(likes), strict=True))


def _averaged_names(file: File) -> set[str]:
    return set(file.tensors).difference(json.loads(file.metadata["copied"]))


@contextmanager
def _with_progress(progress: bool, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar by a number of bytes, or does nothing."""
    if not progress:
        yield lambda n: None
        return
    try:
        from rich import progress as bars
    except ImportError:
        raise ArgumentError("progress=True needs rich: pip install rich") from None
    with bars.Progress(*bars.Progress.get_default_columns(), bars.DownloadColumn()) as bar:
        task = bar.add_task("synthesizing", total=nbytes)
        yield lambda n: bar.advance(task, n)
