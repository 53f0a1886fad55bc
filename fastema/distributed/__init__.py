"""Write sharded averages as one folder.

:func:`fastema.EMA` itself averages sharded models without any change; see ``docs/sharded.md``.
"""

from fastema.distributed.consolidate import consolidate

__all__ = ["consolidate"]
