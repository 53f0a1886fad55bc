"""Average finished checkpoints, streaming the result to disk while they are read."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fastema.checkpoint.files import Read, StoredTensor, atomic_write_path, pieces_of
from fastema.checkpoint.folder import (
    Write,
    check_vacant,
    create,
    files_of,
    new_folder,
    writing,
)
from fastema.checkpoint.source import PROVENANCE, Checkpoint
from fastema.checkpoint.stored import TRAINING_FILE, open_weights
from fastema.checkpoint.sums import weighted_sums
from fastema.checkpoint.weights import swa
from fastema.errors import ArgumentError, CheckpointError, format_problems

__all__ = [
    "Merge",
    "average",
    "check",
    "copy",
    "merge",
    "prepare",
    "refuse_source",
    "warn_of",
]

_Path = str | os.PathLike[str]


@dataclass
class Merge:
    """Checkpoints to average, whose tensors match, and how to treat each tensor.

    Attributes
    ----------
    checkpoints : list of Checkpoint
        Oldest first; the last is the newest.
    averaged : set of str
        Names of floating-point tensors, which are averaged.
    equal : set of str
        Names of tensors that must be equal in all checkpoints and are copied.
    newest : set of str
        Names of integer tensors with one element, which are copied from the newest checkpoint.
    notes : list of str
        Remarks about the result for the user.
    """

    checkpoints: list[Checkpoint]
    averaged: set[str] = field(default_factory=set)
    equal: set[str] = field(default_factory=set)
    newest: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    @property
    def last(self) -> Checkpoint:
        """The newest checkpoint, whose dtypes and file layout the result has."""
        return self.checkpoints[-1]

    @property
    def nbytes(self) -> int:
        """The number of bytes to read."""
        names = self.averaged | self.equal
        every = sum(one.tensors[name].nbytes for one in self.checkpoints for name in names)
        return every + sum(self.last.tensors[name].nbytes for name in self.newest)

    def writes_folder(self, out: Path) -> bool:
        """Return whether the result is a folder: ``out`` does not end in .safetensors then."""
        several = self.last.path.is_dir() or len(self.last.layout) > 1
        return several and out.suffix != ".safetensors"


def average(
    paths: Sequence[_Path],
    weights: Sequence[float] | None,
    out: _Path,
    *,
    key: str | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Path:
    """Average finished checkpoints: ``out = sum of weight * checkpoint``.

    The sum is computed piece by piece in float64 and rounded once. Memory stays below 256 MB for
    any number and size of checkpoints.

    Parameters
    ----------
    paths : sequence of paths
        Checkpoints in any layout that :func:`open_checkpoint` reads, oldest first. For a state of
        fastema's own, its average is read, under the model's names.
    weights : sequence of float or None
        One finite weight per checkpoint, of any sign. None for equal weights.
    out : path
        A file whose name ends in ``.safetensors``; or a new folder, if the newest checkpoint is a
        folder or several files: it gets their layout, and copies of config and tokenizer files. The
        result has the names and dtypes of the newest checkpoint.
    key : str, optional
        Dotted key of the weights in each checkpoint; see :func:`open_checkpoint`.
    advance : function
        Called from several threads with the number of bytes just read. Does nothing by default.

    Returns
    -------
    Path
        ``out``, complete and synchronized to the disk. Nothing is left there after a failure.

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be read; if names or shapes differ; if the values of a tensor that
        cannot be averaged differ, such as integers or scaled numbers; if ``out`` is one of the
        checkpoints or a folder that is not empty.
    ArgumentError
        If there are no checkpoints, not one weight per checkpoint, or a weight is not finite.
    StorageError
        If ``out`` cannot be written.

    Warns
    -----
    UserWarning
        If a weight is negative, or they do not sum to 1. If weights are quantized: packed numbers
        are copied, not averaged.

    Examples
    --------
    >>> import tempfile, pathlib, torch
    >>> from safetensors.torch import load_file, save_file
    >>> from fastema.checkpoint import average
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step, value in ((100, 1.0), (200, 4.0)):
    ...     save_file({"w": torch.full((2,), value)}, folder / f"step-{step}.safetensors")
    >>> paths = sorted(folder.iterdir())
    >>> load_file(average(paths, None, folder / "mean.safetensors"))["w"]
    tensor([2.5000, 2.5000])
    """
    made = prepare([open_weights(path, key) for path in paths])
    weights = swa(len(paths)) if weights is None else weights
    check(made, {Path(out): weights})
    warn_of(weights)
    packed = describe_packed(made)
    if packed:
        warnings.warn(packed, stacklevel=2)
    merge(made, {Path(out): weights}, advance)
    return Path(out)


def prepare(checkpoints: Sequence[Checkpoint]) -> Merge:
    """Check that names, shapes and dtypes of checkpoints match, without reading the tensors."""
    if not checkpoints:
        raise ArgumentError("there are no checkpoints to average")
    made = Merge(list(checkpoints))
    _refuse_differences(made)
    for name, tensor in made.last.tensors.items():
        kinds = [one.tensors[name].kind for one in checkpoints]
        if all(kind.real is not None for kind in kinds):
            if len({kind.parts for kind in kinds}) > 1:
                raise CheckpointError(f"{name!r} is complex in only some of the checkpoints")
            made.averaged.add(name)
        elif tensor.kind.whole and tensor.size == 1:
            made.newest.add(name)
        else:
            made.equal.add(name)
    _note(made)
    return made


def _refuse_differences(made: Merge) -> None:
    last, problems = made.last, []
    for one in made.checkpoints[:-1]:
        for name in {**last.tensors, **one.tensors}:
            ours, theirs = last.tensors.get(name), one.tensors.get(name)
            if ours is None or theirs is None:
                there, gone = (one, last) if ours is None else (last, one)
                problems.append(f"{name!r} is in {there.path.name}, not in {gone.path.name}")
            elif ours.shape != theirs.shape:
                shapes = f"{list(theirs.shape)} in {one.path.name}, {list(ours.shape)}"
                problems.append(f"{name!r} is {shapes} in {last.path.name}")
            elif ours.kind != theirs.kind and None in (ours.kind.real, theirs.kind.real):
                codes = f"{theirs.kind.code} in {one.path.name}, {ours.kind.code}"
                problems.append(f"{name!r} is {codes} in {last.path.name}")
        if one.tied != last.tied and {one.format, last.format} <= {"torch", "sharded torch"}:
            problems.append(f"other names are tied in {one.path.name} than in {last.path.name}")
    if problems:
        raise CheckpointError("the checkpoints do not match:\n" + format_problems(problems))


def describe_packed(made: Merge) -> str:
    """Return a remark about quantized weights, which are left out of the average; "" if none."""
    packed = [
        name
        for name in sorted(made.equal)
        if (tensor := made.last.tensors[name]).size > 1
        and tensor.kind.code != "bool"
        and (tensor.kind.itemsize == 1 or name.endswith(_PACKED))
    ]
    if not packed:
        return ""
    codes = ", ".join(sorted({made.last.tensors[name].kind.code for name in packed}))
    return (
        f"quantized or packed weights are copied, not averaged: {len(packed)} ({codes}), such as "
        f"{packed[0]!r}; they must be equal in all checkpoints"
    )


_PACKED: Final = ("qweight", "qzeros", "weight_packed")
"""Endings of the names of weights that are packed into wider integers."""


def _note(made: Merge) -> None:
    names = made.averaged
    packed = describe_packed(made)
    if packed:
        made.notes.append(packed)
    if any(name.endswith(("running_mean", "running_var")) for name in names):
        made.notes.append(
            "batch-norm statistics are averaged like weights; recompute them with "
            "fastema.torch.update_bn if you have the data"
        )
    if any("lora_A" in name for name in names) and any("lora_B" in name for name in names):
        made.notes.append(
            "LoRA factors are averaged separately: mean(A) mean(B) is not mean(A B); merge the "
            "adapters into the weights first if that matters"
        )
    averages = [one for one in made.checkpoints if (one.path / TRAINING_FILE).is_file()]
    if averages:
        made.notes.append(
            f"the model of {averages[0].path.name} is an average itself; its training weights are "
            f"in {TRAINING_FILE} beside it"
        )
    if made.last.tied:
        made.notes.append(
            f"{len(made.last.tied)} tied names are written once; the metadata lists them"
        )


def merge(
    made: Merge,
    outputs: Mapping[Path, Sequence[float]],
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Write one average for each set of weights, reading the checkpoints only once."""
    check(made, outputs)
    with ExitStack() as stack:
        reads = [stack.enter_context(one.opened()) for one in made.checkpoints]
        _refuse_unequal(made, reads, advance)
        targets = [
            stack.enter_context(_open_output(made, out, _sources(made, weights)))
            for out, weights in outputs.items()
        ]

        def write(output: int, name: str, first: int, data: memoryview) -> None:
            targets[output](name, first, data)

        _copy(made, reads[-1], targets, advance)
        tensors = [one.tensors for one in made.checkpoints]
        wanted = {n: one.kind for n, one in made.last.tensors.items() if n in made.averaged}
        weighted_sums(reads, tensors, list(outputs.values()), wanted, write, advance)


