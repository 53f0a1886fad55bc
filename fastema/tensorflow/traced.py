"""Updates of averages inside a traced function."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from fastema.plan import Plan
from fastema.tensorflow.state import VariableGroup

__all__ = ["TracedUpdate"]


class TracedUpdate:
    """The update of a list of variables with the values that one traced function reads."""

    def __init__(self, entry: VariableGroup, rounding: str, seed: int) -> None:
        self._entry, self._lock = entry, threading.Lock()
        # The plan reads these dicts whenever it runs. Build it from variables, and now. Built from
        # tensors, it would keep the first ones alive, so that their variables would move. Built
        # later, it would separate variables from the tensors that were read from them.
        self._averages, self._variables = dict(entry.averages), dict(entry.variables)
        with tf.init_scope():
            self._plan = Plan(self._averages, self._variables, rounding=rounding, seed=seed)

    @contextmanager
    def bind(self, averages: list[Any], variables: list[Any]) -> Iterator[Plan]:
        """Yield the plan, which runs on these tensors within the block."""
        with self._lock:
            self._averages.update(zip(self._averages, averages, strict=True))
            self._variables.update(zip(self._variables, variables, strict=True))
            try:
                yield self._plan
            finally:
                self._averages |= self._entry.averages
                self._variables |= self._entry.variables
