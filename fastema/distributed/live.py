"""The shards of an average in this process, under the keys of the model's state dict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastema.average.average import Average
from fastema.average.memory import Entry
from fastema.binding.swap import round_to_weights
from fastema.bridges.memory import row_major_on_host
from fastema.bridges.registry import describe, part_of
from fastema.checkpoint.files import StoredTensor
from fastema.checkpoint.folder import Block
from fastema.errors import CheckpointError, FastemaError
from fastema.layout.dtypes import DType
from fastema.layout.group import Pair
from fastema.layout.spec import TensorSpec

__all__ = ["LiveAverage", "describe_live"]


@dataclass
class LiveAverage:
    """Tensors by name, the names of sharded ones, and the blocks that this process holds."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    divided: set[str] = field(default_factory=set)
    blocks: list[Block] = field(default_factory=list)

    def add(self, name: str, spec: TensorSpec, kind: DType, read: Callable[..., Any]) -> None:
        """Add a tensor, and its block unless another process writes an identical replica."""
        self.tensors[name] = StoredTensor(kind, spec.full_shape)
        if spec.division is not None:
            self.divided.add(name)
            if not spec.division.is_first:
                return
        offset = spec.offset or (0,) * len(spec.shape)
        self.blocks.append(Block(name, offset, spec.shape, read))


def describe_live(ema: Average[Any], which: int | None) -> LiveAverage:
    """Describe what ``ema.model_state_dict(which=which)`` would return, without building it.

    Tied weights occur once, under their first name in the model's state dict.
    """
    ema._refuse_applied("consolidate")
    found = LiveAverage()
    seen: set[str] = set()
    entries, state, names = ema._state_of(None, which)
    for key, kept in names.items():
        _, key, value = state[key]
        if kept in seen or not hasattr(value, "shape"):  # extra state is not a tensor
            continue
        seen.add(kept)
        try:
            spec = describe(value)
        except FastemaError as error:
            raise CheckpointError(f"{key} cannot be written: {error}") from None
        if kept in entries:
            entry = entries[kept]
            found.add(key, entry.spec, spec.kind, partial(_read_rounded_piece, entry, spec.dtype))
        else:
            found.add(key, spec, spec.kind, partial(_plain, part_of(value)))
    return found


def _plain(array: Any, piece: tuple[slice, ...]) -> Any:
    """Return a piece of an array, row-major in host memory."""
    return row_major_on_host(array[piece])


def _read_rounded_piece(entry: Entry, code: str, piece: tuple[slice, ...]) -> Any:
    """Return a piece of an average, rounded to the model's dtype."""
    shadow, *residual = (
        entry.parts[part][0][piece] for part in ("shadow", "residual") if part in entry.parts
    )
    spec = describe(shadow)
    if spec.dtype != code:
        half = describe(residual[0]) if residual else None
        (shadow,) = round_to_weights(
            [Pair(entry.name, spec, replace(spec, dtype=code), entry.form, half)]
        )
    return row_major_on_host(shadow)
