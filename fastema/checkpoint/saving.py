"""Averages saved to a file and loaded from it, whole or not at all."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from fastema.checkpoint import files
from fastema.checkpoint.source import is_torch_file
from fastema.checkpoint.state import is_state, read_state, write_state
from fastema.checkpoint.stored import load
from fastema.engine.locks import lock
from fastema.errors import CheckpointError
from fastema.shadow.average import Average
from fastema.shadow.state import SavedOrMine

__all__ = ["load_into", "save", "wait"]


_ATTEMPTS: Final = 20
"""Times that a file is read which is replaced each time."""


class _Writer:
    """Writes on a thread of its own, one file after the other, and keeps what went wrong."""

    def __init__(self) -> None:
        self._lock = lock()
        self._pool: ThreadPoolExecutor | None = None
        self._writes: list[Future[None]] = []
        atexit.register(self._report)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a child the thread is not there; what it writes is the parent's to write."""
        self._pool, self._writes = None, []

    def submit(self, path: Path, state: Mapping[str, Any]) -> None:
        """Write a state later; its arrays must not change until then."""
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(1, "fastema-save")
            self._writes.append(self._pool.submit(write_state, path, state))

    def raise_failed(self, *, all_of_them: bool = False) -> None:
        """Raise the first error of writes that ended, or wait for all to end first."""
        with self._lock:
            writes = [one for one in self._writes if all_of_them or one.done()]
        for one in writes:
            error = one.exception()  # waits, and an interrupt leaves it to the next call
            with self._lock:
                self._writes = [other for other in self._writes if other is not one]
            if error is not None:
                raise error

    def _report(self) -> None:
        for one in self._writes:
            error = one.exception()
            if error is not None:
                print(f"fastema.checkpoint.save: {error}", file=sys.stderr)


_writer = _Writer()


def save(ema: Average[Any], path: str | os.PathLike[str], *, wait: bool = True) -> None:
    """Save an average with its schedule, counters and names, as one safetensors file.

    Parameters
    ----------
    ema : EMA, SWA, SMA or PowerEMA
    path : path
        Of the file; its folder must exist. There is the old file or the whole new one, whatever
        happens: it is written under another name, synchronised to the disk, and renamed.
    wait : bool
        False copies the average now and writes it on a thread. An error is raised by the next call
        of this module, by :func:`wait`, or printed at the end of the process.

    Raises
    ------
    CheckpointError
        If a name or a dtype has no place in the format, or this process holds a part of the
        average: use torch.distributed.checkpoint, or :func:`fastema.distributed.consolidate`. If
        the path ends as files of torch.save do.
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
    _writer.raise_failed(all_of_them=wait)  # a write of before must not come after this one
    target = Path(path)
    files.refuse_ending(target)
    if not wait:
        _writer.submit(target, ema.state_dict())
        return
    with ema.lock:  # nobody changes what is written
        write_state(target, ema.state_dict(copy=False))


def load_into(
    ema: Average[Any],
    path: str | os.PathLike[str],
    *,
    schedule: SavedOrMine = "saved",
) -> None:
    """Load an average, by :func:`save` or by another library, into one of fastema's.

    Parameters
    ----------
    ema : EMA, SWA, SMA or PowerEMA
    path : path
        A file of :func:`save`, whose schedule, counters and tensors go on as
        :meth:`fastema.EMA.load_state_dict` says; or what else :func:`load` reads, into an average
        of a PyTorch model: the averages and the number of updates then, while the schedule is that
        of ``ema``. Names are looked up without wrappers' prefixes; lists (torch_ema, diffusers,
        NeMo) are in the order of ``model.parameters()``. Buffers that the file lacks stay.
    schedule : {"saved", "mine"}
        Whose schedule continues, from a file of fastema's.

    Raises
    ------
    CheckpointError
        If the file is damaged or holds no average, or one of another kind or of other weights;
        nothing is changed then.
    """
    _writer.raise_failed(all_of_them=True)
    file = Path(path)
    if file.is_file() and not is_torch_file(file):
        like = next(iter(ema.shadows[0].values()))
        state = _read_whole(file, like)
        if state is not None:
            ema.load_state_dict(state, schedule=schedule)
            return
    stored = load(file)
    if stored.library == "model":
        raise CheckpointError(f"{file} holds a model's weights and no average")
    from fastema.checkpoint.transfer import load_stored

    load_stored(ema, stored, schedule)


def _read_whole(file: Path, like: Any) -> dict[str, Any] | None:
    """Read a state, again where a writer replaces the file meanwhile; None if it holds none."""
    for attempt in range(_ATTEMPTS):
        found = files.read(file)
        if not is_state(found):
            return None
        try:
            return read_state(found, like)
        except files.ReplacedError:
            if attempt + 1 == _ATTEMPTS:
                raise
    raise AssertionError


def wait() -> None:
    """Wait until everything is on the disk that ``save(..., wait=False)`` was given."""
    _writer.raise_failed(all_of_them=True)
