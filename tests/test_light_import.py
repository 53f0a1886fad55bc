"""`import fastema` is light: it brings in nothing but the standard library and itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastema

PROBE = """
import json, sys
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def _fresh_import(statement: str) -> set[str]:
    """Run it in a new interpreter; return the modules it brought in."""
    # The same fastema, whichever way this one was found.
    root = str(Path(fastema.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def _packages(statement: str) -> set[str]:
    return {module.split(".")[0] for module in _fresh_import(statement)}


def test_import_brings_in_nothing_heavy() -> None:
    packages = _packages("import fastema")
    assert "fastema" in packages
    assert packages - sys.stdlib_module_names - {"fastema"} == set()


def test_listing_names_brings_in_nothing_heavy() -> None:
    packages = _packages("import fastema; dir(fastema); fastema.__all__")
    assert packages - sys.stdlib_module_names - {"fastema"} == set()


def test_import_brings_in_a_handful_of_modules() -> None:
    modules = _fresh_import("import fastema")
    assert {name for name in modules if name.startswith("fastema")} == {"fastema", "fastema.lazy"}
    assert len(modules) < 40  # typing and collections are most of them


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastema.errors", {"numba", "llvmlite", "torch"}),
        ("import fastema.rules", {"numba", "llvmlite", "torch"}),
        ("import fastema.layout", {"numba", "llvmlite", "torch"}),
        ("import fastema.bridges", {"numba", "llvmlite", "torch"}),
        ("import fastema.engine.limit", {"torch"}),
        (
            "import fastema; fastema.EMA, fastema.Plan, fastema.lerp_",
            {"torch", "jax", "keras", "tensorflow", "cupy", "ml_dtypes"},
        ),
        ("import fastema; fastema.SMA, fastema.PowerEMA", {"torch", "safetensors", "rich"}),
        ("import fastema; fastema.posthoc", {"torch", "safetensors", "rich", "matplotlib"}),
        ("import fastema.checkpoint", {"torch", "safetensors"}),
        ("import fastema.torch", {"numba", "llvmlite", "rich"}),
        (
            "import fastema.tracking as t; t.SimpleMovingAverage(9).update(1.0); t.MetricSmoother",
            {"numba", "llvmlite", "torch", "matplotlib", "tensorboard"},
        ),
        ("import fastema.cli", {"numba", "llvmlite", "torch", "matplotlib", "rich", "sklearn"}),
    ],
)
def test_rooms_stay_light(statement: str, absent: set[str]) -> None:
    if statement == "import fastema.torch":
        pytest.importorskip("torch")
    packages = _packages(statement)
    assert packages & absent == set()
