"""Drop-in classes for other libraries' averages, checkpoints included: one module for each peer.

A class here has the constructor, methods, attributes and state of the peer's class, and runs on
fastema's kernels. Its docstring lists intended differences. Change the import, or leave the script
unchanged and replace the peer's classes before it runs::

    import fastema

    fastema.compat.install("timm", "diffusers")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastema.lazy import lazy_names

if TYPE_CHECKING:
    from fastema.compat import diffusers as diffusers
    from fastema.compat import ema_pytorch as ema_pytorch
    from fastema.compat import keras as keras
    from fastema.compat import lightning as lightning
    from fastema.compat import litema as litema
    from fastema.compat import swa_utils as swa_utils
    from fastema.compat import tensorflow as tensorflow
    from fastema.compat import timm as timm
    from fastema.compat import torch_ema as torch_ema
    from fastema.compat import ultralytics as ultralytics
    from fastema.compat.installation import Installation, install, installed, uninstall

__all__ = ["Installation", "install", "installed", "uninstall"]

_HOMES = {
    **dict.fromkeys(__all__, "fastema.compat.installation"),
    **{
        peer: f"fastema.compat.{peer}"
        for peer in (
            *("diffusers", "ema_pytorch", "keras", "lightning", "litema"),
            *("swa_utils", "tensorflow", "timm", "torch_ema"),
            "ultralytics",
        )
    },
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
