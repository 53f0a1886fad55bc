"""Arrays of JAX in an order of axes that was asked for."""

from typing import Any

import jax
from jax.experimental import layout


def in_order(values: Any, order: tuple[int, ...]) -> jax.Array:
    """Values on the CPU whose axes lie in this order, the outermost first."""
    where = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    # Before JAX 0.7 both had other names: the last releases for Python 3.10.
    inner = getattr(layout, "DeviceLocalLayout", None)
    if inner is not None:
        return jax.device_put(values, layout.Layout(inner(major_to_minor=order), where))
    return jax.device_put(values, layout.Format(layout.Layout(major_to_minor=order), where))
