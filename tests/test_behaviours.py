"""The tests that behaviours.md names exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_test_in_the_list_of_broken_behaviours_exists() -> None:
    listed = Path(__file__).with_name("behaviours.md").read_text(encoding="utf-8")
    lines = [line for line in listed.splitlines() if line.startswith("- ")]
    named = [re.search(r" `(tests/[\w/]+\.py)::(\w+)`", line) for line in lines]
    assert lines
    assert all(named), [line for line, name in zip(lines, named, strict=True) if not name]
    tests: dict[str, set[str]] = {}
    for file in {name[1] for name in named if name}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests[file] = {one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)}
    assert not [name[0] for name in named if name and name[2] not in tests[name[1]]]
