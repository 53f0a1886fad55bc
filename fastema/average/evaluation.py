"""Copy an average out of its memory: into another model, new arrays or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastema.average.entries import Names
from fastema.average.matching import pair_with_model
from fastema.average.memory import Entry
from fastema.average.weights import Weights
from fastema.binding.binding import can_be_assigned
from fastema.binding.swap import round_to_weights, write_averages
from fastema.bridges.memory import allocate
from fastema.bridges.registry import describe, leaves_of
from fastema.engine.program import Program
from fastema.errors import BridgeError
from fastema.layout.group import check_pair, drop_repeated, refuse_overlap, refuse_unwritable
from fastema.layout.spec import StateEntry

__all__ = ["new_container", "new_state", "write_model"]


def write_model(container: Any, entries: Mapping[str, Entry], names: Names) -> None:
    """Overwrite a model's weights with an average, rounded to the model's dtypes."""
    pairs = drop_repeated(pair_with_model(leaves_of(container), entries, names))
    there = [pair for pair in pairs if not can_be_assigned(pair.src)]
    for pair in there:
        check_pair(pair)
        refuse_unwritable(pair.name, pair.src)
    refuse_overlap(
        [(pair.name, pair.src) for pair in there],
        [(f"average of {pair.name}", pair.dst) for pair in there],
    )
    write_averages(pairs)


def new_container(weights: Weights, index: int, entries: Mapping[str, Entry], names: Names) -> Any:
    """Return an average as new arrays, in a container like that of the weights.

    Raise a BridgeError for a module or model, which cannot be duplicated.
    """
    structure = weights.binding.model.structure
    if structure is None:
        raise BridgeError("cannot make a new module: use swapped(), or copy_to(other_module)")
    # The entries know where the averages are now, which the pairs were told at the latest update.
    pairs = [entries[p.name].pair(p.src, p.average_index) for p in weights.of(index)]
    shown = {
        pair.name: entries[pair.name].to_framework(array)
        for pair, array in zip(pairs, round_to_weights(pairs), strict=True)
    }
    order = weights.binding.model.order
    return structure.rebuild([shown[names.aliases.get(name, name)] for name in order])


def new_state(
    entries: Mapping[str, Entry], state: Mapping[str, StateEntry], named: dict[str, str]
) -> dict[str, Any]:
    """Return a model's state with an average in new tensors, rounded to the model's dtypes.

    ``named`` maps the keys of the state to names of the average.
    """
    keys = {name: key for key, name in reversed(named.items()) if name in entries}
    wanted = {name: describe(state[key].value) for name, key in keys.items()}
    # Allocate each tensor on its own, so that keeping one does not keep all of them.
    made = {name: allocate([(spec, spec.kind)])[0] for name, spec in wanted.items()}
    pairs = [
        entries[name].pair(spec, 0)._replace(name=keys[name], ring=None)
        for name, (_, spec) in made.items()
    ]
    for pair in pairs:
        check_pair(pair)
    Program({"all": pairs}).run({"all": "cast_back"})
    shown = {name: entries[name].to_framework(array) for name, (array, _) in made.items()}
    return {one.key: shown.get(named[key], one.value) for key, one in state.items()}
