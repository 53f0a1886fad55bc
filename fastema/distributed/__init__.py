"""Averages of models that are divided among processes: one folder of all their parts.

:func:`fastema.EMA` itself takes such models as they are; see ``docs/sharded.md``.
"""

from fastema.distributed.consolidate import consolidate

__all__ = ["consolidate"]
