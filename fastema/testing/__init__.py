"""What tests and benchmarks share: shape inventories of real models and reference results."""
