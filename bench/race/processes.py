"""Call a function of the benchmarks in a fresh process.

``python -m bench.race.processes MODULE FUNCTION ARGUMENTS`` prints its result as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from bench.race.report import ROOT


def call_apart(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """Return what a function gives in a process of its own.

    Parameters
    ----------
    function
        Of a module, by its name there; what it returns must be JSON.
    arguments
        What JSON holds.
    environment
        Set beside the variables that are set.
    """
    command = [sys.executable, "-W", "ignore", "-m", "bench.race.processes"]
    command += [function.__module__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, name, given = sys.argv[1:]
    print("\n" + json.dumps(getattr(importlib.import_module(module), name)(*json.loads(given))))
