"""`import fastema` is light: it imports only itself and the standard library."""

import json
import sys

import pytest

from .support.process import run_python

PROBE = """
import json, sys
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def _fresh_import(statement: str) -> set[str]:
    """Run a statement in a new interpreter, and return the modules that it imported."""
    done = run_python("-c", PROBE.format(statement=statement))
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_import_loads_few_modules_and_no_other_package() -> None:
    listed = _fresh_import("import fastema; dir(fastema); fastema.__all__")
    packages = {module.split(".")[0] for module in listed}
    assert packages - sys.stdlib_module_names == {"fastema"}
    modules = _fresh_import("import fastema")
    assert {name for name in modules if name.startswith("fastema")} == {"fastema", "fastema.lazy"}
    assert len(modules) < 40  # typing and collections are most of them


COMPILED = "numba llvmlite torch"
ABSENT = {
    "import fastema.rules.units": f"numpy {COMPILED}",
    "import fastema.layout, fastema.bridges": COMPILED,
    "import fastema.engine.limit": "torch",
    "import fastema; fastema.EMA, fastema.Plan": "torch jax keras tensorflow cupy ml_dtypes",
    "import fastema; fastema.SMA, fastema.posthoc": "torch safetensors rich",
    "import fastema.checkpoint": "torch safetensors",
    "from fastema.checkpoint.detection import known_layouts; known_layouts()": (
        "torch safetensors lightning diffusers timm"
    ),
    "import fastema.torch": "numba llvmlite rich",
    "import fastema.tracking as t; t.SimpleMovingAverage(9).update(1.0); t.MetricSmoother": (
        f"{COMPILED} matplotlib tensorboard"
    ),
    "import io; from fastema.tracking.logs import read; read(io.StringIO('a,b\\n1,2\\n'))": (
        f"{COMPILED} matplotlib tensorboard"
    ),
    "from fastema.cli import main; main([])": f"numpy {COMPILED} matplotlib rich sklearn",
}


@pytest.mark.parametrize("statement", ABSENT)
def test_subpackages_do_not_import_heavy_packages(statement: str) -> None:
    if statement == "import fastema.torch":
        pytest.importorskip("torch")
    packages = {module.split(".")[0] for module in _fresh_import(statement)}
    assert packages.isdisjoint(ABSENT[statement].split())
