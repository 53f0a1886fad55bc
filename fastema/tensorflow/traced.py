"""The update that one traced function makes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from fastema.plan import Plan
from fastema.tensorflow.state import Entry

__all__ = ["TracedUpdate"]


class TracedUpdate:
    """The update of a list of variables by what one traced function reads of them."""

    def __init__(self, entry: Entry, rounding: str, seed: int) -> None:
        self._entry, self._lock = entry, threading.Lock()
        # The plan looks at these whenever it runs. It is made of the variables, and now: of a
        # tensor it would keep the first, so that its variable moved; and looking at a variable
        # takes it away from the tensors that were read of it.
        self._averages, self._variables = dict(entry.averages), dict(entry.variables)
        with tf.init_scope():
            self._plan = Plan(self._averages, self._variables, rounding=rounding, seed=seed)

    @contextmanager
    def on(self, averages: list[Any], variables: list[Any]) -> Iterator[Plan]:
        """The plan, for as long as it is to run on these tensors."""
        with self._lock:
            self._averages.update(zip(self._averages, averages, strict=True))
            self._variables.update(zip(self._variables, variables, strict=True))
            try:
                yield self._plan
            finally:
                self._averages |= self._entry.averages
                self._variables |= self._entry.variables
