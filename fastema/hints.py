"""Suggest fastema's names for attributes and options that other libraries have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Final, NamedTuple, ParamSpec, TypeVar

from fastema.errors import OptionError

__all__ = ["check_options", "suggest_name", "suggest_option"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

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
    **dict.fromkeys(("copy_params_from_model_to_ema", "copy_from"), "build a new average"),
    "copy_params_from_ema_to_model": "use copy_to(model)",
    "updates": "use num_updates",
    "optimization_step": "use num_updates",
}
"""Suggestions for attributes that averages lack, by name."""


class _Option(NamedTuple):
    """Names that other libraries give to an option.

    Attributes
    ----------
    name : str
        Our option; empty if there is none.
    others : str
        Names of other libraries, separated by blanks.
    remark : str
        What our option means; ``{}`` stands for the other library's name.
    """

    name: str
    others: str
    remark: str = ""


_OPTIONS: Final = (
    _Option(
        "decay",
        "beta ema_beta ema_decay ema_rate decay_rate averaging_decay polyak rho ema_momentum",
        "the weight of the old average, such as 0.999; if {} is the weight of the new value, pass "
        "1 - {}",
    ),
    _Option(
        "decay",
        "alpha tau momentum mu smoothing smoothing_factor update_rate lerp_weight",
        "the weight of the old average, such as 0.999. In many libraries {} is the weight of the "
        "new value: then pass decay=1 - {}. If it is the weight of the old average, pass decay={}",
    ),
    _Option(
        "decay",
        "half_life halflife half_life_steps",
        "with a rule: decay=fastema.rules.half_life(steps)",
    ),
    _Option(
        "decay",
        "warmup warmup_steps use_warmup use_ema_warmup use_num_updates inv_gamma power min_decay"
        " max_decay schedule",
        "with a schedule of fastema.rules: decay=fastema.rules.warmup(0.999)",
    ),
    _Option(
        "update_every",
        "update_every_n_steps update_interval update_freq update_frequency update_period every"
        " every_n_steps interval step_interval frequency period ema_interval swap_every",
    ),
    _Option(
        "start_after",
        "update_after_step update_after start start_step start_iter start_epoch swa_start begin"
        " burn_in delay warmup warmup_steps",
        "the number of steps before averaging begins",
    ),
    _Option("start_after", "update_starting_at_step", "the number of steps before: {} - 1"),
    _Option(
        "shadow_dtype",
        "dtype ema_dtype average_dtype master_dtype param_dtype precision fp32 keep_fp32",
        "such as 'float32'",
    ),
    _Option(
        "buffers",
        "use_buffers include_buffers average_buffers ema_buffers copy_buffers update_buffers",
        "'copy', 'average' or 'skip'",
    ),
    _Option(
        "frozen",
        "requires_grad trainable_only only_trainable include_frozen skip_frozen",
        "'skip', 'copy' or 'average', for parameters that need no gradient",
    ),
    _Option(
        "policy",
        "exclude include ignore ignore_names ignore_startswith_names filter filter_fn skip names"
        " param_or_buffer_names_no_ema parameter_names",
        "by name pattern: policy={{'visual.*': 'skip'}}",
    ),
    _Option(
        "policy",
        "strict",
        "a tensor that is missing or new is always an error; those that may come and go are named "
        "by policy={{'adapter.*': 'skip'}}",
    ),
    _Option("zero_debias", "debias bias_correction bias_correct use_debias zero_init"),
    _Option("debias", "zero_debias bias_correction bias_correct adjust"),
    _Option(
        "offload",
        "device cpu_offload offload_to_cpu cpu on_cpu store_on_cpu host",
        "True keeps the average in host memory; ema.to(device) moves it",
    ),
    _Option(
        "into",
        "target teacher target_model target_network teacher_model ema_model averaged_model dst out",
        "a module, list or dict of your own that holds the average",
    ),
    _Option("capturable", "cuda_graph cuda_graphs graph use_graph", "True, for CUDA graphs"),
    _Option(
        "on_nonfinite",
        "skip_nan skip_nonfinite nan_policy check_finite on_nan nonfinite ignore_nan",
        "such as 'skip'",
    ),
    _Option("rounding", "stochastic stochastic_rounding round", "'stochastic' or 'nearest'"),
    _Option("seed", "random_seed generator rng"),
    _Option(
        "weights",
        "model module net network params parameters variables tree pytree",
        "the first argument",
    ),
    _Option("avg", "dst target teacher ema average shadow", "the first argument: it is written"),
    _Option("x", "src source online student model weights", "the second argument"),
    _Option(
        "window",
        "window_size size n k length num_models num_checkpoints",
        "the number of updates in the mean",
    ),
    _Option("window_size", "window size n length period", "the number of values in the mean"),
    _Option("sigma_rels", "sigma sigma_rel sigmas gamma gammas std stds", "such as (0.05, 0.10)"),
    _Option(
        "evaluate_with_average",
        "use_ema_weights validate_with_average eval_with_ema validate_original_weights"
        " evaluate_ema_weights_instead swap_on_eval",
    ),
    _Option("save_path", "filepath path weights_path"),
    _Option(
        "",
        "strict",
        "every mismatch is an error, which names the tensors: leave {} out",
    ),
    _Option("", "horizon peer_exact", "a drop-in counts as its peer does: leave {} out"),
    _Option("", "drift", "it is measured when you call ema.drift(): leave {} out"),
    _Option("", "watch", "every update checks all tensors for having moved: leave {} out"),
    _Option("", "foreach fused", "all tensors are always updated in one call: leave {} out"),
)
"""Options of other libraries. Of several entries the first one counts that the function takes."""


def suggest_option(name: str, known: Collection[str]) -> str:
    """Return a suggestion for an unknown option of a function that takes the options ``known``."""
    for option in _OPTIONS:
        if name in option.others.split() and (not option.name or option.name in known):
            remark = option.remark.format(*[name] * 3)
            use = f"use {option.name}" if option.name else ""
            return ", ".join(filter(None, (use, remark)))
    close = get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else ""


def suggest_name(name: str) -> str:
    """Return a suggestion for an attribute that averages lack; an empty string if there is none."""
    suggestion = _HINTS.get(name) or suggest_option(name, ("decay",))
    return f": {suggestion}" if suggestion else ""


def check_options(
    function: Callable[_Parameters, _Result], shared: Iterable[str] = ()
) -> Callable[_Parameters, _Result]:
    """Return a function that raises an OptionError for keyword arguments that it does not have.

    The error names the option that is meant, where other libraries have another name for it.
    ``shared`` names the options that the function takes by ``**options``.
    """
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    known = [*(name for name in names if name != "self"), *shared]
    of_class = function.__qualname__.removesuffix(".__init__")
    called = of_class if function.__name__ == "__init__" else function.__name__

    @wraps(function)
    def checked(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        for name in kwargs:
            if name not in known:
                suggestion = suggest_option(name, known)
                raise OptionError(
                    f"{called}() has no option {name!r}"
                    + (f": {suggestion}" if suggestion else f"; its options: {', '.join(known)}")
                )
        return function(*args, **kwargs)

    return checked
