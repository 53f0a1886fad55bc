"""An average's state as people think of it: counters, the schedule, and tensors by part."""

from collections.abc import Mapping
from typing import Any

from fastema.average.memory import PARTS
from fastema.average.state import HEADER, join_state, split_state


def nested(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header's entries, and a list with a dict of tensors for each average by part."""
    header, parts = split_state(state)
    return header | {part: [of[i] for i in sorted(of)] for part, of in parts.items()}


def flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`nested`."""
    header = {name: one for name, one in state.items() if name not in PARTS}
    return join_state(header, {part: state[part] for part in PARTS if part in state})


def is_state(found: Any) -> bool:
    """Return whether this is the state of an average."""
    return isinstance(found, Mapping) and HEADER in found
