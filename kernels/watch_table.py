"""The contract between host and the check before every update: its task, columns of its tables.

Task, ``int64[WORDS]``:

===============  ==================================================================================
``RECORD``       1 to fill in the rows of tensors, 0 to compare with them
``DICTS``        how many dicts there are, ``TENSORS`` how many tensors
``DICTS_AT``     addresses of their tables: so are ``ENTRIES_AT`` and ``TENSORS_AT``
``DIMS_AT``      that of the (extent, stride) pairs of all tensors
``SCRATCH_AT``   that of room for one DLTensor, or for a position, a key and a value
``DICT_NEXT``    the function ``PyDict_Next``
``DESCRIBE``     the framework's DLPack exchange function
``CLEAR_ERROR``  the function ``PyErr_Clear``
===============  ==================================================================================
"""

from __future__ import annotations

DICT = 5
"""Columns of a dict: its address, the position of its first entry that counts, the number of those,
the first of them in the entries, and whether the last of them is the dict's last."""

ENTRY = 2
"""Columns of an entry: address of the key, of the object that it must lead to; 0 for any."""

TENSOR = 6
"""Columns of a tensor: object, data address, device word, rank and dtype word, first dimension in
the list of dimensions, byte offset."""

SCRATCH_WORDS = 6

RECORD, DICTS, TENSORS = range(3)
DICTS_AT, ENTRIES_AT, TENSORS_AT, DIMS_AT, SCRATCH_AT = range(3, 8)
DICT_NEXT, DESCRIBE, CLEAR_ERROR = range(8, 11)
WORDS = 11
