"""The drop-in classes for PyTorch: values, states, counters, copies and refusals."""

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastema
from fastema.compat import diffusers, ema_pytorch, litema, swa_utils, timm, torch_ema, ultralytics

from ..cases import Cases, case
from ..record import attempt, flatten
from ..weights import Net, fill, values, versions

CASES: Cases = {}
RTOL = 1e-11


class Small(nn.Module):
    """A model as trainers have them: contiguous weights, a frozen one, buffers of both kinds."""

    def __init__(self, code: str = "f32") -> None:
        super().__init__()
        full = Net(code)
        self.long, self.cube, self.number = full.long, full.cube, full.number
        self.turned, self.frozen = full.turned, full.frozen
        self.register_buffer("mean", full.mean)
        self.register_buffer("count", full.count)

    def forward(self, x: Any) -> Any:
        return x * self.number


@dataclass(frozen=True)
class Peer:
    """How to build and update a class, and its attributes that are recorded."""

    make: Callable[..., Any]
    update: Callable[[Any, Any, int], Any]
    read: tuple[str, ...] = ()


def _listed(build: Any, **options: Any) -> Callable[..., Any]:
    return lambda model: build(list(model.parameters()), **options)


_torch_ema = partial(Peer, update=lambda a, m, n: a.update(m.parameters()))
_diffusers = partial(
    Peer,
    update=lambda a, m, n: a.step(m.parameters()),
    read=("decay", "min_decay", "optimization_step", "cur_decay_value", "temp_stored_params"),
)
_timm = partial(Peer, update=lambda a, m, n: a.update(m))
_timm_step = partial(Peer, update=lambda a, m, n: a.update(m, step=n))
_swa = partial(Peer, update=lambda a, m, n: a.update_parameters(m), read=("n_averaged",))
_lucid = partial(Peer, update=lambda a, m, n: a.update(), read=("step", "initted"))


def _averaged_model(function: str, buffers: bool, multi: bool) -> Callable[..., Any]:
    def make(model: Any) -> Any:
        arguments = (0.9,) if function == "ema" else ()
        name = f"get_{function}_{'multi_' if multi else ''}avg_fn"
        made = getattr(swa_utils, name)(*arguments)
        given = {"multi_avg_fn" if multi else "avg_fn": made}
        return swa_utils.AveragedModel(model, use_buffers=buffers, **given)

    return make


PEERS: dict[str, Peer] = {
    "torch_ema": _torch_ema(_listed(torch_ema.ExponentialMovingAverage, decay=0.9)),
    "torch_ema constant": _torch_ema(
        _listed(torch_ema.ExponentialMovingAverage, decay=0.9, use_num_updates=False)
    ),
    "diffusers": _diffusers(_listed(diffusers.EMAModel)),
    "diffusers warmup": _diffusers(
        _listed(diffusers.EMAModel, decay=0.9, use_ema_warmup=True, inv_gamma=2.0, power=0.75)
    ),
    "diffusers late": _diffusers(_listed(diffusers.EMAModel, update_after_step=7, min_decay=0.2)),
    "diffusers foreach": _diffusers(_listed(diffusers.EMAModel, decay=0.95, foreach=True)),
    "timm ModelEma": _timm(lambda m: timm.ModelEma(m, decay=0.9)),
    "timm ModelEmaV2": _timm(lambda m: timm.ModelEmaV2(m, decay=0.9)),
    "timm ModelEmaV3": _timm(lambda m: timm.ModelEmaV3(m, decay=0.9)),
    "timm ModelEmaV3 warmup": _timm_step(
        lambda m: timm.ModelEmaV3(m, decay=0.9, use_warmup=True, update_after_step=3)
    ),
    "timm ModelEmaV3 parameters": _timm(lambda m: timm.ModelEmaV3(m, 0.9, exclude_buffers=True)),
    "timm ModelEmaV3 float64": _timm(lambda m: timm.ModelEmaV3(m, 0.9, dtype=torch.float64)),
    "swa_utils default": _swa(lambda m: swa_utils.AveragedModel(m)),
    "swa_utils default buffers": _swa(lambda m: swa_utils.AveragedModel(m, use_buffers=True)),
    **{
        " ".join(
            (
                "swa_utils",
                function,
                "buffers" if buffers else "weights",
                "multi" if multi else "one",
            )
        ): _swa(_averaged_model(function, buffers, multi))
        for function in ("ema", "swa")
        for buffers in (False, True)
        for multi in (False, True)
    },
    "ema_pytorch EMA": _lucid(lambda m: ema_pytorch.EMA(m, update_after_step=3, update_every=2)),
    "ema_pytorch EMA min": _lucid(
        lambda m: ema_pytorch.EMA(
            m, beta=0.9, update_after_step=0, update_every=1, inv_gamma=4.0, min_value=0.3
        )
    ),
    "ema_pytorch EMA ignore": _lucid(
        lambda m: ema_pytorch.EMA(
            m, beta=0.9, update_after_step=0, update_every=1, ignore_names={"cube"}
        )
    ),
    "ema_pytorch KarrasEMA": _lucid(lambda m: ema_pytorch.KarrasEMA(m, gamma=6.9, update_every=2)),
    "litema": Peer(lambda m: litema.LitEma(m, 0.95), lambda a, m, n: a(m), ("num_updates",)),
    "litema constant": Peer(
        lambda m: litema.LitEma(m, 0.9, use_num_upates=False), lambda a, m, n: a(m)
    ),
    "ultralytics": Peer(
        lambda m: ultralytics.ModelEMA(m, 0.95, tau=20), lambda a, m, n: a.update(m), ("updates",)
    ),
}


