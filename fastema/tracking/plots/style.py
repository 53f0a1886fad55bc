"""Style of our plots: fonts, frames and a colorblind-safe palette, on a transparent ground.

All colors have a medium brightness, so that they can be read on light and on dark pages.
"""

from __future__ import annotations

from typing import Any, Final

RAW: Final = "#cf6a17"
EMA: Final = "#2f7fd1"
SMA: Final = "#1a9873"
REPORTED: Final = "#d0528c"
INK: Final = "#737b88"
GREY: Final = "#7b8290"
EDGE: Final = "#80808099"
PALE: Final = "#80808022"

# Any: newer stubs of matplotlib require literal keys, older ones strings.
STYLE: Final[Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",  # the figure's
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture everywhere
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # keeps dollar signs in metric names
    "axes.labelcolor": GREY,
    "axes.edgecolor": EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#80808040",
    "axes.axisbelow": True,
}
