"""Writers that are killed at random moments, faults in any operation, and runs that are long."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = ("safetensors", "torch")
ROOT = Path(__file__).parents[2]
OPERATIONS = ("save", "save later", "average", "average folders", "convert")


SEED = random.SystemRandom().randrange(1 << 30)
PROGRAMS = {
    **{f"kills {one}": ["kills", one, "25", f"--seed={SEED}"] for one in OPERATIONS},
    "trials": ["trials", "500", f"--seed={SEED}"],
    "soak": ["soak", "1000", "100"],
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="forks, and reads Linux' /proc")
@pytest.mark.parametrize("name", PROGRAMS)
def test_files_stay_whole_nothing_is_lost_and_memory_stays(name: str) -> None:
    program, *arguments = PROGRAMS[name]
    command = [sys.executable, "-m", f"tests.faults.{program}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    print(done.stdout)
