"""Pausing the garbage collector while many long-lived objects are created."""

from __future__ import annotations

import gc

from fastema.engine.blocks import BlockSteps, RestoringBlock

__all__ = ["pause_gc"]


def _rest() -> BlockSteps[None]:
    return BlockSteps(gc.disable, gc.enable if gc.isenabled() else gc.disable)


# The collector would traverse all of them again and again: nearly half of the time that it takes
# to build an average of 50,000 tensors.
pause_gc = RestoringBlock(_rest)
"""Decorator for functions that create several objects per tensor."""
