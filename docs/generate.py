"""Write what docs/drop-in.md says of differences from the docstrings of fastema.compat.

``python docs/generate.py`` writes the table between its markers; ``--check`` only says whether it
is up to date.
"""

from __future__ import annotations

import ast
import re
import sys
from difflib import unified_diff
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "drop-in.md"
START, END = "<!-- differences:start -->", "<!-- differences:end -->"

PEERS = {
    "swa_utils": "`AveragedModel`",
    "timm": "timm",
    "torch_ema": "torch_ema",
    "ema_pytorch": "ema_pytorch",
    "diffusers": "diffusers",
    "lightning": "Lightning",
    "keras": "Keras",
    "litema": "`LitEma`",
    "ultralytics": "ultralytics",
}
"""Modules of fastema.compat, in the order of the table, and what it calls the peer."""

_DIFFERENCE = re.compile(r"^- Theirs: (.+?); here: (.+?)\.$", re.MULTILINE)


def _parsed(module: str) -> ast.Module:
    path = ROOT / "fastema" / "compat" / module
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def differences(module: str) -> list[tuple[str, str]]:
    """Read what the docstring of a module says of theirs, and of ours."""
    text = ast.get_docstring(_parsed(module)) or ""
    joined = re.sub(r"\n +", " ", text.partition("Where it differs:")[2])
    return [(theirs, ours) for theirs, ours in _DIFFERENCE.findall(joined)]


def introduction(module: str) -> str:
    """Read the docstring of a module up to its notes."""
    return (ast.get_docstring(_parsed(module)) or "").partition("\nNotes\n")[0].strip()


def public(module: str) -> list[str]:
    """Read the names in a module's ``__all__`` that are ours."""
    theirs: set[str] = set()
    nodes = [*ast.walk(_parsed(module))]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("fastema"):
            theirs |= {one.name for one in node.names}
    for node in nodes:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if name not in theirs]
    raise ValueError(f"{module} has no __all__")


def installable() -> set[str]:
    """Read which peers ``fastema.compat.install`` knows."""
    for node in _parsed("installation").body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_KNOWN":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise ValueError("installation.py has no _KNOWN")


def table() -> str:
    """Make the table of all differences."""
    lines = ["| peer | theirs | ours |", "|---|---|---|"]
    for module, peer in PEERS.items():
        for number, (theirs, ours) in enumerate(differences(module)):
            cells = f"{theirs} | {ours}".replace("``", "`")
            lines.append(f"| {'' if number else peer} | {cells} |".replace("|  |", "| |"))
    return "\n".join(lines)


def page(text: str) -> str:
    """Put the table between the markers of a page."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write the page, or with ``--check`` return 1 if it is out of date."""
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if "--check" in arguments:
        lines = old.splitlines(), new.splitlines()
        print(*unified_diff(*lines, "docs/drop-in.md", "docstrings", lineterm=""), sep="\n")
        print("up to date" if new == old else "python docs/generate.py writes it")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