def _model(code: str = "f32") -> Any:
    return fill(Small(code), 0)


def _averages(average: Any) -> Any:
    if hasattr(average, "shadow_params"):
        return list(average.shadow_params)
    for name in ("ema_model", "module", "ema"):
        if isinstance(getattr(average, name, None), nn.Module):
            return dict(getattr(average, name).state_dict())
    return dict(average.state_dict())


def _state(average: Any) -> Any:
    return average.state_dict() if hasattr(average, "state_dict") else average.ema.state_dict()


def _load(average: Any, state: Any) -> Any:
    return (average if hasattr(average, "load_state_dict") else average.ema).load_state_dict(state)


def _run(peer: Peer, model: Any, average: Any, steps: range) -> None:
    for step in steps:
        fill(model, step)
        peer.update(average, model, step - 1)


def _read(peer: Peer, average: Any) -> dict[str, Any]:
    return {
        "averages": _averages(average),
        **{name: attempt(lambda name=name: getattr(average, name)) for name in peer.read},
    }


@case(CASES, rtol=RTOL, peer=PEERS, code=("f64", "f32", "f16", "bf16"))
def values_after_50_steps(peer: Peer, code: str) -> Any:
    model = _model(code)
    average = peer.make(model)
    _run(peer, model, average, range(1, 51))
    return _read(peer, average) | {"model versions": versions(model)}


@case(CASES, rtol=RTOL, peer=PEERS)
def states(peer: Peer) -> Any:
    model = _model()
    average = peer.make(model)
    _run(peer, model, average, range(1, 11))
    state = _state(average)
    found = {"state": state, "kind": type(state).__name__, "keys": list(state)}
    other_model = fill(Small(), 60)
    other = peer.make(other_model)
    found["load"] = attempt(lambda: str(_load(other, copy.deepcopy(state))))
    found["same"] = flatten(_state(other)) == flatten(state)
    _run(peer, other_model, other, range(11, 14))
    return found | {"resumed": _read(peer, other)}


@case(CASES, rtol=RTOL, peer=PEERS, way=("deepcopy", "pickle"))
def copies(peer: Peer, way: str) -> Any:
    model = _model()
    average = peer.make(model)
    _run(peer, model, average, range(1, 6))
    copied = attempt(
        lambda: copy.deepcopy(average) if way == "deepcopy" else pickle.loads(pickle.dumps(average))
    )
    if isinstance(copied, Exception):
        return {"refused": type(copied).__name__}
    before = flatten(_state(copied))
    _run(peer, model, average, range(6, 9))
    return {"unchanged": flatten(_state(copied)) == before, **_read(peer, copied)}


@case(CASES, rtol=RTOL, peer=[n for n in PEERS if n.startswith(("torch_ema", "diff", "litema"))])
def stored_and_restored(peer: str) -> Any:
    one, model = PEERS[peer], _model()
    average = one.make(model)
    _run(one, model, average, range(1, 6))
    average.store(model.parameters())
    average.copy_to(model if peer.startswith("litema") else model.parameters())
    found = {"inside": values(model)}
    average.restore(model.parameters())
    found |= {"after": values(model), "versions": versions(model)}
    found["restore again"] = attempt(lambda: average.restore(model.parameters()))
    if hasattr(average, "average_parameters"):
        with average.average_parameters(model.parameters()):
            found["block"] = values(model)
        found["after the block"] = values(model)
    if hasattr(average, "to"):
        attempt(lambda: average.to(dtype=torch.bfloat16))
        _run(one, model, average, range(6, 9))
        found["bfloat16"] = _averages(average)
    return found


@case(CASES, rtol=RTOL)
def ema_pytorch_copies_between_models() -> Any:
    model = _model()
    average = ema_pytorch.EMA(model, beta=0.9, update_after_step=0, update_every=1)
    for step in range(1, 6):
        fill(model, step)
        average.update()
    average.copy_params_from_ema_to_model()
    found = {"model": values(model), "decay": average.get_current_decay()}
    fill(model, 9)
    average.copy_params_from_model_to_ema()
    found["average"] = dict(average.ema_model.state_dict())
    average.update_model_with_ema(0.5)
    found["mixed"] = values(model)
    x = torch.arange(3.0)
    return found | {"forward": average(x), "calls": [average.step, average.initted]}


