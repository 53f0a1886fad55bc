"""Suggest fastema's name for an attribute that other libraries' averages have."""

from __future__ import annotations

from typing import Final

__all__ = ["suggest_name"]

_MODULE: Final = (
    "an average is not a module: swapped() puts it into the model, model_state_dict() is the "
    "model's state with it, also for torch.func.functional_call(model, ema.model_state_dict(), x)"
)
_TENSORS: Final = "its tensors are in ema.shadow, by name"
_MOVED: Final = "use to(), such as ema.to('cuda') or ema.to(torch.float16)"
_UPDATE: Final = "use update(), after every optimizer step"
_SWAP: Final = "use `with ema.swapped():`, or apply_shadow() and restore(), which keep the weights"

_HINTS: Final = {
    **dict.fromkeys(("module", "ema", "ema_model", "averaged_model", "model", "forward"), _MODULE),
    **dict.fromkeys(("eval", "train", "requires_grad_", "modules", "buffers"), _MODULE),
    **dict.fromkeys(("parameters", "named_parameters", "shadow_params", "averages"), _TENSORS),
    **dict.fromkeys(("cuda", "cpu", "half", "float", "double", "bfloat16"), _MOVED),
    **dict.fromkeys(("step", "update_parameters", "update_average", "update_model"), _UPDATE),
    **dict.fromkeys(("average_parameters", "ema_scope", "store", "collected_params"), _SWAP),
    **dict.fromkeys(("momentum", "alpha", "beta"), "decay is the weight of the old average"),
    **dict.fromkeys(("copy_params_from_model_to_ema", "copy_from"), "build a new average"),
    "copy_params_from_ema_to_model": "use copy_to(model)",
    "updates": "use num_updates",
    "optimization_step": "use num_updates",
}


def suggest_name(name: str) -> str:
    """Return a suggestion for an attribute that averages lack; an empty string if there is none."""
    return f": {_HINTS[name]}" if name in _HINTS else ""
