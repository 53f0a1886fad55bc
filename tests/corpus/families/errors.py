"""Types and texts of errors of public entrances that are given bad input."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import fastema
from fastema import checkpoint, rules
from fastema.compat import diffusers, ema_pytorch, litema, swa_utils, timm, torch_ema, ultralytics

from ..cases import Cases, case
from ..record import attempt
from ..weights import Net, fill, net, values

CASES: Cases = {}


def _x(shape: Any = 3, dtype: Any = torch.float32) -> Any:
    return torch.ones(shape, dtype=dtype)


def _ema(**options: Any) -> Any:
    return fastema.EMA(net(), 0.9, **options)


CONSTRUCTION: dict[str, Callable[[], Any]] = {
    "decay 1": lambda: _ema_of(1.0),
    "decay -0.1": lambda: _ema_of(-0.1),
    "decay 2": lambda: _ema_of(2),
    "decay nan": lambda: _ema_of(float("nan")),
    "decay text": lambda: _ema_of("0.9"),
    "decay none": lambda: _ema_of(None),
    "no decays": lambda: _ema_of(()),
    "decays and text": lambda: _ema_of((0.9, "x")),
    "window rule": lambda: _ema_of(rules.window(3)),
    "zero_debias 1": lambda: _ema(zero_debias=1),
    "shadow_dtype int8": lambda: _ema(shadow_dtype="int8"),
    "shadow_dtype text": lambda: _ema(shadow_dtype="half precision"),
    "shadow_dtype number": lambda: _ema(shadow_dtype=16),
    "rounding": lambda: _ema(rounding="up"),
    "seed -1": lambda: _ema(seed=-1),
    "seed 2**63": lambda: _ema(seed=2**63),
    "seed 0.5": lambda: _ema(seed=0.5),
    "update_every 0": lambda: _ema(update_every=0),
    "update_every 1.5": lambda: _ema(update_every=1.5),
    "update_every True": lambda: _ema(update_every=True),
    "start_after -1": lambda: _ema(start_after=-1),
    "frozen": lambda: _ema(frozen="keep"),
    "buffers": lambda: _ema(buffers=True),
    "policy value": lambda: _ema(policy={"cube": "drop"}),
    "policy no match": lambda: _ema(policy={"cubes": "skip"}),
    "policy list": lambda: _ema(policy=["cube"]),
    "policy skips all": lambda: _ema(policy={"*": "skip"}),
    "on_nonfinite": lambda: _ema(on_nonfinite="ignore"),
    "drift": lambda: _ema(drift=True),
    "capturable raise": lambda: _ema(capturable=True, on_nonfinite="raise"),
    "offload": lambda: _ema(offload="cpu"),
    "beta": lambda: _ema(beta=0.9),
    "momentum": lambda: _ema(momentum=0.1),
    "warmup_steps": lambda: _ema(warmup_steps=10),
    "device": lambda: _ema(device="cpu"),
    "unknown option": lambda: _ema(colour="red"),
    "misspelt option": lambda: _ema(update_evry=2),
    "window 0": lambda: fastema.SMA(net(), 0),
    "window text": lambda: fastema.SMA(net(), "ten"),
    "ring_dtype": lambda: fastema.SMA(net(), 3, ring_dtype="int8"),
    "ring_device": lambda: fastema.SMA(net(), 3, ring_device="disk"),
    "SWA decay": lambda: fastema.SWA(net(), decay=0.9),
    "SMA of weights in two halves": lambda: fastema.SMA(net(), 3, shadow_dtype="bf16+16"),
    "sigma_rel 0": lambda: fastema.PowerEMA(net(), 0.0),
    "sigma_rel 1": lambda: fastema.PowerEMA(net(), (0.05, 1.0)),
    "sigma_rels none": lambda: fastema.PowerEMA(net(), ()),
}

WEIGHTS: dict[str, Callable[[], Any]] = {
    "none": lambda: fastema.EMA(None),
    "number": lambda: fastema.EMA(3.0),
    "text": lambda: fastema.EMA("model"),
    "empty dict": lambda: fastema.EMA({}),
    "empty list": lambda: fastema.EMA([]),
    "generator": lambda: fastema.EMA(net().parameters()),
    "optimizer": lambda: fastema.EMA(torch.optim.SGD([_x().requires_grad_()], 0.1)),
    "integers": lambda: fastema.EMA({"a": _x(dtype=torch.int64)}),
    "expanded": lambda: fastema.EMA({"a": _x(1).expand(3)}),
    "overlap": lambda: _overlap(),
    "meta": lambda: fastema.EMA({"a": torch.ones(3, device="meta")}),
    "sparse": lambda: fastema.EMA({"a": torch.eye(3).to_sparse()}),
    "quantities in a list": lambda: fastema.EMA([1.0, 2.0]),
    "read only": lambda: _read_only(),
    "float8": lambda: fastema.EMA({"a": _x().to(torch.float8_e4m3fn)}),
    "objects": lambda: fastema.EMA({"a": np.array([None, 1])}),
    "frozen model": lambda: fastema.EMA(net().requires_grad_(False)),
    "class": lambda: fastema.EMA(Net),
}


def _ema_of(decay: Any) -> Any:
    return fastema.EMA(net(), decay)


def _overlap() -> Any:
    base = torch.ones(10)
    return fastema.EMA({"a": base[:6], "b": base[4:]})


def _read_only() -> Any:
    array = np.ones(3, np.float32)
    array.flags.writeable = False
    ema = fastema.EMA({"a": array})
    ema.apply_shadow()


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "steps 0": lambda m, e: e.update(steps=0),
    "steps 1.5": lambda m, e: e.update(steps=1.5),
    "update another class": lambda m, e: e.update(nn.Linear(2, 2)),
    "update a number": lambda m, e: e.update(3),
    "swapped another class": lambda m, e: e.swapped(nn.Linear(2, 2)).__enter__(),
    "which 1": lambda m, e: e.apply_shadow(which=1),
    "which text": lambda m, e: e.apply_shadow(which="a"),
    "restore": lambda m, e: e.restore(),
    "copy_to a list": lambda m, e: e.copy_to([1]),
    "copy_to another class": lambda m, e: e.copy_to(nn.Linear(2, 2)),
    "load nothing": lambda m, e: e.load_state_dict({}),
    "load a model": lambda m, e: e.load_state_dict(m.state_dict()),
    "load none": lambda m, e: e.load_state_dict(None),
    "load schedule": lambda m, e: e.load_state_dict(e.state_dict(), schedule="theirs"),
    "state copy": lambda m, e: e.state_dict(copy="no"),
    "to int8": lambda m, e: e.to(torch.int8),
    "to twice": lambda m, e: e.to("cpu", device="cpu"),
    "to nowhere": lambda m, e: e.to("nowhere"),
    "to True": lambda m, e: e.to(True),
    "follow a number": lambda m, e: e.follow(3),
    "follow nothing": lambda m, e: e.follow(),
    "unfollow": lambda m, e: e.unfollow(),
    "attribute module": lambda m, e: e.module,
    "attribute shadow_params": lambda m, e: e.shadow_params,
    "attribute step": lambda m, e: e.step(),
    "attribute store": lambda m, e: e.store(),
    "attribute cuda": lambda m, e: e.cuda(),
    "attribute colour": lambda m, e: e.colour,
    "attribute updat": lambda m, e: e.updat(),
    "call": lambda m, e: e(_x()),
    "drift of an average that is not there": lambda m, e: e.drift(which=3),
    "averaged": lambda m, e: e.averaged(),
    "shadow assigned": lambda m, e: e.shadow.__setitem__("cube", _x()),
    "unknown name": lambda m, e: e.shadow["cubes"],
    "added": lambda m, e: _change(m, e, "added"),
    "removed": lambda m, e: _change(m, e, "removed"),
    "reshaped": lambda m, e: _change(m, e, "reshaped"),
    "dtype changed": lambda m, e: _change(m, e, "dtype"),
    "untied": lambda m, e: _change(m, e, "untied"),
    "unfrozen": lambda m, e: _change(m, e, "unfrozen"),
    "update while applied": lambda m, e: (e.apply_shadow(), e.update()),
    "applied twice": lambda m, e: (e.apply_shadow(), e.apply_shadow()),
    "load while applied": lambda m, e: (e.apply_shadow(), e.load_state_dict({})),
    "to while applied": lambda m, e: (e.apply_shadow(), e.to(torch.float64)),
    "copy_to while applied": lambda m, e: (e.apply_shadow(), e.copy_to(net())),
    "save nowhere": lambda m, e: checkpoint.save(e, "/nonexistent/folder/x.safetensors"),
    "save a model": lambda m, e: checkpoint.save(m, "x.safetensors"),
    "load_into nothing": lambda m, e: checkpoint.load_into(e, "/nonexistent.safetensors"),
}


def _change(model: Any, ema: Any, way: str) -> None:
    if way == "added":
        model.more = nn.Parameter(_x())
    elif way == "removed":
        del model.cube
    elif way == "reshaped":
        model.cube = nn.Parameter(_x(4))
    elif way == "dtype":
        model.cube.data = model.cube.data.double()
    elif way == "untied":
        model.part.tied = nn.Parameter(model.long.detach().clone())
    else:
        model.frozen.requires_grad_(True)
    ema.update()


FUNCTIONS: dict[str, Callable[[], Any]] = {
    "lerp_ weight 2": lambda: fastema.lerp_([_x()], [_x()], 2.0),
    "lerp_ weight nan": lambda: fastema.lerp_([_x()], [_x()], float("nan")),
    "lerp_ weight text": lambda: fastema.lerp_([_x()], [_x()], "1"),
    "lerp_ shapes": lambda: fastema.lerp_([_x(3)], [_x(4)], 0.5),
    "lerp_ lengths": lambda: fastema.lerp_([_x()], [_x(), _x()], 0.5),
    "lerp_ names": lambda: fastema.lerp_({"a": _x()}, {"b": _x()}, 0.5),
    "lerp_ integers": lambda: fastema.lerp_([_x(dtype=torch.int32)], [_x()], 0.5),
    "lerp_ same": lambda: (lambda t: fastema.lerp_([t], [t], 0.5))(_x()),
    "lerp_ frameworks": lambda: fastema.lerp_([_x()], [np.ones(3, np.float32)], 0.5),
    "lerp_ numbers": lambda: fastema.lerp_(1.0, 2.0, 0.5),
    "swap_ dtypes": lambda: fastema.swap_([_x()], [_x(dtype=torch.float64)]),
    "swap_ overlap": lambda: (lambda t: fastema.swap_([t[:4]], [t[2:6]]))(_x(8)),
    "copy_ shapes": lambda: fastema.copy_([_x(3)], [_x(2)]),
    "Plan rounding": lambda: fastema.Plan([_x()], [_x()], rounding="down"),
    "Plan seed": lambda: fastema.Plan([_x()], [_x()], seed=-1),
    "Plan policy": lambda: fastema.Plan(net(), net(), policy={"nothing": "skip"}),
    "mean_between": lambda: fastema.mean_between({"a": _x()}, 3, {"a": _x()}, 5),
    "mean_between names": lambda: fastema.mean_between({"a": _x()}, 5, {"b": _x()}, 3),
    "set_num_threads 0": lambda: fastema.set_num_threads(0),
    "set_num_threads text": lambda: fastema.set_num_threads("two"),
    "update_bn": lambda: fastema.update_bn([], nn.BatchNorm1d(3)),
    "update_bn text": lambda: fastema.update_bn([{"a": 1}], nn.BatchNorm1d(3)),
    "install": lambda: fastema.compat.install("nothing"),
    "uninstall": lambda: fastema.compat.uninstall("nothing"),
    "fastema.Ema": lambda: fastema.Ema,
    "fastema.swap": lambda: fastema.swap,
    "inspect": lambda: checkpoint.inspect("/nonexistent.pt"),
    "convert": lambda: checkpoint.convert("/nonexistent.pt", "x.pt", to="nothing"),
    "average": lambda: checkpoint.average([], [], "x.safetensors"),
    "average weights": lambda: checkpoint.average(["a.pt"], [1, 2], "x.safetensors"),
    "open_checkpoint": lambda: checkpoint.open_checkpoint("/nonexistent"),
    "constant": lambda: rules.constant(1.5),
    "half_life": lambda: rules.half_life(0),
    "half_life_fraction": lambda: rules.half_life_fraction(-1),
    "inverse_gamma": lambda: rules.inverse_gamma(power=-1),
    "inverse_gamma minimum": lambda: rules.inverse_gamma(0.5, minimum=0.9),
    "power": lambda: rules.power(0.5),
    "warmup": lambda: rules.warmup("a"),
    "window": lambda: rules.window(0),
    "debiased": lambda: rules.debiased(0.9),
    "debiased twice": lambda: rules.debiased(rules.debiased(rules.constant(0.5))),
    "rule_from_dict": lambda: rules.rule_from_dict({"rule": "nothing"}),
    "rule_from_dict empty": lambda: rules.rule_from_dict({}),
    "decay(0)": lambda: rules.constant(0.5).decay(0),
    "Schedule": lambda: rules.Schedule([], 1),
    "Schedule every": lambda: rules.Schedule([rules.constant()], 0),
}

PEERS: dict[str, Callable[[], Any]] = {
    "torch_ema decay": lambda: torch_ema.ExponentialMovingAverage([_x()], 1.5),
    "torch_ema model": lambda: torch_ema.ExponentialMovingAverage(net(), 0.9),
    "torch_ema empty": lambda: torch_ema.ExponentialMovingAverage([], 0.9),
    "torch_ema restore": lambda: torch_ema.ExponentialMovingAverage([_x()], 0.9).restore([_x()]),
    "torch_ema length": lambda: torch_ema.ExponentialMovingAverage([_x()], 0.9).update(
        [_x(), _x()]
    ),
    "torch_ema freed": lambda: torch_ema.ExponentialMovingAverage([_x()], 0.9).update(),
    "torch_ema state": lambda: torch_ema.ExponentialMovingAverage([_x()], 0.9).load_state_dict({}),
    "diffusers model": lambda: diffusers.EMAModel(3),
    "diffusers decay": lambda: diffusers.EMAModel([_x()], decay=2),
    "diffusers unknown": lambda: diffusers.EMAModel([_x()], colour=2),
    "diffusers restore": lambda: diffusers.EMAModel([_x()]).restore([_x()]),
    "diffusers state": lambda: diffusers.EMAModel([_x()]).load_state_dict({"decay": "a"}),
    "diffusers shapes": lambda: diffusers.EMAModel([_x()]).step([_x(4)]),
    "diffusers save": lambda: diffusers.EMAModel([_x()]).save_pretrained("x"),
    "timm decay": lambda: timm.ModelEmaV3(net(), decay=-1),
    "timm tensor": lambda: timm.ModelEmaV2(_x()),
    "timm resume": lambda: timm.ModelEma(_simple(), resume="/nonexistent.pt"),
    "timm stranger": lambda: timm.ModelEmaV3(_simple()).update(nn.Linear(2, 2)),
    "swa decay": lambda: swa_utils.get_ema_multi_avg_fn(1.5),
    "swa both": lambda: swa_utils.AveragedModel(
        _simple(), avg_fn=swa_utils.get_swa_avg_fn(), multi_avg_fn=swa_utils.get_swa_multi_avg_fn()
    ),
    "swa stranger": lambda: swa_utils.AveragedModel(_simple()).update_parameters(nn.Linear(2, 2)),
    "swa rounding": lambda: swa_utils.get_swa_multi_avg_fn(rounding="up"),
    "ema_pytorch beta": lambda: ema_pytorch.EMA(_simple(), beta=2.0),
    "ema_pytorch none": lambda: ema_pytorch.EMA(),
    "ema_pytorch tensor": lambda: ema_pytorch.EMA(_x()),
    "ema_pytorch every": lambda: ema_pytorch.EMA(_simple(), update_every=0),
    "ema_pytorch sigma": lambda: ema_pytorch.KarrasEMA(_simple(), sigma_rel=2.0),
    "ema_pytorch both": lambda: ema_pytorch.KarrasEMA(_simple(), sigma_rel=0.1, gamma=3.0),
    "ema_pytorch tree": lambda: ema_pytorch.EMAPytree({"a": "b"}),
    "litema decay": lambda: litema.LitEma(_simple(), 1.5),
    "litema tensor": lambda: litema.LitEma(_x()),
    "litema stranger": lambda: litema.LitEma(_simple())(nn.Linear(2, 2)),
    "litema restore": lambda: litema.LitEma(_simple()).restore([_x()]),
    "litema weights": lambda: litema.ema_weights({}, _simple()),
    "ultralytics decay": lambda: ultralytics.ModelEMA(_simple(), decay=2),
    "ultralytics tau": lambda: ultralytics.ModelEMA(_simple(), tau=0),
    "ultralytics stranger": lambda: ultralytics.ModelEMA(_simple()).update(nn.Linear(2, 2)),
    "ultralytics load": lambda: ultralytics.load(ultralytics.ModelEMA(_simple()), {}),
}


def _simple() -> nn.Module:
    return fill(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 1)


def _outcome(call: Callable[[], Any]) -> Any:
    found = attempt(call)
    return found if isinstance(found, Exception) else f"no error: {type(found).__name__}"


@case(CASES, what={**CONSTRUCTION})
def construction(what: Any) -> Any:
    return _outcome(what)


@case(CASES, what=WEIGHTS)
def weights(what: Any) -> Any:
    return _outcome(what)


@case(CASES, what=CALLS)
def calls(what: Any) -> Any:
    model = net()
    ema = fastema.EMA(model, 0.9)
    fill(model, 1)
    ema.update()
    outcome = _outcome(lambda: what(model, ema))
    return {"outcome": outcome, "updates": ema.num_updates, "model": values(model)["number"]}


@case(CASES, what=FUNCTIONS)
def functions(what: Any) -> Any:
    return _outcome(what)


@case(CASES, what=PEERS)
def peers(what: Any) -> Any:
    return _outcome(what)
