"""Helpers for tests across frameworks: the same numbers in each, and the expected results."""

from typing import Any

import ml_dtypes
import numpy as np
import torch

from . import reference

SHAPES = {"a": (70,), "b": (3, 5), "c": (), "d": (0, 2), "e": (129,)}
CODES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
PAIRS = [("f32", "f32"), ("f32", "bf16"), ("bf16", "f32"), ("f16", "f16")]

Arrays = dict[str, np.ndarray]


def to_torch(array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_numpy(one: Any) -> np.ndarray:
    """Convert an array or variable of any framework to NumPy."""
    if isinstance(one, torch.Tensor):
        one = one.detach().contiguous()
        if one.dtype == torch.bfloat16:
            return one.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(one.numpy() if hasattr(one, "numpy") else one)


def bytes_by_name(container: Any) -> dict[str, bytes]:
    return {name: to_numpy(one).tobytes() for name, one in container.items()}


def draw_arrays(seed: int, code: str = "f32") -> Arrays:
    generator = np.random.default_rng(seed)
    return {n: np.asarray(generator.normal(size=s)).astype(CODES[code]) for n, s in SHAPES.items()}


def to_storage(array: np.ndarray) -> np.ndarray:
    """Convert an array to the flat storage that the reference takes."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else flat


def lerp_bytes(avg: Arrays, x: Arrays, weight: float, codes: tuple[str, str]) -> dict[str, bytes]:
    """Return the bytes of the averages after one update by the reference."""
    return {
        n: reference.lerp(to_storage(avg[n]), to_storage(x[n]), weight, *codes).tobytes()
        for n in SHAPES
    }
