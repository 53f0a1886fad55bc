"""Kernel lookup and launches: everything that writes tensors."""
