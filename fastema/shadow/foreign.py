"""Recognize the checkpoints of other libraries, and name the call that reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from fastema.bridges.memory import bytes_of, row_major_on_host
from fastema.errors import FastemaError
from fastema.shadow.store import PARTS

__all__ = ["explain_foreign_state", "library_of", "unflatten_state"]

_PLAIN: Final = "state"
"""Name of the file's tensor that holds the state's plain values, as JSON."""

_TENSOR: Final = re.compile(rf"({'|'.join(PARTS)})\.(\d+)\.(.+)", re.DOTALL)


def unflatten_state(state: Any) -> Any:
    """Return the state dict in a fastema file that ``safetensors.torch.load_file`` has read.

    Anything else is returned unchanged.
    """
    if not isinstance(state, Mapping) or _PLAIN not in state or not _is_flat(state):
        return state
    try:
        found: Any = json.loads(bytes(bytes_of(row_major_on_host(state[_PLAIN]))))
        parts: dict[str, dict[int, dict[str, Any]]] = {}
        for key, tensor in state.items():
            match = _TENSOR.fullmatch(key)
            if match:
                part, place, name = match.groups()
                parts.setdefault(part, {}).setdefault(int(place), {})[name] = tensor
        lists = {part: [of[i] for i in range(len(of))] for part, of in parts.items()}
        return {**found, **lists}
    except (FastemaError, ValueError, KeyError, TypeError):
        return state


def _is_flat(state: Mapping[Any, Any]) -> bool:
    names = [name for name in state if name != _PLAIN]
    return bool(names) and all(isinstance(n, str) and _TENSOR.fullmatch(n) for n in names)


_PLAIN_TYPES: Final = (Mapping, list, str, int, float)
"""Types that are neither a tensor nor a placeholder for an unread one."""


class _ForeignFormat(NamedTuple):
    """The format in which a library saves an average."""

    library: str  # its name in fastema.checkpoint; empty if the format holds no average
    keys: str  # keys that are always present
    what: str  # description for messages
    reads: str = ""  # the call that reads it, besides load_into
    prefix: str = ""  # prefix of all other keys
    flat: bool = False  # all other entries are tensors, with no dots in their names


_COMPAT: Final = "fastema.compat."

_LAYOUTS: Final = (
    _ForeignFormat(
        "torch_ema",
        "decay num_updates shadow_params",
        "the state of torch_ema's ExponentialMovingAverage",
        f"{_COMPAT}torch_ema.ExponentialMovingAverage.load_state_dict",
    ),
    _ForeignFormat(
        "diffusers",
        "optimization_step shadow_params",
        "the state of diffusers' EMAModel",
        f"{_COMPAT}diffusers.EMAModel.load_state_dict",
    ),
    _ForeignFormat(
        "lightning",
        "averaging_state current_model_state state_dict",
        "a checkpoint of Lightning with an average",
        f"Trainer.fit(ckpt_path=...) with {_COMPAT}lightning.WeightAveraging",
    ),
    _ForeignFormat(
        "", "pytorch-lightning_version", "a checkpoint of Lightning", "Trainer.fit(ckpt_path=...)"
    ),
    _ForeignFormat(
        "ema_pytorch",
        "initted step",
        "the state of ema_pytorch's EMA",
        f"{_COMPAT}ema_pytorch.EMA.load_state_dict",
    ),
    _ForeignFormat(
        "swa_utils",
        "n_averaged",
        "the state of torch's AveragedModel",
        f"{_COMPAT}swa_utils.AveragedModel.load_state_dict",
        "module.",
    ),
    _ForeignFormat(
        "mmengine",
        "steps",
        "the state of an average of MMEngine",
        prefix="module.",
    ),
    _ForeignFormat(
        "timm",
        "state_dict_ema",
        "a checkpoint of timm",
        f"{_COMPAT}timm.ModelEma(model, resume=path)",
    ),
    _ForeignFormat("nemo", "ema current_step every_n_steps", "a checkpoint of NeMo's EMAOptimizer"),
    _ForeignFormat(
        "ultralytics", "ema updates", "a checkpoint of Ultralytics", f"{_COMPAT}ultralytics.load"
    ),
    _ForeignFormat("composer", "ema_model", "the state of Composer's EMA"),
    _ForeignFormat("d2go", "ema_state", "a checkpoint of D2Go"),
    _ForeignFormat(
        "litema",
        "decay num_updates",
        "the state of Stable Diffusion's LitEma",
        f"{_COMPAT}litema.LitEma.load_state_dict",
        flat=True,
    ),
    _ForeignFormat(
        "timm",
        "",
        "a model's state with the names of a wrapper: timm's ModelEmaV2 and ModelEmaV3, or "
        "DataParallel",
        f"{_COMPAT}timm.ModelEmaV3.load_state_dict",
        "module.",
    ),
)
"""Known formats; the first that fits wins."""


def explain_foreign_state(state: Any) -> str:
    """Return a message that says why an object is not a fastema state, and which call reads it."""
    lacks = "it is not a fastema state dict"
    if not isinstance(state, Mapping) or not state:
        return lacks
    if _is_flat(state):
        return (
            f"{lacks}, but the tensors of one without its plain values, as a generic reader of the "
            "file returns: read it with fastema.checkpoint.load_state(path, like=ema.shadow)"
        )
    inside = [name for name, one in state.items() if isinstance(one, Mapping) and "format" in one]
    for name in inside:
        if state[name]["format"] == "fastema":
            return f"{lacks}, but holds one: load the entry {name!r}"
    for layout in _LAYOUTS:
        if _fits(state, layout):
            reads = f", which {layout.reads} reads" if layout.reads else ""
            return (
                f"{lacks}, but {layout.what}{reads}; "
                "fastema.checkpoint.load_into(ema, path) reads a file in this format"
            )
    if all(isinstance(name, str) and hasattr(one, "shape") for name, one in state.items()):
        return (
            f"{lacks}, but tensors by name, like a model's state: load it into the model, and "
            "build a new average, which begins with these weights"
        )
    return lacks


def library_of(state: Mapping[Any, Any]) -> str:
    """Return the library whose format a mapping has; an empty string if it is unknown."""
    return next((layout.library for layout in _LAYOUTS if _fits(state, layout)), "")


def _is_flat_tensor(name: str, value: Any) -> bool:
    return not name or ("." not in name and not isinstance(value, _PLAIN_TYPES))


def _fits(state: Mapping[Any, Any], layout: _ForeignFormat) -> bool:
    keys = layout.keys.split()
    others = [name for name in state if name not in keys]
    return (
        all(key in state for key in keys)
        and (not layout.prefix or bool(others))
        and all(isinstance(name, str) and name.startswith(layout.prefix) for name in others)
        and (not layout.flat or all(_is_flat_tensor(name, state[name]) for name in others))
    )
