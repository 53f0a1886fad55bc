"""How to build, update, read and save each peer's class that averages a model.

One entry serves both our class and the peer's own. It restates the peer's schedule in closed
form. ``tests/compat`` checks all entries in the same way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

Options = dict[str, Any]


def named_tensors(model: Any) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name, each once."""
    if isinstance(model, dict):
        return model
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def is_float(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def is_parameter(name: str, tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def is_saved_float(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is a float in the state dict; ``cache`` is not persistent."""
    return is_float(name, tensor) and name != "cache"


def is_trained(name: str, tensor: Tensor) -> bool:
    return is_parameter(name, tensor) and name != "frozen"


@cache
def import_timm_averages() -> Any:
    """Import timm's module of averages alone: the package requires torchvision."""
    package = find_spec("timm")
    assert package is not None
    assert package.submodule_search_locations is not None
    (folder,) = package.submodule_search_locations
    spec = spec_from_file_location("timm.utils.model_ema", f"{folder}/utils/model_ema.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _update(average: Any, model: Any, n: int) -> None:
    average.update(model)


def _update_parameters(average: Any, model: Any, n: int) -> None:
    average.update_parameters(model)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One averaging class of a peer.

    Its averages are in ``shadow_params``, in the buffers that ``m_name2s_name`` lists, or in the
    module at the attribute ``inside``.
    """

    ours: str  # name of the module in fastema.compat
    make: Callable[..., Any]  # called with the module, the model and options
    weight: Callable[..., float]  # the model's weight in update n (from 0), given the options
    schedules: dict[str, Options]  # options by name
    home: str | None = None  # the peer's own module, if it is a test dependency
    slow: Options | None = None  # options with a constant decay of 0.9998
    inside: str = "module"  # attribute with the averaged module, or empty
    averaged: Callable[[str, Tensor], bool] = is_saved_float  # others are copied
    update: Callable[[Any, Any, int], None] = _update  # called with the average, the model and n
    exact: bool = True  # the peer's own averages are within the reference's error bound
    follows: bool = True  # each update takes the model
    resumes: bool = True  # random bits continue from a loaded state
    own: bool = True  # the class is ours; otherwise it is the peer's, with our function

    def module(self, which: str = "ours") -> Any:
        """Import our module or the peer's own."""
        if which == "ours":
            return import_module(f"fastema.compat.{self.ours}")
        assert self.home is not None
        if self.home == "timm.utils.model_ema":
            return import_timm_averages()
        return import_module(self.home)

    @property
    def installed(self) -> bool:
        return self.home is not None and find_spec(self.home.partition(".")[0]) is not None

    def averages(self, average: Any, model: Any) -> dict[str, Tensor]:
        """Return the averages and the copied tensors by the model's names."""
        if hasattr(average, "shadow_params"):
            names = [name for name, _ in model.named_parameters()]
            return dict(zip(names, average.shadow_params, strict=True))
        if hasattr(average, "m_name2s_name"):
            stored = average.m_name2s_name.items()
            return {name: average.get_buffer(short) for name, short in stored}
        return named_tensors(self.averaged_module(average))

    def averaged_module(self, average: Any) -> Any:
        return getattr(average, self.inside) if self.inside else average

    def state(self, average: Any) -> Any:
        """Return the state of an average, or of its module if the class has none."""
        return (average if hasattr(average, "state_dict") else average.ema).state_dict()

    def load(self, average: Any, state: Any) -> None:
        (average if hasattr(average, "state_dict") else average.ema).load_state_dict(state)

    def convert(self, average: Any, dtype: torch.dtype) -> None:
        """Cast the averages only."""
        if hasattr(average, "shadow_params"):
            average.to(dtype=dtype)
        elif self.inside:
            getattr(average, self.inside).to(dtype)
        else:
            average.to(dtype)


def weight_by_count(n: int, decay: float, use_num_updates: bool = True) -> float:
    return 1.0 - (min(decay, (2 + n) / (11 + n)) if use_num_updates else decay)


def diffusers_weight(
    n: int,
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_ema_warmup: bool = False,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    foreach: bool = False,
) -> float:
    s = n - update_after_step
    if s <= 0:
        return 1.0
    grown = 1 - (1 + s / inv_gamma) ** -power if use_ema_warmup else (1 + s) / (10 + s)
    return 1.0 - float(max(min_decay, min(decay, grown)))


def swa_weight(n: int, kind: str, decay: float = 0.9, use_buffers: bool = False) -> float:
    return 1.0 if not n else 1 - decay if kind.startswith("ema") else 1 / (n + 1)


def constant_weight(n: int, decay: float) -> float:
    return 1 - decay


def timm_weight(
    n: int,
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_warmup: bool = False,
    warmup_gamma: float = 1.0,
    warmup_power: float = 2 / 3,
    **others: Any,
) -> float:
    s = n - update_after_step - 1
    if s <= 0:
        return 1.0
    if use_warmup:
        decay = max(min(1 - (1 + s / warmup_gamma) ** -warmup_power, decay), min_decay)
    return 1 - decay


def ema_pytorch_weight(
    n: int,
    beta: float = 0.9999,
    update_after_step: int = 100,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    min_value: float = 0.0,
    update_every: int = 1,
) -> float:
    s = n - update_after_step
    if not n or s <= 0:
        return 1.0
    return 1 - min(max(1 - (1 + s / inv_gamma) ** -power, min_value), beta)


def karras_weight(n: int, gamma: float, update_every: int = 1) -> float:
    return 1 - (1 - 1 / (n + 2)) ** (gamma + 1) if n else 1.0


def litema_weight(n: int, decay: float, use_num_upates: bool = True) -> float:
    return weight_by_count(n, float(np.float32(decay)), use_num_upates)


def swa_arguments(module: Any, kind: str, decay: float = 0.9, **options: Any) -> Options:
    """Return the arguments that give an AveragedModel one of a module's functions."""
    name, _, multi = kind.partition(" ")
    if name == "default":
        return {}
    arguments = (decay,) if name == "ema" else ()
    made = getattr(module, f"get_{name}_{'multi_' if multi else ''}avg_fn")(*arguments, **options)
    return {"multi_avg_fn" if multi else "avg_fn": made}


def _make_averaged_model(
    module: Any, model: Any, kind: str, decay: float = 0.9, use_buffers: bool = False
) -> Any:
    function = swa_arguments(module, kind, decay)
    return module.AveragedModel(model, use_buffers=use_buffers, **function)


def _make_torch_model(
    module: Any, model: Any, kind: str, decay: float = 0.9, use_buffers: bool = False
) -> Any:
    function = swa_arguments(module, kind, decay)
    return swa_utils.AveragedModel(model, use_buffers=use_buffers, **function)


def _factory_of(name: str, lists: bool = False) -> Callable[..., Any]:
    """Return a factory for a class that takes the model, or a list of its parameters."""

    def make(module: Any, model: Any, **options: Any) -> Any:
        given = list(model.parameters()) if lists else model
        return getattr(module, name)(given, **options)

    return make


TIMM = ("ModelEma", "ModelEmaV2", "ModelEmaV3")
SWA_KINDS = ("default", "ema multi", "ema", "swa multi", "swa")
DECAYS: dict[str, Options] = {f"decay {d}": {"decay": d} for d in (0.9, 0.0, 0.3, 1.0)}

PEERS: dict[str, Peer] = {
    "torch_ema": Peer(
        ours="torch_ema",
        home="torch_ema",
        make=_factory_of("ExponentialMovingAverage", lists=True),
        weight=weight_by_count,
        schedules={
            f"{'counted' if counted else 'constant'} {decay}": {
                "decay": decay,
                "use_num_updates": counted,
            }
            for decay in (0.9, 0.0, 0.5, 0.995, 1.0)
            for counted in (True, False)
        },
        slow={"decay": 0.9998, "use_num_updates": False},
        inside="",
        averaged=is_parameter,
        update=lambda average, model, n: average.update(model.parameters()),
    ),
    "diffusers": Peer(
        ours="diffusers",
        home="diffusers.training_utils",
        make=_factory_of("EMAModel", lists=True),
        weight=diffusers_weight,
        schedules={
            "all": {
                "decay": 0.9,
                "min_decay": 0.3,
                "update_after_step": 3,
                "use_ema_warmup": True,
                "inv_gamma": 2.5,
                "power": 0.75,
                "foreach": True,
            },
            "ramp": {},
            "low": {"decay": 0.5},
            "floor": {"decay": 0.9, "min_decay": 0.4},
            "constant": {"decay": 0.95, "min_decay": 0.95},
            "floor above": {"decay": 0.5, "min_decay": 0.75},
            "late": {"update_after_step": 7},
            "warmup": {"use_ema_warmup": True},
            "mean": {"use_ema_warmup": True, "power": 1, "inv_gamma": 1, "decay": 1.0},
        },
        slow={"decay": 0.9998, "min_decay": 0.9998},
        inside="",
        averaged=is_trained,
        update=lambda average, model, n: average.step(model.parameters()),
    ),
    **{
        f"swa_utils {kind}{' of buffers' if buffers else ''}": Peer(
            ours="swa_utils",
            home="torch.optim.swa_utils",
            make=_make_averaged_model,
            weight=swa_weight,
            schedules={"buffers" if buffers else "weights": {"kind": kind, "use_buffers": buffers}},
            slow={"kind": kind, "decay": 0.9998} if kind[:3] == "ema" and not buffers else None,
            averaged=is_saved_float if buffers else is_parameter,
            update=_update_parameters,
            # Theirs averages lists with a float32 weight, even in float64.
            exact=kind != "swa multi",
        )
        for buffers in (False, True)
        for kind in SWA_KINDS
    },
    **{
        f"swa_utils {kind} inside torch{' of buffers' if buffers else ''}": Peer(
            ours="swa_utils",
            make=_make_torch_model,
            weight=swa_weight,
            schedules={"only": {"kind": kind, "use_buffers": buffers}},
            slow={"kind": kind, "decay": 0.9998} if kind.startswith("ema") else None,
            averaged=is_saved_float if buffers else is_parameter,
            update=_update_parameters,
            own=False,
            resumes=kind.endswith("multi"),
        )
        for kind in SWA_KINDS[1:]
        for buffers in (False, True)
    },
    **{
        f"timm {name}": Peer(
            ours="timm",
            home="timm.utils.model_ema",
            make=_factory_of(name),
            weight=constant_weight,
            schedules=DECAYS,
            slow={"decay": 0.9998},
            inside=inside,
            resumes=False,
        )
        for name, inside in zip(TIMM, ("ema", "module", "module"), strict=True)
    },
    "timm ModelEmaV3 by step": Peer(
        ours="timm",
        home="timm.utils.model_ema",
        make=_factory_of("ModelEmaV3"),
        weight=timm_weight,
        schedules={
            "warmup": {"decay": 0.95, "use_warmup": True},
            "plain": {"decay": 0.95},
            "floor": {
                "decay": 0.95,
                "use_warmup": True,
                "warmup_gamma": 3.0,
                "warmup_power": 0.9,
                "min_decay": 0.2,
            },
            "late": {"decay": 0.95, "update_after_step": 4},
            "late warmup": {"decay": 0.95, "use_warmup": True, "update_after_step": 2},
            "one by one": {"decay": 0.95, "foreach": False},
            "float64": {"decay": 0.95, "dtype": torch.float64, "device": "cpu"},
        },
        update=lambda average, model, n: average.update(model, step=n),
    ),
    "timm ModelEmaV3 of parameters": Peer(
        ours="timm",
        home="timm.utils.model_ema",
        make=_factory_of("ModelEmaV3"),
        weight=timm_weight,
        schedules={
            "plain": {"decay": 0.95, "exclude_buffers": True},
            "warmup": {"decay": 0.95, "exclude_buffers": True, "use_warmup": True},
        },
        averaged=is_parameter,
        update=lambda average, model, n: average.update(model, step=n),
    ),
    "ema_pytorch EMA": Peer(
        ours="ema_pytorch",
        home="ema_pytorch",
        make=lambda module, model, **options: module.EMA(model, update_every=1, **options),
        weight=ema_pytorch_weight,
        schedules={
            "late": {"update_after_step": 3, "inv_gamma": 4.0, "power": 0.75},
            "floor": {"update_after_step": 5, "beta": 0.9, "min_value": 0.3},
            "early": {"update_after_step": -2, "min_value": 0.8, "beta": 0.9},
            "mean": {"update_after_step": 0, "power": 1.0, "beta": 0.99},
            "model": {"update_after_step": 0, "beta": 0.0},
        },
        slow={"update_after_step": -1, "beta": 0.9998, "min_value": 0.9998},
        inside="ema_model",
        update=lambda average, model, n: average.update(),
        exact=False,  # decays are rounded to float32
        follows=False,
    ),
    "ema_pytorch KarrasEMA": Peer(
        ours="ema_pytorch",
        home="ema_pytorch",
        make=lambda module, model, **options: module.KarrasEMA(model, update_every=1, **options),
        weight=karras_weight,
        schedules={f"gamma {gamma}": {"gamma": gamma} for gamma in (2.5, 0.0, 6.94)},
        inside="ema_model",
        update=lambda average, model, n: average.update(),
        exact=False,
        follows=False,
    ),
    "ultralytics": Peer(
        ours="ultralytics",
        make=_factory_of("ModelEMA"),
        weight=lambda n, decay=0.9999, tau=2000: 1 - decay * (1 - math.exp(-(n + 1) / tau)),
        schedules={"ramp": {"decay": 0.95, "tau": 6}, "default": {}},
        slow={"decay": 0.9998, "tau": 1e-3},
        resumes=False,
        inside="ema",
    ),
    "litema": Peer(
        ours="litema",
        make=_factory_of("LitEma"),
        weight=litema_weight,
        schedules={
            f"{'counted' if counted else 'constant'} {decay}": {
                "decay": decay,
                "use_num_upates": counted,
            }
            for decay in (0.9, 0.0, 0.5, 0.9999, 1.0)
            for counted in (True, False)
        },
        slow={"decay": 0.9998, "use_num_upates": False},
        inside="",
        averaged=is_trained,
        update=lambda average, model, n: average(model),
    ),
}
"""Keyed by our module's name and, where it has several classes, the class."""