@case(CASES, rtol=RTOL)
def ema_pytorch_trees() -> Any:
    tree = {"a": [torch.zeros(5), torch.zeros(2, 3)], "b": (torch.zeros(()),)}
    leaves = [*tree["a"], *tree["b"]]
    fill(leaves, 0)
    average = ema_pytorch.EMAPytree(tree, beta=0.9, update_after_step=2, update_every=1)
    for step in range(1, 11):
        fill(leaves, step)
        average.update()
    return {"tree": average.ema_model, "decay": average.get_current_decay()}


@case(CASES, rtol=1e-5)
def ema_pytorch_posthoc() -> Any:
    model = _model()
    with tempfile.TemporaryDirectory() as folder:
        average = ema_pytorch.PostHocEMA(
            model, sigma_rels=(0.05, 0.28), checkpoint_every_num_steps=5, update_every=1,
            checkpoint_folder=folder, checkpoint_dtype=torch.float32,
        )  # fmt: skip
        for step in range(1, 31):
            fill(model, step)
            average.update()
        files = sorted(one.name for one in Path(folder).iterdir())
        made = average.synthesize_ema_model(sigma_rel=0.15)
        return {"files": files, "synthesized": dict(made.ema_model.state_dict())}


@case(CASES, rtol=RTOL)
def diffusers_files() -> Any:
    class Config(dict):
        pass

    model = _model()
    average = diffusers.EMAModel(model.parameters(), decay=0.9)
    outcome = attempt(lambda: average.save_pretrained("/nonexistent"))
    return {"without a class": outcome, "decays": [average.get_decay(n) for n in range(12)]}


@case(CASES, rtol=RTOL)
def litema_checkpoints() -> Any:
    model = _model()
    average = litema.LitEma(model, 0.9)
    for step in range(1, 6):
        fill(model, step)
        average(model)
    checkpoint = {f"model_ema.{name}": one for name, one in average.state_dict().items()}
    checkpoint |= dict(model.state_dict())
    found = litema.ema_weights(checkpoint, model)
    written = litema.with_ema_weights(dict(model.state_dict()), found, num_updates=5)
    average.reset_num_updates()
    return {"weights": found, "written": written, "reset": average.num_updates}


@case(CASES, rtol=RTOL)
def ultralytics_checkpoints() -> Any:
    model = _model()
    average = ultralytics.ModelEMA(model, 0.9, tau=5)
    for step in range(1, 6):
        fill(model, step)
        average.update(model)
    model.note, model.names = "text", {0: "a"}
    average.update_attr(model, include=("note", "names"))
    plain = ultralytics.export(average)
    other = ultralytics.ModelEMA(_model(), 0.9, tau=5)
    loaded = attempt(lambda: ultralytics.load(other, plain))
    return {
        "note": average.ema.note,
        "keys": sorted(plain),
        "loaded": loaded,
        "updates": other.updates,
        "same": flatten(other.ema.state_dict()) == flatten(average.ema.state_dict()),
    }


@case(CASES, peer=("swa_utils", "nothing"))
def installation(peer: str) -> Any:
    found = {"before": [str(one) for one in fastema.compat.installed()]}
    done = attempt(lambda: fastema.compat.install(peer))
    if isinstance(done, Exception):
        return found | {"refused": done}
    found["install"] = sorted(str(one) for one in fastema.compat.installed())
    fastema.compat.uninstall(peer)
    return found | {"after": [str(one) for one in fastema.compat.installed()]}


@case(CASES)
def averaged_model_forwards_and_schedules() -> Any:
    model = _model()
    average = swa_utils.AveragedModel(model)
    events: list[str] = []
    average.register_forward_hook(lambda *rest: events.append("average"))
    average.module.register_forward_hook(lambda *rest: events.append("module"))
    for step in range(1, 4):
        fill(model, step)
        average.update_parameters(model)
    optimizer = torch.optim.SGD([model.cube], lr=0.5)
    schedule = swa_utils.SWALR(optimizer, 0.25, 2, "linear")
    rates = []
    for _ in range(4):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return {"forward": average(torch.arange(3.0)), "events": events, "rates": rates}


@case(CASES, peer=PEERS)
def refusals(peer: Peer) -> Any:
    model = _model()
    average = peer.make(model)
    other = nn.Linear(3, 2)
    fill(other, 1)
    return {
        "another model": attempt(lambda: peer.update(average, other, 0)),
        "nothing": attempt(lambda: peer.update(average, nn.Module(), 0)),
        "wrong state": attempt(lambda: _load(average, {"a": 1})),
        "averages": _averages(average),
    }
