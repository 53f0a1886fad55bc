"""Write one safetensors folder from the shards of all ranks or from a DCP folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from fastema.average.average import Average
from fastema.checkpoint import dcp
from fastema.checkpoint.files import StoredTensor
from fastema.checkpoint.folder import (
    Block,
    Files,
    begin,
    check_vacant,
    plan,
    publish_folder,
    write_blocks,
)
from fastema.distributed import live
from fastema.distributed.group import RankGroup
from fastema.errors import ArgumentError, CheckpointError, format_problems
from fastema.rules.checks import validate_int

__all__ = ["consolidate"]

_METADATA: Final = {"format": "pt"}
"""Metadata that transformers requires in every file."""


def consolidate(
    source: Average[Any] | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    which: int | None = None,
    key: str | None = None,
    rest: str | None = None,
    files_from: str | os.PathLike[str] | None = None,
    file_bytes: int = 5_000_000_000,
    max_bytes: int = 1 << 28,
) -> Path:
    """Write an average as one Hugging Face folder, with each rank writing its own shards.

    The folder has ``model.safetensors``, or ``model-00001-of-000NN.safetensors`` files with
    ``model.safetensors.index.json``, which ``from_pretrained`` and
    ``safetensors.torch.load_file`` can read. It appears under its name only when it is complete and
    synchronized to the disk. Ranks write their shards directly into the files and send each other
    no weights.

    Parameters
    ----------
    source : average or path
        An average, whose tensors are written in the model's dtypes under the keys of the model's
        ``state_dict()``. Or a folder of torch.distributed.checkpoint, whose average is written in
        its saved dtypes under the names of :attr:`Average.shadow`.
    folder : path
        The folder to write: missing or empty, on a file system that all ranks share.
    which : int, optional
        Index of the average among the rules. Required if there are several.
    key : str, optional
        For a saved folder: dotted key of the average in the state, such as ``"trainer.ema"``.
        Required if there are several.
    rest : str, optional
        For a saved folder: dotted key of the model in the state, such as ``"model"``. Names that
        the average leaves out (frozen weights, skipped buffers) are read from there.
    files_from : path, optional
        A folder whose files other than weights are copied along: config, tokenizer, license.
    file_bytes : int
        Maximum size of the tensors in one file, at least 1; default 5 GB. A larger tensor gets a
        file of its own.
    max_bytes : int
        Extra memory that each rank may use, in bytes, at least 1 MiB; default 256 MiB.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    CheckpointError
        On every rank: if the folder is not empty, ranks differ in a tensor's dtype or shape, or the
        saved folder is damaged, holds no average, or holds several and none is selected.
    StorageError
        If the folder cannot be written. Nothing is left there.
    StateError
        If the average is applied to the model.
    ArgumentError
        For an invalid argument, or one that belongs to the other kind of source.

    Notes
    -----
    If torch.distributed is initialized, all ranks of the default group must call this. A saved
    folder can also be consolidated in one process, without a model; no code from the folder is run.
    Tied weights are written once, under their first key.

    Examples
    --------
    >>> import tempfile, torch, fastema
    >>> from safetensors.torch import load_file
    >>> from fastema.distributed import consolidate
    >>> ema = fastema.EMA(torch.nn.Linear(2, 1))
    >>> out = consolidate(ema, tempfile.mkdtemp())
    >>> sorted(load_file(out / "model.safetensors"))
    ['bias', 'weight']
    """
    group = RankGroup()
    target = Path(folder)
    most = validate_int(max_bytes, "max_bytes", 1 << 20) // 4
    validate_int(file_bytes, "file_bytes", 1)
    if not isinstance(source, Average):
        tensors, blocks = group.run_on_all_ranks(
            lambda: _plan_saved(Path(source), key, which, rest, group)
        )
        _write(group, target, tensors, blocks, files_from, file_bytes, most)
        return target
    if key is not None or rest is not None:
        raise ArgumentError("key= and rest= are for folders of torch.distributed.checkpoint")
    with source.lock:
        found = group.run_on_all_ranks(lambda: live.describe_live(source, which))
        if source._ranks is not None:
            source._ranks.compare(source._common_settings())
        tensors, mine = _merge_rank_tensors(group, found)
        blocks = [block for block in found.blocks if block.name in mine]
        _write(group, target, tensors, blocks, files_from, file_bytes, most)
    return target


def _plan_saved(
    path: Path, key: str | None, which: int | None, rest: str | None, group: RankGroup
) -> tuple[dict[str, StoredTensor], list[Block]]:
    """Return the tensors of a saved folder, and the blocks that this process writes."""
    opened = dcp.opened(path)
    chosen = dcp.average_in(opened, key, which)
    if rest is not None:
        chosen = dcp.state_in(opened, rest) | chosen
    tensors = {name: opened.tensors[flat].tensor for name, flat in chosen.items()}
    blocks = [
        block
        for name, flat in chosen.items()
        for block in dcp.blocks_of(name, opened.tensors[flat])
    ]
    return tensors, blocks[group.rank :: group.size]


def _merge_rank_tensors(
    group: RankGroup, found: live.LiveAverage
) -> tuple[dict[str, StoredTensor], set[str]]:
    """Return the tensors of all processes, and the names of those that this process writes."""
    every = group.gather((found.tensors, found.divided))
    tensors: dict[str, StoredTensor] = {}
    first: dict[str, int] = {}
    problems = []
    for rank, (theirs, _) in enumerate(every):
        for name, tensor in theirs.items():
            if tensors.setdefault(name, tensor) != tensor:
                other = tensors[name]
                problems.append(
                    f"{name!r} is {tensor.kind.code}{list(tensor.shape)} on rank {rank}, "
                    f"{other.kind.code}{list(other.shape)} on rank {first[name]}"
                )
            first.setdefault(name, rank)
    if problems:
        raise CheckpointError("ranks differ:\n" + format_problems(problems))
    return tensors, {
        name for name in found.tensors if name in found.divided or first[name] == group.rank
    }


def _write(
    group: RankGroup,
    folder: Path,
    tensors: dict[str, StoredTensor],
    blocks: Iterable[Block],
    files_from: str | os.PathLike[str] | None,
    file_bytes: int,
    most: int,
) -> None:
    copied_from = None if files_from is None else Path(files_from)
    made: list[Path] = []

    def prepare() -> tuple[Files, Path]:
        check_vacant(folder)
        if copied_from is not None and not copied_from.is_dir():
            raise CheckpointError(f"files_from={str(copied_from)!r}: there is no such folder")
        files = plan(tensors, file_bytes, _METADATA)
        made.append(begin(folder, files))
        return files, made[0]

    try:
        files, partial = group.run_on_all_ranks(prepare, on_first=True)
        group.run_on_all_ranks(lambda: write_blocks(partial, files, tensors, blocks, most))
        group.run_on_all_ranks(
            lambda: publish_folder(partial, folder, files, copied_from), on_first=True
        )
    except BaseException:
        for one in made:
            shutil.rmtree(one, ignore_errors=True)
        raise
