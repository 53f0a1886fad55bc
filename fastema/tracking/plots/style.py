"""Style of our pictures: colours that all kinds of eyes can tell apart, fonts, frames."""

from __future__ import annotations

from typing import Any, Final

RAW: Final = "#e07b27"
EMA: Final = "#1b5fa6"
SMA: Final = "#199e77"
REPORTED: Final = "#b0306a"
INK: Final = "#20242a"
GREY: Final = "#6b7280"
PALE: Final = "#f2f4f7"

# Any: newer stubs of matplotlib list every key by name, older ones ask for strings.
STYLE: Final[Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in the name of a metric is one
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
