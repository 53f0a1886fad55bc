"""Local processes that form one process group and run functions together."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

WORLD = 4
TIMEOUT = timedelta(seconds=60)


class Ranks:
    """One process per rank of a gloo group, reused from test to test."""

    def __init__(self, world: int = WORLD, timeout: timedelta = TIMEOUT) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world, store, timeout))
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        """Whether all processes are running."""
        return all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 90.0) -> list[Any]:
        """Call a module-level function on every rank and return the results by rank.

        If a rank raises or hangs, kill all ranks and fail the test with the tracebacks.
        """
        results, errors = self.try_run(function, *args, seconds=seconds)
        if errors:
            self.close()
            pytest.fail("\n".join(errors))
        return results

    def try_run(
        self, function: Callable[..., Any], *args: Any, seconds: float = 90.0
    ) -> tuple[list[Any], list[str]]:
        """Call a function on every rank; return the results and the errors of the ranks."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        errors: list[str] = []
        while len(results) < len(self._pipes):
            open_pipes = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            # After one rank raised, others may wait for it until the group's timeout.
            ready = wait(open_pipes, 15.0 if errors else seconds)
            if not ready:
                missing = sorted(set(range(len(self._pipes))) - results.keys())
                return [], [f"ranks {missing} hang", *errors]
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    error, results[rank] = pipe.recv()
                except EOFError:
                    error, results[rank] = "the process died", None
                if error:
                    errors.append(f"rank {rank}: {error}")
        return [results[rank] for rank in range(len(self._pipes))], errors

    def close(self) -> None:
        """Kill all processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, rank: int, world: int, store: str, timeout: timedelta) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            result = None, function(*args)
        except BaseException:
            result = traceback.format_exc(), None
        pipe.send(result)
