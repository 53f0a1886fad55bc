"""Measure the time to the first update: import, compile, or load compiled code from disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.race.durations import summarize_times
from bench.race.question import Question, Settings
from bench.race.report import ROOT, Figure, Row, Rows
from fastema.engine import native, shipped


@dataclass(frozen=True)
class Start:
    """One figure: the time of the code `timed`, after the code `untimed`, in a fresh process."""

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


COMPILED_HERE = {"NUMBA_OPT": "3"}
"""Any option of Numba makes fastema ignore the compiled code that a wheel brings."""


def seconds(start: Start, cache: Path, **environment: str) -> float:
    """Return the time in seconds of one start in a fresh process with the code cache `cache`."""
    code = (
        f"import time\n{start.untimed}\nbegin = time.perf_counter()\n"
        f"{start.timed}\nprint(time.perf_counter() - begin)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def rows(settings: Settings) -> Rows:
    """Yield one row per start, or one per state of the cache for starts that compile."""
    quick = settings.quick
    came = not quick and shipped.has_kernels("cpu") and bool(native.supported_levels())
    if not quick:  # load the packages' files into the page cache
        with tempfile.TemporaryDirectory() as folder:
            seconds(STARTS[-1], Path(folder))
    for start in (STARTS[2], STARTS[-1]) if quick else STARTS:
        times: dict[str, list[float]] = {"cold": [], "warm": [], "compiled before": []}
        for _ in range(1 if quick else 7):
            with tempfile.TemporaryDirectory() as folder:
                if start.compiles and came:
                    times["compiled before"].append(seconds(start, Path(folder)))
                if start.compiles:
                    times["cold"].append(seconds(start, Path(folder), **COMPILED_HERE))
                times["warm"].append(seconds(start, Path(folder), **COMPILED_HERE))
        for cache, found in times.items():
            if found:
                cached = cache if start.compiles else ""
                yield Row(
                    "Fresh processes", start.name, {"cache": cached, **summarize_times(found)}
                )


METHOD = """\
Each figure comes from fresh processes. A cold start finds an empty cache folder; the warm start
after it, what the cold one left there. "Compiled before" are the kernels that a wheel brings, or
`make compiled ARGS="--device cpu"` makes in a checkout: the cache is empty, and stays so."""

QUESTION = Question(
    "How long until the first update", METHOD, rows, figures={"cache": Figure("cache", str)}
)
