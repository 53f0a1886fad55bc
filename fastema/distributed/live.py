"""What this process holds of an average, tensor by tensor, as the model's state would have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastema.binding.swap import rounded
from fastema.bridges.memory import row_major_on_host
from fastema.bridges.registry import describe, part_of
from fastema.distributed.folder import Block, Tensor
from fastema.errors import CheckpointError, FastemaError
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec
from fastema.shadow.average import Average
from fastema.shadow.store import Entry

__all__ = ["Held", "held"]


class Held:
    """Tensors by name, and this process's blocks of them.

    Attributes
    ----------
    tensors : dict of str to Tensor
    divided : set of str
        Names of tensors of which several processes have a part.
    blocks : list of Block
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.divided: set[str] = set()
        self.blocks: list[Block] = []

    def add(self, name: str, spec: TensorSpec, code: str, read: Any) -> None:
        """Add a tensor; its block, unless another process has the same."""
        self.tensors[name] = Tensor(code, spec.full_shape)
        if spec.division is not None:
            self.divided.add(name)
            if not spec.division.is_first:
                return
        offset = spec.offset or (0,) * len(spec.shape)
        self.blocks.append(Block(name, offset, spec.shape, read))


def held(ema: Average[Any], which: int | None) -> Held:
    """Describe what ``ema.model_state_dict(which=which)`` would hold, without making it.

    Tied weights are there once, by the first name that the model's state has for them.
    """
    ema._refuse_applied("consolidate")
    found = Held()
    seen: set[str] = set()
    entries, state, names = ema._state_of(None, which)
    for key, kept in names.items():
        value = state[key][1]
        if kept in seen or not hasattr(value, "shape"):  # extra state is no tensor
            continue
        seen.add(kept)
        try:
            spec = describe(value)
        except FastemaError as error:
            raise CheckpointError(f"{key} cannot be written: {error}") from None
        if kept in entries:
            entry = entries[kept]
            found.add(key, entry.spec, spec.dtype, _Average(entry, spec.dtype))
        else:
            found.add(key, spec, spec.dtype, _Plain(part_of(value)))
    return found


class _Plain:
    """Reads from an array."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __call__(self, piece: tuple[slice, ...]) -> Any:
        return row_major_on_host(self._array[piece])


class _Average:
    """Reads from an average, rounded to the model's dtype."""

    def __init__(self, entry: Entry, code: str) -> None:
        self._entry, self._code = entry, code

    def __call__(self, piece: tuple[slice, ...]) -> Any:
        parts = {
            part: memory[0][piece]
            for part, memory in self._entry.parts.items()
            if part in ("shadow", "low")
        }
        specs = {part: describe(array) for part, array in parts.items()}
        shadow = specs["shadow"]
        if shadow.dtype == self._code:
            return row_major_on_host(parts["shadow"])
        pair = Pair(
            self._entry.name,
            shadow,
            replace(shadow, dtype=self._code),
            self._entry.form,
            specs.get("low"),
        )
        (array,) = rounded([pair])
        return row_major_on_host(array)
