"""The contract between host and the check before every update: its task and its tables.

Task, ``int64[WORDS]``:

===============  ==================================================================================
``RECORD``       1 to fill in the rows of tensors, 0 to compare with them
``DICTS``        number of dicts; ``TENSORS`` is the number of tensors
``DICTS_AT``     address of the table of dicts; ``ENTRIES_AT`` and ``TENSORS_AT`` are those of the
                 other tables
``DIMS_AT``      address of the (extent, stride) pairs of all tensors
``SCRATCH_AT``   address of scratch memory for one DLTensor, or for a position, a key and a value
``DICT_NEXT``    address of the function ``PyDict_Next``
``DESCRIBE``     address of the framework's DLPack exchange function
``CLEAR_ERROR``  address of the function ``PyErr_Clear``
===============  ==================================================================================
"""

from __future__ import annotations

DICT = 5
"""Columns of a dict: its address, the position of its first checked entry, the number of checked
entries, the row of the first one in the entries, and whether the last one ends the dict."""

ENTRY = 2
"""Columns of an entry: address of the key, and of the required value; 0 for any value."""

TENSOR = 6
"""Columns of a tensor: object, data address, device word, rank and dtype word, index of its first
dimension in the list of dimensions, byte offset."""

SCRATCH_WORDS = 6

RECORD, DICTS, TENSORS = range(3)
DICTS_AT, ENTRIES_AT, TENSORS_AT, DIMS_AT, SCRATCH_AT = range(3, 8)
DICT_NEXT, DESCRIBE, CLEAR_ERROR = range(8, 11)
WORDS = 11
