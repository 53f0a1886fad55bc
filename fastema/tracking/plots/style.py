"""Style of our plots: fonts, frames and a colorblind-safe palette."""

from __future__ import annotations

from typing import Any, Final

RAW: Final = "#e07b27"
EMA: Final = "#1b5fa6"
SMA: Final = "#199e77"
REPORTED: Final = "#b0306a"
INK: Final = "#20242a"
GREY: Final = "#6b7280"
PALE: Final = "#f2f4f7"

# Any: newer stubs of matplotlib require literal keys, older ones strings.
STYLE: Final[Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture everywhere
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # keeps dollar signs in metric names
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#b6bcc4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e3e7ec",
    "axes.axisbelow": True,
}
