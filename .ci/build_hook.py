"""Include compiled kernels in an sdist or a wheel, and check that they are there.

A release (FASTEMA_RELEASE=1, set by ``make wheel``) fails without them. With FASTEMA_RELEASE=cpu
(``make wheel-cpu``) a wheel gets CPU kernels alone, and the tag of the platform that they are for.
Other builds continue without; such a wheel compiles its kernels at first use, like a checkout.
"""

import os
import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The oldest Linux that Numba's wheels run on; the kernels themselves call no library.
CPU_TAG = "py3-none-manylinux_2_17_x86_64"


class KernelsHook(BuildHookInterface):
    """Refuse kernels that were compiled from other sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See hatchling."""
        if version == "editable":
            return
        release = os.environ.get("FASTEMA_RELEASE")
        sources = runpy.run_path(str(Path(self.root, "kernels", "stamp.py")))["source_stamp"]()
        for device in ("cpu",) if release == "cpu" else ("cpu", "gpu"):
            place = f"fastema/compiled/{device}"
            stamp = Path(self.root, place, "stamp")
            build_data["artifacts"].append(f"/{place}")
            if not stamp.exists():
                problem = f"there are no compiled kernels in {place}"
                if release:
                    raise RuntimeError(f"{problem}: make compiled")
                self.app.display_warning(f"fastema: {problem}; they will be compiled on first use")
            elif stamp.read_text(encoding="ascii") != sources:
                raise RuntimeError(
                    f"the kernels in {place} were compiled from other sources: make compiled, "
                    "or remove that folder to build without them"
                )
        if release == "cpu" and self.target_name == "wheel":
            build_data["tag"] = CPU_TAG
            build_data["pure_python"] = False
