"""One folder of safetensors files from the parts that processes hold, or from a DCP folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from fastema.checkpoint import dcp
from fastema.checkpoint.files import StoredTensor, lock_folder
from fastema.checkpoint.folder import (
    Block,
    Files,
    begin,
    finish,
    plan,
    refuse_occupied,
    write_blocks,
)
from fastema.distributed import live
from fastema.distributed.group import RankGroup
from fastema.errors import ArgumentError, CheckpointError, listed
from fastema.rules.checks import checked_whole
from fastema.shadow.average import Average

__all__ = ["consolidate"]

_METADATA: Final = {"format": "pt"}
"""Metadata that transformers asks of every file."""


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
    """Write an average as one Hugging Face folder, each rank its own parts; returns the path.

    The folder has ``model.safetensors``, or ``model-00001-of-000NN.safetensors`` files with
    ``model.safetensors.index.json``: what ``from_pretrained`` and
    ``safetensors.torch.load_file`` read. It appears under its name when all of it is written and
    synchronised to the disk. Ranks write where their parts belong and send each other no weights.

    Parameters
    ----------
    source : average or path
        An average, whose tensors are written in the model's dtypes by the keys of its
        ``state_dict()``; or a folder of torch.distributed.checkpoint, whose average is written in
        the dtypes it was saved in, by the names of :attr:`Average.shadow`.
    folder : path
        Not there yet, or empty; on a file system that all ranks share.
    which : int, optional
        The average, by its place among the rules; needed where there are several.
    key : str, optional
        Of a saved folder: where the average is in the state, such as ``"trainer.ema"``; needed
        where there are several.
    rest : str, optional
        Of a saved folder: where the model is in the state, such as ``"model"``. Names that the
        average leaves out (frozen weights, skipped buffers) are taken from there.
    files_from : path, optional
        A folder whose files are copied along, but for weights: config, tokenizer, licence.
    file_bytes : int
        Bytes of a file, from which on another one begins.
    max_bytes : int
        Bytes of memory that each rank may take besides what it holds, at least 1 MiB.

    Raises
    ------
    CheckpointError
        If the folder is not empty; if ranks differ in a tensor's dtype or shape; for a saved folder
        that is damaged, holds no average, or several where none is chosen. On every rank.
    StorageError
        If it cannot be written; nothing is left then.
    StateError
        While the average is applied.
    ArgumentError
        For an argument without a valid value, or one that is for the other kind of source.

    Notes
    -----
    Where torch.distributed runs, all ranks of the default group have to call this. From a saved
    folder it also works in one process, without a model, and runs no code from the folder. Tied
    weights are written once, by their first key.

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
    most = checked_whole(max_bytes, "max_bytes", 1 << 20) // 4
    checked_whole(file_bytes, "file_bytes", 1)
    if not isinstance(source, Average):
        tensors, blocks = group.agreed(lambda: _saved(Path(source), key, which, rest, group))
        _write(group, target, tensors, blocks, files_from, file_bytes, most)
        return target
    if key is not None or rest is not None:
        raise ArgumentError("key= and rest= are for folders of torch.distributed.checkpoint")
    with source.lock:
        found = group.agreed(lambda: live.describe_live(source, which))
        if source._ranks is not None:
            source._ranks.compare(source._common_settings())
        tensors, mine = _united(group, found)
        blocks = [block for block in found.blocks if block.name in mine]
        _write(group, target, tensors, blocks, files_from, file_bytes, most)
    return target


def _saved(
    path: Path, key: str | None, which: int | None, rest: str | None, group: RankGroup
) -> tuple[dict[str, StoredTensor], list[Block]]:
    """The tensors of a saved folder, and this process's share of their blocks."""
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


def _united(group: RankGroup, found: live.LiveAverage) -> tuple[dict[str, StoredTensor], set[str]]:
    """The tensors of all processes, and those that this one writes its part of."""
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
        raise CheckpointError("ranks differ:\n" + listed(problems))
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
        refuse_occupied(folder)
        if copied_from is not None and not copied_from.is_dir():
            raise CheckpointError(f"files_from={str(copied_from)!r}: there is no such folder")
        files = plan(tensors, file_bytes, _METADATA)
        stack.enter_context(lock_folder(folder.parent))
        made.append(begin(folder, files))
        return files, made[0]

    with ExitStack() as stack:  # the first rank's lock is held until all have written
        try:
            files, partial = group.agreed(prepare, on_first=True)
            group.agreed(lambda: write_blocks(partial, files, tensors, blocks, most))
            group.agreed(lambda: finish(partial, folder, files, copied_from), on_first=True)
        except BaseException:
            for one in made:
                shutil.rmtree(one, ignore_errors=True)
            raise
