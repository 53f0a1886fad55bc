"""Pairs of tensors compiled into launches, which a plan runs at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastema.engine import cpu_group
from fastema.engine.cpu import CpuRun, Launch
from fastema.engine.cpu_group import CpuGroup
from fastema.engine.interrupts import defer_signals
from fastema.engine.locks import lock
from fastema.errors import DTypeError, StateError
from fastema.layout.device_context import LaunchArgs
from fastema.layout.group import Pair

__all__ = ["Program"]


class Program:
    """Runs operations over a fixed set of pairs.

    Signals are deferred during a run, so that no tensor is left half written. For tensors on a GPU
    a run only enqueues work on the current stream.

    Parameters
    ----------
    pairs : mapping of str to sequence of Pair
        Checked pairs without duplicate memory, under tags that the caller chooses; a run gives each
        tag its operation. Averages that are updated together follow each other, tensor by tensor.
        A device without kernels raises a DTypeError.
    on_team : bool
        Whether CPU runs use the OpenMP team of a framework, see :class:`CpuRun`.
    """

    def __init__(self, pairs: Mapping[str, Sequence[Pair]], *, on_team: bool = False) -> None:
        self._lock, self._on_team = lock(), on_team
        self._pairs = pairs  # keeps the memory that the tables point to
        self._contexts = {
            p.dst.device: p.dst.context for members in pairs.values() for p in members
        }
        self._runs: dict[tuple[tuple[str, str], ...], list[Callable[[LaunchArgs], None]]] = {}
        self._num_averages = 1 + max(
            (p.average_index for members in pairs.values() for p in members), default=0
        )
        kinds: dict[tuple[str, ...], list[Pair]] = {}
        for tag, members in pairs.items():
            for pair in members:
                ring = "" if pair.ring is None else pair.ring[0].dtype
                residual = "" if pair.residual is None else pair.residual.dtype
                key = (
                    tag,
                    pair.dst.device,
                    pair.dst.dtype,
                    pair.src.dtype,
                    pair.form,
                    ring,
                    residual,
                )
                kinds.setdefault(key, []).append(pair)
        self._on_cpu: list[CpuGroup] = []
        self._on_gpus: list[Any] = []
        for (tag, *_), members in kinds.items():
            first = members[0].dst
            if first.context is not None:
                from fastema.engine import cuda_group

                self._on_gpus += cuda_group.groups(tag, members)
            elif first.device == "cpu":
                self._on_cpu += cpu_group.groups(tag, members)
            else:
                raise DTypeError(f"{members[0].name}: no kernels for device {first.device}")

    def prepare(self, operations: Mapping[str, str]) -> list[Callable[[LaunchArgs], None]]:
        """Compile the kernels of a run and return its parts, one per device and dtype pair.

        Those on the CPU are one part. :meth:`run` calls this; call it earlier to fail before
        anything is written.
        """
        if len(self._contexts) > 1:
            self._refuse_half_a_capture()
        key = tuple(operations.items())
        runs = self._runs.get(key)
        if runs is None:
            # A signal handler that saves an average would wait forever for the compiler's lock.
            with defer_signals():
                runs = [
                    group.prepare(operations[group.tag])
                    for group in self._on_gpus
                    if group.tag in operations
                ]
                launches = self._cpu_launches(operations)
                if launches:
                    runs.append(self._cpu_run(launches).run)
            self._runs[key] = runs
        return runs

    def _cpu_launches(self, operations: Mapping[str, str]) -> list[Launch]:
        return [
            group.launch(operations[group.tag]) for group in self._on_cpu if group.tag in operations
        ]

    def run(self, operations: Mapping[str, str], args: LaunchArgs = LaunchArgs()) -> None:  # noqa: B008
        """Run one operation per tag over all its pairs; pairs under other tags are not touched."""
        runs = self.prepare(operations)
        # Defer signals first, so that no handler runs while the lock is held.
        with defer_signals(), self._lock:
            for run in runs:
                run(args)

    def native(self, operations: Mapping[str, str], watches: Sequence[int]) -> CpuRun:
        """Return a run of the same pairs, all on the CPU, that first checks their tensors.

        It is one native call without a lock: the caller excludes other runs of this program.
        """
        return self._cpu_run(self._cpu_launches(operations), watches)

    def _cpu_run(self, launches: Sequence[Launch], watches: Sequence[int] = ()) -> CpuRun:
        return CpuRun(launches, self._num_averages, watches, on_team=self._on_team)

    def relocate(
        self, dst: Mapping[str, int] | None = None, src: Mapping[str, int] | None = None
    ) -> None:
        """Continue with the same tensors at other addresses, given by pair name for each side.

        The caller must keep the memory alive until the following runs are over.
        """
        with self._lock:
            for group in self._on_cpu:  # frameworks move tensors in host memory only
                group.relocate(dst, src)

    def _refuse_half_a_capture(self) -> None:
        captured = {
            device: context is not None and context.capturing()
            for device, context in self._contexts.items()
        }
        if len(set(captured.values())) > 1:
            others = ", ".join(device for device, is_so in captured.items() if not is_so)
            raise StateError(
                f"a graph is being captured, and the work on {others} would not be part of it: let "
                "the streams of all devices join the capture, and update CPU tensors outside of it"
            )

    def all_finite(self) -> bool:
        """Return whether the latest run of ``"finite"`` found only finite values."""
        return not any(np.any(group.results()) for group in (*self._on_cpu, *self._on_gpus))
