"""A counter of the steps that a model's optimizer has taken."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["OptimizerSteps", "is_in_flight", "to_int", "unwrap_optimizers"]


def unwrap_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that change weights, unwrapped from loss-scaling or composite ones."""
    if hasattr(optimizer, "inner_optimizer"):
        return unwrap_optimizers(optimizer.inner_optimizer)
    if hasattr(optimizer, "optimizers"):
        return [leaf for one in optimizer.optimizers for leaf in unwrap_optimizers(one)]
    return [optimizer]


class OptimizerSteps:
    """Counts the steps that a model's optimizer has taken.

    A batch that only accumulates gradients is not a step, nor is a batch whose scaled gradients are
    not finite. An execution of several batches is several steps.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._counters: list[tuple[Any, int | None, int]] = []
        optimizer = model.optimizer
        # Search for variables by identity, since == compares their values.
        places = {id(variable): i for i, variable in enumerate(optimizer.variables)}
        for one in unwrap_optimizers(optimizer):
            counter = next(v for v in one.variables if v.name == "iteration")
            k = one.gradient_accumulation_steps or 1
            self._counters.append((counter, places.get(id(counter)), k))
        self.one_per_batch = (
            unwrap_optimizers(optimizer) == [optimizer]
            and not optimizer.gradient_accumulation_steps
            and model.steps_per_execution == 1
            and type(model).train_step is keras.Model.train_step
            and not {"train_step", "make_train_function"} & vars(model).keys()
            and type(model).make_train_function is keras.Model.make_train_function
        )
        """Whether each batch is one step, so that no counter has to be read from a device."""

    def count_steps(self) -> int:
        """Return the number of optimizer steps so far."""
        # Within an epoch on JAX, variables are empty, and the model's state has their values.
        state = getattr(self._model, "_jax_state", None) or {}
        values = None if not is_in_flight(self._model) else state.get("optimizer_variables")
        done = 0
        for counter, place, k in self._counters:
            value = counter if values is None or place is None else values[place]
            done = max(done, to_int(value) // k)
        return done


def is_in_flight(model: Any) -> bool:
    """Return whether the model's state is outside its variables, as within an epoch on JAX."""
    return bool(getattr(model, "_jax_state", None)) and not model._jax_state_synced


def to_int(value: Any) -> int:
    """Return the value of a variable or an array with one element, as an int."""
    try:
        return int(value)
    except TypeError:  # a distributed model has one copy per replica
        return int(keras.ops.convert_to_numpy(value))
