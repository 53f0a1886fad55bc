"""Turn what a case returns into stored values: a flat mapping of paths to strings and numbers.

A tensor becomes ``dtype shape: values``: all values of a small one; of a longer one the first and
a digest of all bits. Decimals are the shortest that give back the same bits.
"""

import dataclasses
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from ..support.states import is_state, nested

ROOT = Path(__file__).parents[2]
SMALL, FIRST = 6, 3
_SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_MASKS = (
    (re.compile(r"0x[0-9a-fA-F]{4,}"), "<address>"),
    (re.compile(re.escape(str(ROOT)) + r"[^\s'\",:)]*"), "<project>"),
    (re.compile(r"/[^\s'\",:)]*site-packages[^\s'\",:)]*"), "<package>"),
    (re.compile(r"\b\d+\.\d+\.\d+[\w.+]*"), "<version>"),
)


def flatten(value: Any, whole: bool = False) -> dict[str, Any]:
    """Return the stored values of an object by path; ``whole``: all values of every tensor."""
    found: dict[str, Any] = {}
    _walk(value, "", found, whole)
    return found


def _walk(value: Any, path: str, found: dict[str, Any], whole: bool) -> None:
    if is_state(value):
        value = nested(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        value = {"type": type(value).__name__, **fields}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    array = _as_array(value)
    if array is not None:
        found[path] = format_array(array, whole)
    elif isinstance(value, Mapping) or hasattr(value, "items"):
        items = list(value.items())
        if not items:
            found[path] = "{}"
        for key, item in items:
            _walk(item, f"{path}/{mask(str(key))}" if path else mask(str(key)), found, whole)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if all(isinstance(one, bool | int | float | str | None) for one in value):
            found[path] = "[" + ", ".join(str(_plain(one)) for one in value) + "]"
        else:
            for index, item in enumerate(value):
                _walk(item, f"{path}/{index}" if path else str(index), found, whole)
    elif isinstance(value, Set):
        found[path] = "{" + ", ".join(sorted(mask(str(one)) for one in value)) + "}"
    else:
        found[path] = _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {mask(str(value))}"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bytes):
        return f"bytes {len(value)} #{hashlib.sha256(value).hexdigest()[:12]}"
    if isinstance(value, type):
        return f"<class {value.__name__}>"
    return mask(value if isinstance(value, str) else repr(value))


def mask(text: str) -> str:
    """Replace what differs between machines: temporary folders, addresses, paths, versions."""
    for root in (os.path.realpath(tempfile.gettempdir()), tempfile.gettempdir()):
        text = re.sub(re.escape(root) + r"/[^/\s'\",:)]+", "<folder>", text)
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


def _as_array(value: Any) -> np.ndarray | None:
    """Return the values of any framework's array, bfloat16 as ml_dtypes' array; None for others."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    kind = type(value)
    module = kind.__module__.partition(".")[0]
    if module == "torch" or hasattr(value, "untyped_storage"):
        import torch

        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            if value.dtype == torch.bfloat16:
                import ml_dtypes

                return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()
    if module in ("jaxlib", "jax", "tensorflow", "keras") and hasattr(value, "dtype"):
        if module == "keras" and hasattr(value, "value"):
            value = value.value
            return _as_array(value)
        return np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    return None


def format_array(array: np.ndarray, whole: bool = False) -> str:
    """Return ``f32 (2,3): 0.1 0.2 ...`` with a digest if not all values are shown."""
    name = _SHORT.get(array.dtype.name, array.dtype.name)
    head = f"{name} ({','.join(map(str, array.shape))})"
    flat = np.ascontiguousarray(array).reshape(-1)
    shown = flat if whole or flat.size <= SMALL else flat[:FIRST]
    text = f"{head}: " + " ".join(_digits(one) for one in shown)
    if shown.size == flat.size:
        return text.rstrip(" ")
    return f"{text} ... #{_digest(flat)}"


def _digits(value: Any) -> str:
    if isinstance(value, np.float64 | np.float32 | np.float16):
        return str(value)
    if value.dtype.kind in "fV":  # bfloat16: the decimals of its exact float32
        return str(np.float32(value))
    return str(value)


def _digest(flat: np.ndarray) -> str:
    if flat.dtype.kind in "fc" or flat.dtype.name == "bfloat16":
        flat = np.where(flat != flat, np.array(np.nan, flat.dtype), flat)  # any NaN is one NaN
    return hashlib.sha256(flat.tobytes()).hexdigest()[:12]


def attempt(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return error


def is_close(stored: Any, now: Any, rtol: float) -> bool:
    """Return whether two stored values agree: numbers in them within ``rtol``, else exactly."""
    if stored == now or not rtol:
        return bool(stored == now) and type(stored) is type(now)
    if isinstance(stored, str) and isinstance(now, str):
        a, b = (re.sub(r"[\[\],]", " ", one).split(" ") for one in (stored, now))
        return len(a) == len(b) and all(map(lambda x, y: _are_near(x, y, rtol), a, b))
    return _are_near(stored, now, rtol)


def _are_near(a: Any, b: Any, rtol: float) -> bool:
    try:
        return a == b or abs(float(a) - float(b)) <= rtol * max(abs(float(a)), abs(float(b)), 1e-3)
    except (TypeError, ValueError):
        return bool(a == b)
