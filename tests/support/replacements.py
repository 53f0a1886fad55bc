"""The lines that docs/drop-in.md gives to users of libraries without a class in fastema.compat."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"
TITLE = "## Libraries without a class here"


def read_lines(library: str) -> dict[str, str]:
    """Return our line of code for each of a library's, from the table of the page.

    There is none where the page is missing: it belongs to a checkout.
    """
    if not PAGE.exists():
        return {}
    section = PAGE.read_text(encoding="utf-8").partition(TITLE)[2].partition("\n## ")[0]
    rows = re.findall(
        rf"^\| {library}\b[^`\n]*`(.+?)`[^|]*\| `(.+?)`[^|]*\|", section, re.MULTILINE
    )
    assert rows, f"{PAGE}, {TITLE[3:]}: no line for {library}"
    return dict(rows)
