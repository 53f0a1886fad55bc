"""Subprocesses that import the same fastema as this process."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastema

ROOT = str(Path(fastema.__file__).parents[1])


def run(
    *command: object,
    environment: Mapping[str, str] | None = None,
    text: bool = True,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command and capture its output; the caller checks the exit status."""
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        capture_output=True,
        text=text,
        check=False,
        **options,
    )


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run this Python interpreter with the given arguments."""
    return run(sys.executable, *arguments, **options)
