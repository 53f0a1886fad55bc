"""Memory and race checks with NVIDIA's compute-sanitizer, where it is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastema

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

ROOT = Path(fastema.__file__).parents[1]

SCRIPT = """
import sys
import torch
import fastema

device = sys.argv[1]

def tensors(dtype):
    base = torch.randn(9_000, device=device).to(dtype)
    return {"whole": torch.randn(70_001, device=device).to(dtype), "odd": base[3:1_000],
            "gaps": base[1_001::2], "one": base[1_000:1_001]}

for dtype, options in (
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"shadow_dtype": "float32"}),
    (torch.bfloat16, {"shadow_dtype": "bf16+16", "on_nonfinite": "skip"}),
    (torch.float16, {"decay": (0.9, 0.99)}),
):
    weights = tensors(dtype)
    ema = fastema.EMA(weights, **options)
    for _ in range(2):
        ema.update()
    with ema.swapped(which=0):
        pass
    ema.state_dict()
sma = fastema.SMA(tensors(torch.float32), 2)
for _ in range(5):
    sma.update()
print("done", float(sma.shadow["odd"].sum().isfinite()))
"""


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, or None if it is not installed."""
    context = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{context}/bin{os.pathsep}{context}/compute-sanitizer"
    )


def run_or_skip(command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command; skip the test if it takes too long."""
    # Without PyTorch's memory pool, an access beside a tensor is out of bounds.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{command[0]} did not end within {limit_s:.0f} s")


def test_the_script_runs_on_its_own(device: torch.device) -> None:
    done = run_or_skip([sys.executable, "-c", SCRIPT, str(device)], 120.0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done", "1.0"]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_reports_no_error(gpu: torch.device, tool: str) -> None:
    path = find_sanitizer()
    if path is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [path, "--tool", tool, "--error-exitcode", "86"]
    if tool == "memcheck":  # torch asks the driver what may fail, and handles that it does
        command += ["--report-api-errors", "no"]
    done = run_or_skip([*command, sys.executable, "-c", SCRIPT, str(gpu)], 60.0)
    said = done.stdout + done.stderr
    if "not supported" in said.lower() and "done" not in said:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, said[-4_000:]
    assert "done 1.0" in said
