"""States: tensors and scalars by name; round trips through load, copy, pickle and files."""

import copy
import pickle
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastema
from fastema import checkpoint, rules

from ...support.states import flat, nested
from ..cases import Cases, case
from ..record import attempt, flatten
from ..weights import are_independent, fill, net, read, train

CASES: Cases = {}

KINDS = {
    "EMA": partial(fastema.EMA, decay=0.9),
    "EMA debiased": partial(fastema.EMA, decay=0.9, zero_debias=True),
    "two split": partial(fastema.EMA, decay=(0.5, 0.9), shadow_dtype="bf16+16"),
    "random": partial(fastema.EMA, decay=0.99, shadow_dtype="bfloat16", seed=5),
    "warmup": partial(fastema.EMA, decay=rules.warmup(0.99), update_every=3, start_after=2),
    "SWA": partial(fastema.SWA, shadow_dtype="float64"),
    "SMA": partial(fastema.SMA, window=4),
    "SMA f16 ring": partial(fastema.SMA, window=3, ring_dtype="float16"),
    "skipping": partial(fastema.EMA, decay=0.9, frozen="average", policy={"cube": "skip"}),
    "offloaded": partial(fastema.EMA, decay=0.9, offload=True),
}


def _trained(kind: Any, steps: int = 10) -> tuple[Any, Any]:
    model = net()
    ema = kind(model)
    for step in range(1, steps + 1):
        train(model, ema, steps=[step])
    return model, ema


def _tolerance(kind: Any, **others: Any) -> float:
    return 1e-11 if kind is KINDS["EMA debiased"] else 0.0


@case(CASES, rtol=_tolerance, kind=KINDS)
def state_and_round_trip(kind: Any) -> Any:
    _, ema = _trained(kind)
    state = ema.state_dict()
    found = {"state": state}
    other_model = fill(net(), 50)
    other = kind(other_model)
    other.load_state_dict(state)
    found["same"] = flatten(other.state_dict()) == flatten(state)
    train(other_model, other, steps=range(11, 16))
    return found | {"resumed": read(other)}


@case(CASES, rtol=_tolerance, kind=KINDS, way=("deepcopy", "pickle"))
def copies(kind: Any, way: str) -> Any:
    model, ema = _trained(kind)
    before = flatten(ema.state_dict())
    copied = attempt(
        lambda: copy.deepcopy(ema) if way == "deepcopy" else pickle.loads(pickle.dumps(ema))
    )
    if isinstance(copied, Exception):
        return {"refused": copied}
    found = {
        "same": flatten(copied.state_dict()) == before,
        "independent": are_independent(dict(ema.shadows[0]), dict(copied.shadows[0])),
    }
    train(model, ema, steps=range(11, 14))
    found["copy unchanged"] = flatten(copied.state_dict()) == before
    found["own update"] = attempt(copied.update)
    return found | {"copy": read(copied), "original": read(ema)}


@case(CASES)
def copies_with_their_model() -> Any:
    model, ema = _trained(KINDS["EMA"])
    outcome = attempt(lambda: copy.deepcopy((model, ema)))
    train(model, ema, steps=range(11, 16))
    return {"outcome": outcome, "original": read(ema)}


@case(CASES, saved=("EMA", "SWA", "SMA", "random", "warmup"), into=("EMA", "SMA", "two split"))
def states_of_another_average(saved: str, into: str) -> Any:
    _, ema = _trained(KINDS[saved])
    found = {}
    for schedule in ("saved", "mine"):
        other = KINDS[into](fill(net(), 50))
        outcome = attempt(partial(other.load_state_dict, ema.state_dict(), schedule=schedule))
        found[schedule] = {"outcome": outcome, "average": read(other)}
    return found


def _break(state: dict[str, Any], way: str) -> dict[str, Any]:
    state = nested(state)
    tensors = state["shadow"][0]
    if way == "without a tensor":
        del tensors["cube"]
    elif way == "with another tensor":
        tensors["more"] = torch.ones(3)
    elif way == "of another shape":
        tensors["cube"] = tensors["cube"].reshape(-1)
    elif way == "of integers":
        tensors["cube"] = tensors["cube"].to(torch.int64)
    elif way == "of another class":
        state = {"model": tensors}
    elif way == "empty":
        state = {}
    else:
        state.pop("schedule", None)
    return flat(state) if "shadow" in state else state


_WAYS = ("without a tensor", "with another tensor", "of another shape", "of integers")


@case(CASES, way=(*_WAYS, "of another class", "empty", "without a schedule"))
def broken_states(way: str) -> Any:
    _, ema = _trained(KINDS["EMA"])
    state = attempt(lambda: _break(ema.state_dict(), way))
    other = KINDS["EMA"](fill(net(), 50))
    return {"outcome": attempt(lambda: other.load_state_dict(state)), "average": read(other)}


@case(CASES, rtol=_tolerance, kind=KINDS)
def files(kind: Any) -> Any:
    _, ema = _trained(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "average.safetensors")
        checkpoint.save(ema, path)
        other = kind(fill(net(), 50))
        checkpoint.load_into(other, path)
        found = {"same": flatten(other.state_dict()) == flatten(ema.state_dict())}
        found["resumed"] = read(other)
        stored = attempt(lambda: checkpoint.load(path))
        for name in ("library", "num_updates", "names", "options", "notes", "parameters"):
            found[name] = attempt(lambda name=name: getattr(stored, name))
        described = attempt(lambda: checkpoint.inspect(path, check=True).to_dict())
        if isinstance(described, dict):
            for name in ("path", "nbytes", "bytes", "size"):
                described.pop(name, None)
        return found | {"described": described}


@case(CASES, kind=("EMA", "two split", "SWA"), to=("diffusers", "timm", "torch_ema", "swa_utils"))
def converted_files(kind: str, to: str) -> Any:
    from safetensors.torch import load_file

    _, ema = _trained(KINDS[kind])
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "average.safetensors"), Path(folder, "out")
        checkpoint.save(ema, path)
        outcomes: list[Any] = []
        for ending in (".pt", ".safetensors"):
            target = out.with_suffix(ending)
            done = attempt(lambda target=target: checkpoint.convert(path, target, to=to))
            outcomes.append(done if isinstance(done, Exception) else "converted")
            if not isinstance(done, Exception):
                break
        if isinstance(done, Exception):
            return {"refused": outcomes}
        loaded = (
            torch.load(target, weights_only=True) if ending == ".pt" else load_file(str(target))
        )
        back = attempt(lambda: checkpoint.load(target).num_updates)
        return {"ending": ending, "lost": done.lost, "file": loaded, "num_updates": back}


@case(CASES, weights=([1, 1, 2], [0.25, 0.5, 0.25], [2, -1, 0]))
def averages_of_checkpoints(weights: Any) -> Any:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for step in (1, 2, 3):
            paths.append(Path(folder, f"{step}.safetensors"))
            save_file({k: v.contiguous() for k, v in _plain(step).items()}, str(paths[-1]))
        out = Path(folder, "out.safetensors")
        outcome = attempt(lambda: checkpoint.average(paths, weights, out).name)
        return {"outcome": outcome, "file": load_file(str(out)) if out.exists() else None}


def _plain(step: int) -> dict[str, Any]:
    state = fill(net(), step).state_dict()
    return {name: one.clone() for name, one in state.items() if not name.startswith("part")}
