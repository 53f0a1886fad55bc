"""Writes memory: looks kernels up and runs them over tables, on threads."""
