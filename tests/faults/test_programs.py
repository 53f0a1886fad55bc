"""Runs of the programs that kill writers and plant faults in operations."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = ("safetensors", "torch")
SEED = f"--seed={random.SystemRandom().randrange(1 << 30)}"
WRITERS = ("save", "save later", "average", "average folders", "convert")
PROGRAMS = {
    **{f"kills {one}": ["kills", one, "25", SEED] for one in WRITERS},
    "trials": ["trials", "240", SEED],
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="forks and reads Linux' /proc")
@pytest.mark.parametrize("name", PROGRAMS)
def test_random_kills_and_faults_lose_nothing(name: str) -> None:
    program, *arguments = PROGRAMS[name]
    command = [sys.executable, "-m", f"tests.faults.{program}", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
