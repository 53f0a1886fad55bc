"""Check that compiled kernels exist before hatchling builds an sdist or a wheel.

A release (FASTEMA_RELEASE=1, set by ``make wheel``) fails without them. Other builds continue; such
a wheel compiles its kernels at first use, like a checkout.
"""

import os
import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    """Refuse kernels that were compiled from other sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See hatchling."""
        if version == "editable":
            return
        sources = runpy.run_path(str(Path(self.root, "kernels", "stamp.py")))["source_stamp"]()
        for device in ("cpu", "gpu"):
            stamp = Path(self.root, "fastema", "compiled", device, "stamp")
            place = f"fastema/compiled/{device}"
            if not stamp.exists():
                problem = f"there are no compiled kernels in {place}"
                if os.environ.get("FASTEMA_RELEASE"):
                    raise RuntimeError(f"{problem}: make compiled")
                self.app.display_warning(f"fastema: {problem}; they will be compiled on first use")
            elif stamp.read_text(encoding="ascii") != sources:
                raise RuntimeError(
                    f"the kernels in {place} were compiled from other sources: make compiled, "
                    "or remove that folder to build without them"
                )
