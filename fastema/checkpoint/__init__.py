"""Averages in files: safetensors, written whole or not at all, read as they lie on disk."""
