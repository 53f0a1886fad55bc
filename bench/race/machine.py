"""The provenance of a result: machine, versions, command, date and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.race.report import ROOT

COMMIT = "FASTEMA_COMMIT"
"""Environment variable with the commit, for a copy of a checkout that has no ``.git``."""

PACKAGES = ("numpy", "numba", "torch", "torch-ema", "ema-pytorch", "timm", "diffusers")


def cpu_model() -> str:
    """Return the name of the CPU as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python, fastema and those of `packages` that are installed."""
    import fastema

    found = {"python": platform.python_version(), "fastema": fastema.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the commit, with ``+`` if the checkout has changes.

    A copy without ``.git`` has the commit that `COMMIT` names in the environment, or an empty one:
    git would find the repository of a folder above it.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get(COMMIT, "")

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def header(command: str, quick: bool, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Return the header of a result: machine, threads, versions, command, date, commit."""
    import torch

    import fastema

    return {
        "quick": quick,
        "command": command,
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": {"torch": torch.get_num_threads(), "fastema": fastema.get_num_threads()},
        "versions": versions(packages),
    }
