"""The classes people already use, with their checkpoints: each peer's names in a module of its own.

A class here has the constructor, the methods, the attributes and the state of the peer's, and does
its work with this package's kernels. Where it differs on purpose, its docstring says so.
"""
