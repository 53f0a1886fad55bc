"""Input values from an integer hash: equal on every machine, exact in every dtype, never zero."""

from functools import cache
from typing import Any

import numpy as np

FORMATS = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_DIGITS = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8}


def hash_words(name: str, step: int, size: int) -> np.ndarray:
    """Return ``size`` 64-bit words: a function of name, step and index alone (splitmix64)."""
    seed = 0xCBF29CE484222325
    for byte in f"{name} {step}".encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        words = np.uint64(seed) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


@cache
def numbers(name: str, step: int, shape: tuple[int, ...], code: str = "f32") -> np.ndarray:
    """Return odd multiples of ``2**-p`` in (-1, 1), with p the digits of the dtype ``code``.

    The array is float64, or float32 for the narrower dtypes, which hold its values exactly.
    """
    digits = _DIGITS[code]
    words = hash_words(name, step, int(np.prod(shape, dtype=int))) >> np.uint64(64 - digits)
    odd = 2 * words.astype(np.int64) + 1 - 2**digits
    values = np.ldexp(odd.astype(np.float64), -digits)
    array = values.astype(np.float64 if code == "f64" else np.float32).reshape(shape)
    array.flags.writeable = False
    return array


def integers(name: str, step: int, shape: tuple[int, ...], below: int = 100) -> np.ndarray:
    """Return integers in [1, below)."""
    words = hash_words(name, step, int(np.prod(shape, dtype=int)))
    return (words % np.uint64(below - 1) + np.uint64(1)).astype(np.int64).reshape(shape)


def array(name: str, step: int, shape: tuple[int, ...], code: str = "f32") -> np.ndarray:
    """Return a writable NumPy array of the dtype."""
    return numbers(name, step, shape, code).astype(np_dtype(code))


def np_dtype(code: str) -> Any:
    """Return NumPy's dtype; that of bfloat16 is ml_dtypes'."""
    if code == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(FORMATS[code])
