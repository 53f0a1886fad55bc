"""Bridges to frameworks: one module per framework, with the same function names in each.

======================================  ==========================================================
``owns(obj)``                           return whether an object is an array of this framework
``describe(array)``                     return its current
                                        :class:`~fastema.layout.spec.TensorSpec`
======================================  ==========================================================

A framework whose arrays can hold averages also has

======================================  ==========================================================
``zeros(length, code, device)``         allocate a flat array
``view(flat, offset, shape, strides)``  return a view into a flat array
``alias(array)``                        return another array object that shares the memory
``transfer(array, device)``             return the array on a device
``native(code)``                        return the framework's dtype object for a code
======================================  ==========================================================

and the others have

======================================  ==========================================================
``MEMORY``                              the bridge whose arrays hold averages of these arrays
``to_framework(memory)``                return an array of this framework with a copy of an
                                        average, where users do not get a view of it
======================================  ==========================================================

Optional names are

======================================  ==========================================================
``walk(container)``                     return the leaves of the framework's own containers, or
                                        None for any other object
``code(dtype)``                         return the code of the framework's dtype object
``scalar(array)``                       return the number in a one-element array, or a function
                                        that reads it later if reading would wait for a device
``notify_write(arrays)``                notify the framework that fastema wrote these arrays
``Versions(arrays)``                    version counters of arrays that hold other contents for a
                                        while: ``begin()``, ``written()``, ``end(put_back=)``
``refuse_emptied(names, total)``        refuse float tensors of shape (0,) whose elements may lie
                                        elsewhere
``never_changes(array)``                return whether an array is immutable
``finder(specs, arrays)``               return a function that locates arrays that move, see
                                        :mod:`fastema.bridges.moving`
``state_of(module)``                    return the entries of a module's state dict, each with
                                        its name in fastema and its key without wrappers
``part_of``, ``is_divided``,            functions for arrays that are sharded over processes, see
``gather``, ``ranks_of``, ``reshard``, ``world_of``   :mod:`fastema.bridges.registry`
``value(holder)``,                      return, and replace, the array in a variable that gets a
``assign(holder, array)``               new array whenever it changes
======================================  ==========================================================

All of them raise a ``DTypeError`` for a dtype without a kernel, a ``BridgeError`` for an array that
cannot be described or used, and a ``DeviceError`` for a device that the framework cannot use. A
framework is imported only once one of its objects is seen. Arrays of other frameworks are read
through DLPack, if they support it.
"""
