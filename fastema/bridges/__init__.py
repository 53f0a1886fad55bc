"""Foreign arrays described for fastema: one module per framework, the same few names in each.

================================  ================================================================
``owns(obj)``                     whether this framework's array
``describe(array)``               its :class:`~fastema.layout.spec.TensorSpec`, as it is now
``zeros(length, code, device)``   a new flat array
``alias(array)``                  another array object of the same memory
``view(flat, offset, shape, strides)``  a tensor within a flat array, sharing its memory
``transfer(array, device)``       the array on a device
``native(code)``                  the framework's dtype object of a code, ``code(native)`` back
``written(arrays)``               tells the framework that fastema wrote these
``walk(container)``               the leaves of a container class of its own, or None
================================  ================================================================

No framework is imported before one of its objects is seen.
"""
