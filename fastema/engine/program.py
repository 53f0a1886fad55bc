"""Pairs of tensors compiled into launches, which a plan runs at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import numpy as np

from fastema.engine.group import Group
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
    """

    def __init__(self, pairs: Mapping[str, Sequence[Pair]]) -> None:
        self._lock = lock()
        self._pairs = pairs  # keeps the memory that the tables point to
        self._contexts = {
            p.dst.device: p.dst.context for members in pairs.values() for p in members
        }
        self._launches: dict[tuple[tuple[str, str], ...], list[Callable[[], None]]] = {}
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
        self._groups = [
            group for (tag, *_), members in kinds.items() for group in _groups(tag, members)
        ]

    def prepare(self, operations: Mapping[str, str]) -> list[Callable[[], None]]:
        """Compile the kernels of a run and return its launches.

        :meth:`run` calls this; call it earlier to fail before anything is written.
        """
        if len(self._contexts) > 1:
            self._refuse_half_a_capture()
        key = tuple(operations.items())
        launches = self._launches.get(key)
        if launches is None:
            # A signal handler that saves an average would wait forever for the compiler's lock.
            with defer_signals():
                launches = [
                    group.prepare(operations[group.tag])
                    for group in self._groups
                    if group.tag in operations
                ]
            self._launches[key] = launches
        return launches

    def run(self, operations: Mapping[str, str], args: LaunchArgs = LaunchArgs()) -> None:  # noqa: B008
        """Run one operation per tag over all its pairs; pairs under other tags are not touched."""
        launches = self.prepare(operations)
        # Defer signals first, so that no handler runs while the lock is held.
        with defer_signals(), self._lock:
            for group in self._groups:
                group.begin(args)
            for launch in launches:
                launch()

    def relocate(
        self, dst: Mapping[str, int] | None = None, src: Mapping[str, int] | None = None
    ) -> None:
        """Continue with the same tensors at other addresses, given by pair name for each side.

        The caller must keep the memory alive until the following runs are over.
        """
        with self._lock:
            for group in self._groups:
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
        return not any(np.any(group.results()) for group in self._groups)


def _groups(tag: str, members: Sequence[Pair]) -> Sequence[Group]:
    first = members[0]
    if first.dst.context is None and first.dst.device != "cpu":
        raise DTypeError(f"{first.name}: no kernels for device {first.dst.device}")
    module = "cpu_group" if first.dst.context is None else "cuda_group"
    made: Sequence[Group] = import_module(f"fastema.engine.{module}").groups(tag, members)
    return made
