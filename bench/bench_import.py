"""How long until the first update: importing, compiling, and finding compiled code on disk.

Each figure comes from fresh processes. ``python -m bench.bench_import [--quick]`` prints JSON rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.clock import spread

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Start:
    """One figure: the time of `timed`, after `untimed`, in a fresh process."""

    name: str
    timed: str
    untimed: str = ""
    compiles: bool = False


_ARRAYS = "import numpy as np; a, x = np.ones(1000, 'f4'), np.zeros(1000, 'f4')"
_MODEL = "import torch; model = torch.nn.Linear(100, 100)"

STARTS = (
    Start("import numpy", "import numpy"),
    Start("import numba", "import numba"),
    Start("import fastema", "import fastema"),
    Start(
        "import fastema, first lerp_ of NumPy arrays",
        f"{_ARRAYS}\nimport fastema; fastema.lerp_([a], [x], 0.1)",
        compiles=True,
    ),
    Start(
        "import fastema, EMA(model), first update, f32; torch imported before",
        "import fastema; fastema.EMA(model).update()",
        untimed=_MODEL,
        compiles=True,
    ),
    Start(
        "import fastema, EMA(model), first update, bf16 model, f32 average; torch imported before",
        "import fastema; fastema.EMA(model, shadow_dtype=torch.float32).update()",
        untimed=f"{_MODEL}.bfloat16()",
        compiles=True,
    ),
)


def seconds(start: Start, cache: Path) -> float:
    """Return the time of one start in a fresh process that caches compiled code in `cache`."""
    code = (
        f"import time\n{start.untimed}\nbegin = time.perf_counter()\n"
        f"{start.timed}\nprint(time.perf_counter() - begin)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def _row(start: Start, cache: str | None, times: list[float]) -> dict[str, object]:
    p20, p80 = spread(times)
    return {
        "what": start.name,
        "cache": cache,
        "rounds": len(times),
        "median_ms": median(times) * 1e3,
        "p20_ms": p20 * 1e3,
        "p80_ms": p80 * 1e3,
    }


def measure(rounds: int) -> list[dict[str, object]]:
    """Return one row per start, two (cold and warm) where it compiles.

    Parameters
    ----------
    rounds
        Processes per row. A cold start finds an empty cache folder, the warm start after it what
        the cold one left there. One untimed process comes first of all, so that the files of the
        imported packages are in memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        seconds(STARTS[-1], Path(folder))
    rows = []
    for start in STARTS:
        cold, warm = [], []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                if start.compiles:
                    cold.append(seconds(start, Path(folder)))
                warm.append(seconds(start, Path(folder)))
        if start.compiles:
            rows += [_row(start, "cold", cold), _row(start, "warm", warm)]
        else:
            rows.append(_row(start, None, warm))
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(rounds=1 if "--quick" in sys.argv[1:] else 5), indent=1))
