"""Foreign arrays described for fastema: one module per framework, the same few names in each.

======================================  ==========================================================
``owns(obj)``                           whether this framework's array
``describe(array)``                     its :class:`~fastema.layout.spec.TensorSpec`, as it is now
======================================  ==========================================================

Frameworks whose arrays can hold averages have

======================================  ==========================================================
``zeros(length, code, device)``         a new flat array
``view(flat, offset, shape, strides)``  a tensor within a flat array, sharing its memory
``alias(array)``                        another array object of the same memory
``transfer(array, device)``             the array on a device
``native(code)``                        the framework's dtype object of a code
======================================  ==========================================================

and the others

======================================  ==========================================================
``MEMORY``                              the bridge whose arrays hold averages of these
``to_framework(memory)``                an array of this framework with a copy of such memory,
                                        where users are not given a view of it
======================================  ==========================================================

Where it applies, there are also

======================================  ==========================================================
``walk(container)``                     the leaves of the framework's own containers, else None
``code(dtype)``                         the code of the framework's dtype object
``scalar(array)``                       the number in an array of one element, or a function that
                                        reads it later, where reading now would wait for a device
``notify_write(arrays)``                tells the framework that fastema wrote these
``Versions(arrays)``                    version counters of arrays that hold other contents for a
                                        while: ``begin()``, ``written()``, ``end(put_back=)``
``never_changes(array)``                whether an array has its values for good
``finder(specs, arrays)``               finds arrays that move, see :mod:`fastema.bridges.moving`
``state_of(module)``                    the entries of a module's state dict, with our names
``part_of``, ``is_divided``,            arrays that are divided among processes, see
``gather``, ``ranks_of``, ``reshard``, ``world_of``   :mod:`fastema.bridges.registry`
``value(holder)``,                      the array in a variable that is given another one whenever
``assign(holder, array)``               it changes, and giving it another one
======================================  ==========================================================

All of them raise a ``DTypeError`` for a dtype that has no kernel, a ``BridgeError`` for an array
that cannot be described or used, and a ``DeviceError`` for a device that the framework cannot use.
No framework is imported before one of its objects is seen. Arrays of other frameworks are read by
their DLPack capsules, if they give any.
"""