def copy(found: Checkpoint, out: Path, sources: str) -> None:
    """Stream a checkpoint's tensors unchanged to safetensors.

    ``sources`` say what is averaged in it; an empty string marks weights that are no average.
    """
    made = Merge([found], equal=set(found.tensors))
    _refuse_output(out, made)
    with found.opened() as read, _open_output(made, out, sources) as write:
        _copy(made, read, [write], lambda n: None)


def check(made: Merge, outputs: Mapping[Path, Sequence[float]]) -> None:
    """Raise an error for invalid weights or an output that cannot be written."""
    for out, weights in outputs.items():
        _check_weights(weights, made)
        _refuse_output(out, made)


def _check_weights(weights: Sequence[float], made: Merge) -> None:
    if len(weights) != len(made.checkpoints):
        raise ArgumentError(f"{len(weights)} weights for {len(made.checkpoints)} checkpoints")
    if not abs(sum(weights)) < float("inf"):
        raise ArgumentError(f"weights={list(weights)}: expected finite numbers")


def warn_of(weights: Sequence[float]) -> None:
    """Warn if weights are negative or do not sum to 1."""
    total = sum(weights)
    if abs(total - 1.0) > 1e-6:
        warnings.warn(f"the weights sum to {total:.6g}, not to 1", stacklevel=3)
    if min(weights) < 0.0:
        warnings.warn("some weights are negative: the result is not an average", stacklevel=3)


