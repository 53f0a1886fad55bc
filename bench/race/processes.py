"""Call a function of the benchmarks in a fresh process.

``python -m bench.race.processes MODULE FUNCTION ARGUMENTS`` prints the function's result as JSON.
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


def call_in_subprocess(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """Call a function in a fresh process and return its result.

    Parameters
    ----------
    function
        Function at the top level of a module; its result must be representable in JSON.
    arguments
        Positional arguments, representable in JSON.
    environment
        Environment variables to set in addition to this process's own.

    Raises
    ------
    subprocess.CalledProcessError
        If the function raises.
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
