"""What writes memory: kernels looked up, run over tables, on threads."""
