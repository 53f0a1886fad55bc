"""Arrays of JAX in an order of axes that was asked for."""
