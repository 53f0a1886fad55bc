"""OptimizerSteps of a model's optimizer."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["OptimizerSteps", "in_flight", "inner", "whole_number"]


def inner(optimizer: Any) -> list[Any]:
    """The optimizers that change weights: those within one that scales losses, or of several."""
    if hasattr(optimizer, "inner_optimizer"):
        return inner(optimizer.inner_optimizer)
    if hasattr(optimizer, "optimizers"):
        return [leaf for one in optimizer.optimizers for leaf in inner(one)]
    return [optimizer]


class OptimizerSteps:
    """Counts the steps that a model's optimizer has taken.

    A batch that only adds to accumulated gradients is none, nor one whose scaled gradients were not
    finite; an execution of several batches is several.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._counters: list[tuple[Any, int | None, int]] = []
        optimizer = model.optimizer
        # Lists of variables are searched by identity: == of variables is that of their values.
        places = {id(variable): i for i, variable in enumerate(optimizer.variables)}
        for one in inner(optimizer):
            counter = next(v for v in one.variables if v.name == "iteration")
            k = one.gradient_accumulation_steps or 1
            self._counters.append((counter, places.get(id(counter)), k))
        self.one_per_batch = (
            inner(optimizer) == [optimizer]
            and not optimizer.gradient_accumulation_steps
            and model.steps_per_execution == 1
            and type(model).train_step is keras.Model.train_step
            and not {"train_step", "make_train_function"} & vars(model).keys()
            and type(model).make_train_function is keras.Model.make_train_function
        )
        """Whether each batch is a step: a counter need not be fetched from a device then."""

    def done(self) -> int:
        """OptimizerSteps so far."""
        # In an epoch of the JAX backend the variables are empty, and their values on the way.
        state = getattr(self._model, "_jax_state", None) or {}
        values = None if not in_flight(self._model) else state.get("optimizer_variables")
        done = 0
        for counter, place, k in self._counters:
            value = counter if values is None or place is None else values[place]
            done = max(done, whole_number(value) // k)
        return done


def in_flight(model: Any) -> bool:
    """Whether the model's state is not in its variables, as within an epoch of the JAX backend."""
    return bool(getattr(model, "_jax_state", None)) and not model._jax_state_synced


def whole_number(value: Any) -> int:
    """The whole number in a variable or an array of one element."""
    try:
        return int(value)
    except TypeError:  # of a distributed model, which has a copy of it for each replica
        return int(keras.ops.convert_to_numpy(value))
