"""Names of :mod:`fastema.compat.averager` until its users are rewritten."""

from fastema.compat.averager import ModelAverager as Follower
from fastema.compat.averager import duplicate

__all__ = ["Follower", "duplicate"]
