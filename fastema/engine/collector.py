"""The garbage collector, resting while many objects are made that all stay."""

from __future__ import annotations

import gc

from fastema.engine.blocks import RestoringBlock, Steps

__all__ = ["uncollected"]


def _rest() -> Steps[None]:
    return Steps(gc.disable, gc.enable if gc.isenabled() else gc.disable)


# It would look through all of them again and again: nearly half of the time of an average of
# 50,000 tensors.
uncollected = RestoringBlock(_rest)
"""Decorator of what makes several objects per tensor."""
