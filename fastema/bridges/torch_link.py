"""Copy weights to host memory while training continues, and back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastema.bridges.torch_cuda import allow_captures
from fastema.bridges.torch_parts import is_divided, local, wrap_part
from fastema.errors import LayoutError, format_problems

__all__ = ["Fetch", "Link"]

_PIECE: Final = 64 << 20
"""Bytes that the CPU copies at a time."""


class Link:
    """Staging buffers in host memory for tensors on any device, and the copies between the two.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        The tensors to copy; of DTensors, this rank's parts. Tensors passed later must have the same
        names, shapes, dtypes and placements.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.staging = {name: _on_host(one) for name, one in tensors.items()}
        self._staged = {name: local(one) for name, one in self.staging.items()}
        self._checked: Mapping[str, torch.Tensor] | None = None
        self.delay: Callable[[int], None] | None = None
        """Called with each piece's number before the CPU copies it, to imitate a slower link."""
        self._streams = {
            one.device: torch.cuda.Stream(one.device)
            for one in map(local, tensors.values())
            if one.is_cuda
        }

    def call_before_steps(self, owner: Any, method: str) -> Callable[[], None]:
        """Call ``owner.method()`` before every optimizer step while it lives; return a remover."""
        reference = weakref.ref(owner)

        def hook(*_: Any) -> None:
            found = reference()
            if found is not None:
                getattr(found, method)()

        removed = register_optimizer_step_pre_hook(hook).remove
        end: Callable[[], None] = weakref.finalize(owner, removed)
        return end

    @property
    def nbytes(self) -> int:
        """Bytes copied in one direction."""
        return sum(one.nbytes for one in self._staged.values())

    def fetch(self, tensors: Mapping[str, torch.Tensor]) -> Fetch:
        """Start copying tensors to the host; GPUs do so asynchronously, on separate streams.

        Tensors that need no gradient, such as buffers, may be written by the next forward pass:
        they are copied before this returns, on a GPU in the current stream.
        """
        self.check(tensors)
        now: list[tuple[torch.Tensor, torch.Tensor]] = []
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, one in tensors.items():
            pair = self._staged[name], local(one).detach()
            (pairs if one.requires_grad else now).append(pair)
        for target, source in now:
            target.copy_(source, non_blocking=True)  # the event below comes after it
        events = []
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))  # after writes of the weights
            with torch.cuda.stream(stream):
                for target, source in pairs:
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
                        source.record_stream(stream)
            events.append((device, stream.record_event()))
        near = [pair for pair in pairs if not pair[1].is_cuda]
        return Fetch(near, events, self.delay)

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the staging buffers into the tensors, and wait for the copies."""
        self.check(tensors)
        with torch.no_grad():
            for name, one in tensors.items():
                local(one).detach().copy_(self._staged[name], non_blocking=True)
        for device in self._streams:  # afterwards the staging buffers may be overwritten
            torch.cuda.current_stream(device).synchronize()

    def check(
        self,
        tensors: Mapping[str, torch.Tensor],
        problem: str = "the model no longer matches the average",
    ) -> None:
        """Raise a LayoutError if names, shapes, dtypes or placements have changed."""
        if tensors is self._checked:
            return
        problems = [f"{name!r} is gone" for name in self.staging if name not in tensors]
        problems += [f"{name!r} is new" for name in tensors if name not in self.staging]
        for name, one in tensors.items():
            was = self.staging.get(name)
            if was is not None and (now := _layout(one)) != _layout(was):
                problems.append(f"{name!r} is {now}, expected {_layout(was)}")
            elif local(one).is_cuda and one.device not in self._streams:
                self._streams[one.device] = torch.cuda.Stream(one.device)
        if problems:
            raise LayoutError(f"{problem}:\n{format_problems(problems)}")
        self._checked = tensors


def _layout(tensor: torch.Tensor) -> str:
    """Return dtype, shape and, for a DTensor, placements and mesh, as text to compare."""
    placed = f", {tensor.placements} of {tensor.device_mesh}" if is_divided(tensor) else ""
    return f"{tensor.dtype}{list(tensor.shape)}{placed}"


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty host tensor like ``tensor``, pinned for a GPU tensor."""
    part = local(tensor)
    memory = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda, requires_grad=False)
    return wrap_part(tensor, memory) if is_divided(tensor) else memory


class Fetch:
    """A copy of tensors to the host that is in progress."""

    def __init__(
        self,
        near: list[tuple[torch.Tensor, torch.Tensor]],
        events: list[tuple[torch.device, Any]],
        delay: Callable[[int], None] | None,
    ) -> None:
        self._near, self._events, self._delay = near, events, delay
        self._copied = threading.Event()

    def complete(self) -> None:
        """Copy the tensors that are on the CPU, and wait until all copies are complete."""
        try:
            with torch.no_grad():
                for number, (target, source) in enumerate(self._pieces()):
                    if self._delay is not None:
                        self._delay(number)
                    target.copy_(source)
            if self._events:
                with allow_captures():
                    for _, event in self._events:
                        event.synchronize()
        finally:
            self._near = []
            self._copied.set()

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for target, source in self._near:
            if source.nbytes <= _PIECE or not (
                source.is_contiguous() and target.is_contiguous() and source.ndim
            ):
                yield target, source
                continue
            size = max(_PIECE // source.element_size(), 1)
            yield from zip(target.view(-1).split(size), source.view(-1).split(size), strict=True)

    def fence(self) -> bool:
        """Make later work wait until the tensors may be written; return whether the host waited.

        Streams under capture do not wait: a graph cannot wait for an event from outside.
        """
        for device, event in self._events:
            stream = torch.cuda.current_stream(device)
            with torch.cuda.stream(stream):
                if not torch.cuda.is_current_stream_capturing():
                    stream.wait_event(event)
        if not self._near or self._copied.is_set():
            return False
        self._copied.wait()
        return True
