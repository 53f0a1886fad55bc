"""The families, their stored files, and what differs."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .cases import run_all
from .record import ROOT, is_close

STORED = Path(__file__).parent / "stored"


@dataclass(frozen=True)
class Family:
    """A module of cases, what it needs, and what the environment of its process has besides."""

    module: str
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        return [name for name in self.needs if find_spec(name) is None]

    def cases(self) -> Any:
        return importlib.import_module(f"{__package__}.families.{self.module}").CASES


_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}

FAMILIES: dict[str, Family] = {
    "averages": Family("averages", ("torch", "ml_dtypes")),
    "options": Family("options", ("torch", "ml_dtypes")),
    "swaps": Family("swaps", ("torch", "ml_dtypes")),
    "states": Family("states", ("torch", "ml_dtypes", "safetensors")),
    "plans": Family("plans", ("torch", "ml_dtypes")),
    "rules": Family("rules"),
    "tracking": Family("tracking"),
    "posthoc": Family("posthoc", ("torch", "ml_dtypes", "safetensors")),
    "frameworks": Family("frameworks", ("jax", "ml_dtypes", "torch")),
    "compat": Family("compat", ("torch", "ml_dtypes")),
    "errors": Family("errors", ("torch", "ml_dtypes")),
    "trainers": Family("trainers", ("torch", "lightning", "transformers"), _QUIET),
    "tensorflow": Family("tensorflow_", ("tensorflow",), _QUIET),
    **{
        f"keras_{backend}": Family(
            "keras_", ("keras", backend), {**_QUIET, "KERAS_BACKEND": backend}
        )
        for backend in ("torch", "jax", "tensorflow")
    },
}


def record(name: str) -> dict[str, Any]:
    """Return the values of a family's cases now, in a process of its own.

    Version counters and registered rules depend on what else the process has done.
    """
    family = FAMILIES[name]
    if os.environ.get("FASTEMA_CORPUS") == name:
        return run_all(family.cases())
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, **family.environment, "PYTHONPATH": path, "FASTEMA_CORPUS": name}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "values.json")
        command = [sys.executable, "-m", "tests.corpus", "record", name, str(out)]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{name}: the process failed\n{done.stdout}\n{done.stderr}")
        return dict(json.loads(out.read_text(encoding="utf-8")))


def load(name: str) -> dict[str, Any]:
    """Return the stored values of a family; none if it has no file yet."""
    path = STORED / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def save(name: str, values: dict[str, Any]) -> None:
    """Write a family's file, sorted, one value a line."""
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
    (STORED / f"{name}.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Difference:
    """A value that is not what the store has; None: not there."""

    case: str
    what: str
    stored: Any
    now: Any


_ABSENT = "(absent)"


def differences(name: str, now: dict[str, Any]) -> list[Difference]:
    """Return every value that differs from the stored one, missing and new cases included."""
    stored, found = load(name), []
    for one in sorted(stored.keys() | now.keys()):
        if one not in now:
            found.append(Difference(one, "the case", "is stored", "no longer exists"))
        elif one not in stored:
            found.append(Difference(one, "the case", "is not stored", "is new"))
        else:
            old, new = stored[one], now[one]
            for path in sorted(old.keys() | new.keys()):
                a, b = old.get(path, _ABSENT), new.get(path, _ABSENT)
                if not is_close(a, b, old.get("rtol", 0.0)):
                    found.append(Difference(one, path, a, b))
    return found
