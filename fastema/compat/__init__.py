"""The classes people already use, with their checkpoints: each peer's names in a module of its own.

A class here has the constructor, the methods, the attributes and the state of the peer's, and does
its work with this package's kernels. Where it differs on purpose, its docstring says so. Change the
import, or leave the script as it is and replace the peer's classes from outside::

    import fastema

    fastema.compat.install("timm", "diffusers")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fastema.compat.replacing import Installation, install, installed, uninstall

__all__ = ["Installation", "install", "installed", "uninstall"]

_PEERS: Final = {
    *("composer", "d2go", "diffusers", "ema_pytorch", "keras", "lightning", "litema", "mmengine"),
    *("nemo", "optax", "swa_utils", "tensorflow", "timm", "torch_ema", "transformers"),
    "ultralytics",
}


def __getattr__(name: str) -> Any:
    if name in _PEERS:
        return import_module(f"fastema.compat.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'fastema.compat' has no attribute {name!r}")
    return getattr(import_module("fastema.compat.replacing"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PEERS})
