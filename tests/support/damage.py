"""Damaged and foreign files: headers with unexpected values at random places."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

JUNK: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: -1,
    lambda: 0,
    lambda: 1.5,
    lambda: 2**63,
    lambda: -(2**70),
    lambda: 10**30,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: "",
    lambda: "x",
    lambda: "1e308",
    lambda: "-1",
    lambda: "nan",
    lambda: "9" * 30,
    lambda: "[]",
    lambda: "{}",
    lambda: "[" * 3000,
    lambda: [],
    lambda: [[]],
    lambda: [-1, -1],
    lambda: [0, 10**30],
    lambda: [1] * 70,
    lambda: {},
    lambda: {"a": 1},
    lambda: "F16",
]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a tree together with each of its keys."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(entries):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def damage_header(header: dict[str, Any], seed: int) -> bytes:
    """Return a JSON header with one or two entries replaced, deleted or duplicated."""
    chance = random.Random(seed)
    found = copy.deepcopy(header)
    for _ in range(chance.choice([1, 1, 1, 2])):
        tree, key = chance.choice(list(places(found)))
        kind = chance.random()
        if kind < 0.15 and isinstance(tree, dict):
            del tree[key]
        elif kind < 0.3 and isinstance(tree, dict):
            tree[chance.choice(["", "x", "w", "__metadata__", "state", "\ud800"])] = tree[key]
        else:
            tree[key] = chance.choice(JUNK)()
        if not found:
            break
    text = json.dumps(found).encode()
    if chance.random() < 0.1:
        cut = bytearray(text)
        cut[chance.randrange(len(cut))] = chance.randrange(256)
        text = bytes(cut)
    return text


def replace_header(whole: bytes, text: bytes) -> bytes:
    """Return a safetensors file with its header replaced."""
    length = int.from_bytes(whole[:8], "little")
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def header_of(whole: bytes) -> dict[str, Any]:
    """Return the parsed header of a safetensors file."""
    found: dict[str, Any] = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    return found
