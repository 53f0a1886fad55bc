"""Writers that are killed at random moments, faults in any operation, and runs that are long."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = ("safetensors", "torch")
ROOT = Path(__file__).parents[2]
OPERATIONS = ("save", "save later", "average", "average folders", "convert")


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_writers_leave_whole_files(operation: str) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    command = [sys.executable, "-m", "tests.faults.kills", operation, "25", f"--seed={seed}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    print(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_faults_in_any_operation_lose_nothing() -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    command = [sys.executable, "-m", "tests.faults.trials", "500", f"--seed={seed}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    print(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_a_long_run_takes_no_more_memory() -> None:
    command = [sys.executable, "-m", "tests.faults.soak", "1000", "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("objects of Python") == 7
