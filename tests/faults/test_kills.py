"""Files that were being written when their writer was killed, at random moments."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = ("safetensors",)
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
