"""Check, before hatchling makes an sdist or a wheel, that the GPU kernels are there.

A release (FASTEMA_RELEASE=1, as ``make wheel`` sets it) fails without them; other builds go on, and
such a wheel compiles its GPU kernels where it is used, as a checkout does.
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
        stamp = Path(self.root, "fastema", "cubins", "stamp")
        sources = runpy.run_path(str(Path(self.root, "kernels", "stamp.py")))["source_stamp"]()
        if not stamp.exists():
            problem = "there are no compiled GPU kernels in fastema/cubins"
            if os.environ.get("FASTEMA_RELEASE"):
                raise RuntimeError(f"{problem}: make cubins")
            self.app.display_warning(f"fastema: {problem}; they will be compiled on first use")
        elif stamp.read_text(encoding="ascii") != sources:
            raise RuntimeError(
                "the GPU kernels in fastema/cubins were compiled from other sources: make cubins, "
                "or remove that folder to build without them"
            )
