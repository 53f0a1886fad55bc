"""Foreign arrays described for fastema: one module per framework, the same few names in each.

======================================  ==========================================================
``owns(obj)``                           whether this framework's array
``describe(array)``                     its :class:`~fastema.layout.spec.TensorSpec`, as it is now
``walk(container)``                     the leaves of a container class of its own, or None
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
``shown(memory)``                       an array of this framework with a copy of such memory,
                                        where users are not given a view of it
======================================  ==========================================================

Where it applies, there are also

======================================  ==========================================================
``code(dtype)``                         the code of the framework's dtype object
``scalar(array)``                       the number in an array of one element, or what reads it
                                        later, where reading it now would wait for a device
``written(arrays)``                     tells the framework that fastema wrote these
``Versions(arrays)``                    what the framework knows of arrays that hold other contents
                                        for a while
``never_changes(array)``                whether an array has its values for good
``finder(specs, arrays)``               finds arrays that move, see :mod:`fastema.bridges.moving`
``state_of(module)``                    what the framework saves of a module, with our names
``value(holder)``,                      what holds an array that is replaced whenever it changes:
``assign(holder, array)``               its array now, and another one for it
======================================  ==========================================================

No framework is imported before one of its objects is seen. What no module here owns is read by its
DLPack capsules, if it gives any.
"""
