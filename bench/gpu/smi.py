"""What nvidia-smi says of a GPU: its driver, clocks, power and temperature."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import torch

from bench.race.report import Row

TITLE = "The device"
"""Title of the table of its states."""

STATE = {
    "sm_mhz": "clocks.sm",
    "most_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "most_watts": "power.limit",
    "celsius": "temperature.gpu",
}
"""Figure -> nvidia-smi's name of it."""


def _query(device: torch.device, names: Sequence[str]) -> list[str]:
    """Return values of a GPU as text; an empty list where nvidia-smi cannot tell."""
    if device.type != "cuda":
        return []
    # Not by the index: CUDA_VISIBLE_DEVICES renumbers torch's devices, not nvidia-smi's.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = str(device.index or 0) if uuid is None else f"GPU-{uuid}"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(names)}"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    found = [one.strip() for one in done.stdout.split("\n")[0].split(",")]
    return found if len(found) == len(names) else []


def driver(device: torch.device) -> str | None:
    """Return the version of the driver, or None if it is unknown."""
    return next(iter(_query(device, ["driver_version"])), None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def state(device: torch.device, when: str) -> Row:
    """Return a row of clocks, power and temperature now."""
    values = _query(device, list(STATE.values()))
    if not values:
        return Row(TITLE, when, missing="nvidia-smi does not tell its clocks")
    return Row(TITLE, when, dict(zip(STATE, map(_number, values), strict=True)))
