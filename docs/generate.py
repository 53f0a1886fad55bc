"""Write what docs/drop-in.md says of differences from the docstrings of fastema.compat.

``python docs/generate.py`` writes the table between its markers; ``--check`` only says whether it
is up to date.
"""

from __future__ import annotations

import ast
import re
import sys
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
    "optax": "Optax",
    "litema": "`LitEma`",
    "mmengine": "mmengine",
}
"""Modules of fastema.compat, in the order of the table, and what it calls the peer."""

_DIFFERENCE = re.compile(r"^- Theirs: (.+?); here: (.+?)\.$", re.MULTILINE)


def differences(module: str) -> list[tuple[str, str]]:
    """Read what the docstring of a module says of theirs, and of ours."""
    path = ROOT / "fastema" / "compat" / module
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    joined = re.sub(r"\n +", " ", text.partition("Where it differs:")[2])
    return [(theirs, ours) for theirs, ours in _DIFFERENCE.findall(joined)]


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
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