def _refuse_output(out: Path, made: Merge) -> None:
    for one in made.checkpoints:
        refuse_source(out, one, "one of the checkpoints")
    if made.writes_folder(out):
        check_vacant(out)
    elif out.is_dir():
        raise CheckpointError(f"{out} is a folder, and the result is a file; name a file in it")
    elif out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: the result needs a name that ends in .safetensors")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {out.parent}")


def refuse_source(out: Path, found: Checkpoint, what: str = "the source") -> None:
    """Raise a CheckpointError if the output is the checkpoint or one of its files."""
    real = os.path.realpath(out)  # Path.resolve fails for a link to itself
    if real in {os.path.realpath(path) for path in (found.path, *found.files)}:
        raise CheckpointError(f"{out} is {what}; name another output")


def _refuse_unequal(made: Merge, reads: Sequence[Read], advance: Callable[[int], None]) -> None:
    """Raise a CheckpointError if tensors that cannot be averaged differ between checkpoints."""
    problems = []
    for name in sorted(made.equal):
        tensor = made.last.tensors[name]
        sums = {_checksum(read, name, tensor) for read in reads}
        advance(tensor.nbytes * len(reads))
        if len(sums) > 1:
            what = "whole numbers" if tensor.kind.whole else "scaled or packed numbers"
            problems.append(f"{name!r}, {tensor.kind.code}{list(tensor.shape)}: {what} that differ")
    if problems:
        raise CheckpointError(
            "these tensors cannot be averaged (average before you quantize, or leave them out):\n"
            + format_problems(problems)
        )


def _checksum(read: Read, name: str, tensor: StoredTensor) -> tuple[int, int]:
    one, other = 0, 1
    for _, data in pieces_of(read, name, tensor):
        one, other = zlib.crc32(data, one), zlib.adler32(data, other)
    return one, other


def _copy(
    made: Merge,
    read: Read,
    targets: Sequence[Write],
    advance: Callable[[int], None],
) -> None:
    for name in made.equal | made.newest:
        tensor = made.last.tensors[name]
        for first, data in pieces_of(read, name, tensor):
            for target in targets:
                target(name, first, data)
        advance(tensor.nbytes if name in made.newest else 0)


# -- writing ---------------------------------------------------------------------------------------


def _sources(made: Merge, weights: Sequence[float]) -> str:
    return "; ".join(
        f"{weight:.9g} * {one.path.name}"
        for one, weight in zip(made.checkpoints, weights, strict=True)
        if weight
    )


def _metadata(made: Merge, sources: str) -> dict[str, str]:
    """Return the metadata of a result: its sources, format and tied names."""
    kept = {key: value for key, value in made.last.metadata.items() if key == "format"}
    return {**made.last.tied, "format": "pt", **kept, **({PROVENANCE: sources} if sources else {})}


@contextmanager
def _open_output(made: Merge, out: Path, sources: str) -> Iterator[Write]:
    """Yield a function that writes parts of tensors; keep the result only if the block succeeds."""
    tensors, metadata = made.last.tensors, _metadata(made, sources)
    if not made.writes_folder(out):
        with atomic_write_path(out) as name:
            partial = Path(name)
            files = files_of({partial.name: list(tensors)}, tensors, metadata)
            create(partial.parent, files)
            with writing(partial.parent, files) as write:
                yield write
        return
    files = files_of(made.last.layout, tensors, metadata)
    for one in made.last.files:
        if one.name.endswith(".safetensors.index.json"):
            files = files._replace(index_name=one.name)
    source = made.last.path if made.last.path.is_dir() else made.last.path.parent
    with new_folder(out, files, source) as partial, writing(partial, files) as write:
        yield write
