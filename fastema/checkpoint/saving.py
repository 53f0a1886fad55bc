"""Save averages to files and load them, each atomically."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastema.average.average import Average, check_average
from fastema.average.state import SavedOrMine
from fastema.checkpoint import files
from fastema.checkpoint.inspection import verify_files
from fastema.checkpoint.layout import import_torch
from fastema.checkpoint.source import Checkpoint
from fastema.checkpoint.state import read_tensors, write_tensors
from fastema.checkpoint.stored import load, open_own_file
from fastema.engine.locks import lock
from fastema.errors import ArgumentError, CheckpointError

__all__ = ["load_into", "save", "wait"]


class _BackgroundWriter:
    """Background writer: writes files one after another on its own thread and keeps errors."""

    def __init__(self) -> None:
        self._lock = lock()
        self._pool: ThreadPoolExecutor | None = None
        self._writes: list[Future[None]] = []
        atexit.register(self._report)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Drop the thread and the writes in a forked child; the parent completes them."""
        self._pool, self._writes = None, []

    def submit(self, path: Path, state: Mapping[str, Any]) -> None:
        """Queue a state to be written; its arrays must not change until it is written."""
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(1, "fastema-save")
            self._writes.append(self._pool.submit(write_tensors, path, state))

    def raise_failed(self, *, all_of_them: bool = False) -> None:
        """Raise the first error of finished writes, or wait for all writes if ``all_of_them``."""
        with self._lock:
            writes = [one for one in self._writes if all_of_them or one.done()]
        for one in writes:
            error = one.exception()  # waits; after an interrupt the next call waits again
            with self._lock:
                self._writes = [other for other in self._writes if other is not one]
            if error is not None:
                raise error

    def _report(self) -> None:
        for one in self._writes:
            error = one.exception()
            if error is not None:
                print(f"fastema.checkpoint.save: {error}", file=sys.stderr)


_writer = _BackgroundWriter()


def save(ema: Average[Any], path: str | os.PathLike[str], *, wait: bool = True) -> None:
    """Save an average with its schedule, counters and names, as one safetensors file.

    Parameters
    ----------
    ema : EMA, SWA, SMA or PowerEMA
    path : path
        The file to write; its folder must exist. It is replaced atomically: the average is written
        under another name, synchronized to the disk, and renamed.
    wait : bool
        If False, copy the average now and write it on a background thread. An error of that write
        is raised by the next call to this module or by :func:`wait`, or printed when the process
        ends. Default True.

    Raises
    ------
    ArgumentError
        If ``ema`` is not an average.
    CheckpointError
        If the format cannot store a name or a dtype; if the path has an extension of torch.save
        files; or if this process holds only a part of the average: use
        torch.distributed.checkpoint or :func:`fastema.distributed.consolidate`.
    StorageError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np, fastema
    >>> from fastema.checkpoint import load_into, save
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "ema.safetensors"
    >>> weights = np.ones(3)
    >>> ema = fastema.EMA([weights], decay=0.9)
    >>> ema.update()
    >>> save(ema, path)
    >>> other = fastema.EMA([weights], decay=0.9)
    >>> load_into(other, path)
    >>> other.num_updates
    1
    """
    check_average(ema, "save()")
    _writer.raise_failed(all_of_them=wait)  # an earlier write must not finish after this one
    target = Path(path)
    files.refuse_ending(target)
    if not wait:
        _writer.submit(target, ema.state_dict())
        return
    with ema.lock:  # no update may change the average during the write
        write_tensors(target, ema.state_dict(copy=False))


def load_into(
    ema: Average[Any],
    path: str | os.PathLike[str],
    *,
    schedule: SavedOrMine = "saved",
    num_updates: int | None = None,
) -> None:
    """Load an average that :func:`save` or another library wrote into a fastema average.

    Parameters
    ----------
    ema : EMA, SWA, SMA or PowerEMA
        The average to load into.
    path : path
        A file of :func:`save`: its schedule, counters and tensors are loaded as by
        :meth:`fastema.EMA.load_state_dict`. Or any other file that :func:`load` reads, if ``ema``
        averages a PyTorch model: the averages and the number of updates are loaded, and ``ema``
        keeps its schedule. Names match without wrapper prefixes; lists (torch_ema, diffusers,
        NeMo) are in the order of ``model.parameters()``; for those in another order, such as an
        optimizer's, use :func:`convert`. Buffers that the file lacks are unchanged.
    schedule : {"saved", "mine"}
        For a file of fastema, whether to continue with its schedule (the default) or with that of
        ``ema``.
    num_updates : int, optional
        For a file of another library, the number of updates that its average has seen, at least 0.
        By default the number in the file; without one, that of ``ema``. 0 begins the schedule of
        ``ema`` again: with ``start_after`` or a mean, the next update then replaces the average.

    Raises
    ------
    CheckpointError
        If the file is damaged, holds no average, or holds one of another kind or of other weights.
        ``ema`` is then unchanged.
    ArgumentError
        If ``ema`` is not an average. If the number of updates is unknown and the schedule of
        ``ema`` depends on it, or if the next update would replace the loaded average
        (``start_after``, means): pass ``num_updates``. For another library's
        file and an :class:`SMA`, which needs its window. ``ema`` is then unchanged.
    """
    check_average(ema, "load_into()")
    _writer.raise_failed(all_of_them=True)
    like = next(iter(ema.shadows[0].values()))
    own: files.File | Checkpoint | None = open_own_file(Path(path))
    if own is None:
        stored = load(path)
        if stored.library == "model":
            raise CheckpointError(f"{path} holds a model's weights and no average")
        if Path(path).is_file():
            verify_files(stored)
        if stored.state is None:
            what = f"loading an average of {stored.library} ({path})"
            if not isinstance(like, import_torch(what).Tensor):
                raise ArgumentError(f"{what} is possible for averages of PyTorch models alone")
            from fastema.checkpoint.transfer import load_stored

            load_stored(ema, stored, num_updates)
            return
        own = stored.state
    if num_updates is not None:
        raise ArgumentError(
            f"num_updates={num_updates!r}: {own.path} is a state of fastema and records it; leave "
            "it out"
        )
    ema.load_state_dict(read_tensors(own, like), schedule=schedule)


def wait() -> None:
    """Wait until all averages passed to ``save(..., wait=False)`` are on disk; raise errors."""
    _writer.raise_failed(all_of_them=True)
