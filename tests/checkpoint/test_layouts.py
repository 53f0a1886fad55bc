"""Averages of every library: found, described, loaded, and converted for another library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastema
from fastema.checkpoint import convert, inspect, load, load_into, save
from fastema.checkpoint.conversion import LIBRARIES
from fastema.checkpoint.transfer import tensors_of
from fastema.errors import ArgumentError, CheckpointError
from fastema.rules import Constant, Power
from fastema.rules.ema import InverseGamma

from ..support.peers import PEERS, Peer

NEEDS = ("safetensors", "torch")

STATES = {
    name: one
    for name, one in PEERS.items()
    if not name.startswith(("nemo", "composer", "optax", "d2go", "swa_utils ema"))
    and name != "timm ModelEma"  # whose state is that of any model
    and one.ours in LIBRARIES
}
"""Classes with a state of their own, which is one of these libraries'."""


def build_model(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2, dtype=torch.float64))


def move(model: nn.Module, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    with torch.no_grad():
        for one in model.state_dict().values():
            if one.is_floating_point():
                one.add_(torch.randn(one.shape, generator=generator, dtype=one.dtype))
            else:
                one.add_(1)


def trained(peer: Peer, module: Any, model: nn.Module, n: int = 4) -> Any:
    options = peer.slow or next(iter(peer.schedules.values()))
    average = peer.make(module, model, **options)
    for step in range(n):
        move(model, step)
        peer.update(average, model, step)
    return average


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert found[name].dtype == one.dtype
        assert torch.equal(found[name], one), name


def parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("owner", ["ours", "theirs"])
@pytest.mark.parametrize("name", STATES)
def test_an_average_is_found_in_its_librarys_state(name: str, owner: str, tmp_path: Path) -> None:
    peer = STATES[name]
    if owner == "theirs" and not peer.installed:
        pytest.skip(f"{peer.ours}'s package is not installed")
    model = build_model()
    average = trained(peer, peer.module(owner), model)
    torch.save(peer.state(average), tmp_path / "ema.pt")
    found = inspect(tmp_path / "ema.pt", check=True)
    stored = found.average
    assert (stored.library, found.checked) == (peer.ours, "checksums")
    assert stored.num_updates in (4, None)
    read = tensors_of(stored.checkpoint)
    wanted = peer.averages(average, model)
    if stored.names == "places":
        read = dict(zip(parameters(model), read.values(), strict=True))
    if stored.names == "without dots":
        wanted = {name.replace(".", ""): one for name, one in wanted.items()}
    assert_same(read, {name: one.detach() for name, one in wanted.items()})


@pytest.mark.parametrize("name", STATES)
def test_an_average_of_another_library_is_loaded_into_ours(name: str, tmp_path: Path) -> None:
    peer, model = STATES[name], build_model()
    average = trained(peer, peer.module(), model)
    torch.save(peer.state(average), tmp_path / "ema.pt")
    ema = fastema.EMA(model, decay=0.5)
    before = {name: one.clone() for name, one in ema.shadow.items()}
    load_into(ema, tmp_path / "ema.pt")
    wanted = {name: one.detach() for name, one in peer.averages(average, model).items()}
    assert_same(dict(ema.shadow), {**before, **wanted})
    assert ema.num_updates == (load(tmp_path / "ema.pt").num_updates or 0)


WRITTEN = {
    "swa_utils": "swa_utils default",
    "torch_ema": "torch_ema",
    "ema_pytorch": next(name for name in STATES if name.startswith("ema_pytorch")),
    "diffusers": "diffusers",
    "litema": next(name for name in STATES if name.startswith("litema")),
    "mmengine": next(name for name in STATES if name.startswith("mmengine")),
    "timm": "timm ModelEmaV3",
}
"""Library that is written to a class that loads it."""


def loaded_by(to: str, path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The averages of a file as its owner's class reads it, or ours where it is not installed."""
    peer = PEERS[WRITTEN[to]]
    options = {"include_online_model": False} if to == "ema_pytorch" else {}
    schedule = {**next(iter(peer.schedules.values())), **options}
    average = peer.make(peer.module("theirs" if peer.installed else "ours"), model, **schedule)
    state = torch.load(path, weights_only=True)
    if to == "timm":
        average.module.load_state_dict(state["state_dict_ema"])
    elif to == "ema_pytorch":  # its sub-models' buffers are in the state only if they are there
        missing, odd = average.load_state_dict(state, strict=False)
        assert odd == []
        assert all("ema_model" not in one for one in missing)
    else:
        average.load_state_dict(state)
    return peer.averages(average, model)


@pytest.mark.parametrize("to", WRITTEN)
def test_our_average_is_loaded_by_the_library_it_is_converted_for(to: str, tmp_path: Path) -> None:
    model = build_model()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    ema = fastema.EMA(model, decay=0.75)
    for step in range(5):
        move(model, step)
        ema.update()
    save(ema, tmp_path / "ema.safetensors")
    done = convert(
        tmp_path / "ema.safetensors", tmp_path / "out.pt", to=to, names=tmp_path / "model.pt"
    )
    found = loaded_by(to, done.path, build_model(seed=8))
    wanted = dict(ema.shadow)
    if to in ("torch_ema", "diffusers", "litema"):
        wanted = {name: wanted[name] for name in parameters(model)}
        assert any("no parameter: 1.num_batches_tracked" in one for one in done.lost)
        assert not any("schedule" in one for one in done.lost)
        assert load(done.path).schedule.rules[0] == Constant(0.75)
    assert_same({name: found[name].detach() for name in wanted}, wanted)


@pytest.mark.parametrize("to", WRITTEN)
def test_an_average_comes_back_from_there_and_goes_on_alike(to: str, tmp_path: Path) -> None:
    model = build_model()
    ema = fastema.EMA(model, decay=0.75, buffers="skip")
    for step in range(3):
        move(model, step)
        ema.update()
    save(ema, tmp_path / "ema.safetensors")
    names = parameters(model)
    convert(tmp_path / "ema.safetensors", tmp_path / "out.pt", to=to, names=names)
    convert(
        tmp_path / "out.pt", tmp_path / "back.safetensors", to="fastema", names=names, decay=0.75
    )
    other = fastema.EMA(model, decay=0.1, buffers="skip")
    load_into(other, tmp_path / "back.safetensors")
    move(model, 9)
    for one in (ema, other):
        one.update()
    assert_same(dict(other.shadow), dict(ema.shadow))


MODEL = build_model().state_dict()
WEIGHTS = build_model(4).state_dict()
DOTLESS = {f"model_ema.{name.replace('.', '')}": one for name, one in MODEL.items()}
PARTS = {
    "named_parameters_dict": {name: MODEL[name] for name in parameters(build_model())},
    "named_buffers_dict": {n: MODEL[n] for n in MODEL if n not in parameters(build_model())},
}

WHOLE: dict[str, tuple[str, Any, int | None]] = {
    "a program of one's own": ("state dict", {"model": WEIGHTS, "ema": MODEL, "opt": {}}, None),
    "timm": ("timm", {"state_dict": WEIGHTS, "state_dict_ema": MODEL, "epoch": 3}, None),
    "lightning": (
        "lightning",
        {
            "state_dict": MODEL,
            "current_model_state": WEIGHTS,
            "averaging_state": {"n_averaged": torch.tensor(7)},
            "pytorch-lightning_version": "2.6",
        },
        7,
    ),
    "mmengine": (
        "mmengine",
        {
            "state_dict": MODEL,
            "ema_state_dict": {
                "steps": torch.tensor(6),
                **{f"module.{name}": one for name, one in WEIGHTS.items()},
            },
        },
        6,
    ),
    "stable diffusion": (
        "litema",
        {
            "state_dict": {
                **{f"model.{name}": one for name, one in WEIGHTS.items()},
                **DOTLESS,
                "model_ema.decay": torch.tensor(0.5),
                "model_ema.num_updates": torch.tensor(5),
            }
        },
        5,
    ),
    "composer": (
        "composer",
        {
            "state": {
                "model": WEIGHTS,
                "timestamp": {"Timestamp": {"batch": 12}},
                "algorithms": [("EMA", {"ema_model": PARTS, "ema_weights_active": False})],
            }
        },
        12,
    ),
    "composer, in training": (
        "composer",
        {
            "state": {
                "model": MODEL,
                "algorithms": {
                    "EMA": {"ema_model": dict(WEIGHTS), "ema_weights_active": True},
                },
            }
        },
        None,
    ),
    "nemo": (
        "nemo",
        {
            "optimizer_states": [
                {
                    "opt": {},
                    "ema": tuple(MODEL[name] for name in parameters(build_model())),
                    "current_step": 8,
                    "decay": 0.5,
                    "every_n_steps": 2,
                }
            ]
        },
        8,
    ),
    "d2go": ("d2go", {"model": WEIGHTS, "ema_state": MODEL}, None),
    "ultralytics": ("ultralytics", {"ema": MODEL, "updates": 9}, 9),
}
"""Checkpoints with more than an average: library, contents, and updates."""


@pytest.mark.parametrize("name", WHOLE)
def test_an_average_is_found_in_a_whole_checkpoint(name: str, tmp_path: Path) -> None:
    library, content, updates = WHOLE[name]
    torch.save(content, tmp_path / "last.pt")
    found = load(tmp_path / "last.pt")
    assert (found.library, found.num_updates) == (library, updates)
    ema = fastema.EMA(build_model(5), decay=0.9)
    load_into(ema, tmp_path / "last.pt")
    kept = parameters(build_model()) if library == "nemo" else list(MODEL)
    assert_same({name: ema.shadow[name] for name in kept}, {name: MODEL[name] for name in kept})
    if library not in ("nemo", "ultralytics"):
        assert found.weights is not None
        weights = tensors_of(found.weights)
        assert torch.equal(next(iter(weights.values())), next(iter(WEIGHTS.values())))
    else:
        assert found.weights is None


SCHEDULES: dict[str, tuple[dict[str, Any], Any]] = {
    "constant": ({"decay": 0.9, "min_decay": 0.9, "optimization_step": 9}, Constant(0.9)),
    "grown up": ({"decay": 0.5, "optimization_step": 100}, Constant(0.5)),
    "growing": ({"decay": 0.9, "optimization_step": 5}, None),
    "warm-up": (
        {"decay": 0.9, "use_ema_warmup": True, "power": 0.75, "optimization_step": 5},
        InverseGamma(0.9, 1.0, 0.75, 0.0),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_that_diffusers_goes_on_with(name: str, tmp_path: Path) -> None:
    options, rule = SCHEDULES[name]
    torch.save({**options, "shadow_params": [torch.ones(2)]}, tmp_path / "ema.pt")
    found = load(tmp_path / "ema.pt")
    assert (found.schedule and found.schedule.rules[0]) == rule
    if rule is None:
        return
    average = fastema.compat.diffusers.EMAModel([torch.zeros(2)])
    average.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    step = average.optimization_step + 1
    assert rule.decay(step) == pytest.approx(average.get_decay(step), rel=1e-12)


def test_a_folder_of_diffusers_has_names_and_counters(tmp_path: Path) -> None:
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "config.json").write_text(
        '{"decay": 0.9, "min_decay": 0.9, "optimization_step": 40, "update_after_step": 0}'
    )
    save_file(MODEL, tmp_path / "ema" / "diffusion_pytorch_model.safetensors")
    found = load(tmp_path / "ema")
    assert (found.library, found.names, found.num_updates) == ("diffusers", "full", 40)
    assert set(found.checkpoint.tensors) == set(MODEL)


def test_a_snapshot_tells_its_power_and_its_lag(tmp_path: Path) -> None:
    model = build_model()
    ema = fastema.PowerEMA(model, 0.1)
    for step in range(30):
        move(model, step)
        ema.update()
    (path,) = fastema.posthoc.save_snapshot(ema, tmp_path)
    found = inspect(path)
    assert (found.average.library, found.average.num_updates) == ("fastema.posthoc", 30)
    assert isinstance(found.average.schedule.rules[0], Power)
    assert found.reach is not None
    assert 0 < found.reach.mean_age < 30


STATE: dict[str, Callable[[Path, Any], None]] = {
    "safetensors": lambda path, ema: save(ema, path),
    "torch.save": lambda path, ema: torch.save(ema.state_dict(), path),
    "within": lambda path, ema: torch.save({"ema": ema.state_dict(), "epoch": 3}, path),
}


@pytest.mark.parametrize("way", STATE)
def test_several_averages_of_ours_are_told_apart(way: str, tmp_path: Path) -> None:
    model = build_model()
    ema = fastema.EMA(model, decay=(0.5, 0.9))
    move(model, 1)
    ema.update()
    path = tmp_path / "ema.any"
    STATE[way](path, ema)
    for index in (0, 1):
        found = load(path, index=index)
        assert found.library == "fastema"
        assert found.num_updates == 1
        assert found.schedule.rules == (Constant((0.5, 0.9)[index]),)
        assert_same(tensors_of(found.checkpoint), dict(ema.shadows[index]))
    with pytest.raises(ArgumentError, match=r"index=2: .* holds 2 averages"):
        load(path, index=2)
    other = fastema.EMA(build_model(9), decay=(0.1, 0.2))
    load_into(other, path)
    assert other.schedule == ema.schedule
    for one, wanted in zip(other.shadows, ema.shadows, strict=True):
        assert_same(dict(one), dict(wanted))


def test_the_weights_alone_are_streamed_with_tied_names_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    torch.save(average.state_dict(), tmp_path / "swa.pt")
    done = convert(tmp_path / "swa.pt", tmp_path / "w.safetensors", to="safetensors")
    assert set(load_file(done.path)) == {"a.weight", "a.bias", "b.bias"}
    assert done.lost[-2:] == ["the number of updates, 1", "the schedule, mean of all weights"]
    with done.path.open("rb") as file:
        assert b'"b.weight": "a.weight"' in file.read()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown library": ({"to": "keras"}, r"to='keras': expected one of fastema, safetensors"),
    "a list without names": ({"to": "swa_utils"}, r"torch_ema\) has no names of the model"),
    "too few names": ({"to": "swa_utils", "names": ["w"]}, "1 names for the 2 tensors"),
    "a decay out of range": ({"to": "torch_ema", "decay": 1.5}, "decay"),
    "itself": ({"to": "torch_ema", "dst": "ema.pt"}, "is the source"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_conversion_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    options, said = REFUSED[name]
    tensors = [torch.ones(2), torch.zeros(3)]
    state = {"decay": 0.9, "num_updates": 3, "shadow_params": tensors, "collected_params": None}
    torch.save(state, tmp_path / "ema.pt")
    before = (tmp_path / "ema.pt").read_bytes()
    given = dict(options)
    out = tmp_path / given.pop("dst", "out.pt")
    with pytest.raises((ArgumentError, CheckpointError), match=said):
        convert(tmp_path / "ema.pt", out, **given)
    assert [one.name for one in tmp_path.iterdir()] == ["ema.pt"]
    assert (tmp_path / "ema.pt").read_bytes() == before


def test_a_decay_is_asked_for_where_none_is_known(tmp_path: Path) -> None:
    torch.save({"ema_state": MODEL}, tmp_path / "d2go.pt")
    for to in ("fastema", "torch_ema", "litema", "diffusers"):
        with pytest.raises(ArgumentError, match="pass decay"):
            convert(tmp_path / "d2go.pt", tmp_path / "out", to=to)


def test_a_windowed_mean_goes_on_from_its_own_file_only(tmp_path: Path) -> None:
    model = build_model()
    sma = fastema.SMA(model, window=2)
    sma.update()
    save(sma, tmp_path / "sma.safetensors")
    assert any("in 'ring'" in note for note in load(tmp_path / "sma.safetensors").notes)
    with pytest.raises(ArgumentError, match="goes on from its own file only"):
        convert(tmp_path / "sma.safetensors", tmp_path / "out.safetensors", to="fastema")


def test_a_models_weights_are_no_average(tmp_path: Path) -> None:
    torch.save(MODEL, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt").library == "model"
    done = convert(tmp_path / "model.pt", tmp_path / "d2go.pt", to="d2go")
    assert done.lost == ["nothing tells that these are averages: a model's weights"]
    with pytest.raises(CheckpointError, match="holds a model's weights and no average"):
        load_into(fastema.EMA(build_model()), tmp_path / "model.pt")


def test_a_list_of_another_model_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    state = {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(2)]}
    torch.save(state, tmp_path / "ema.pt")
    ema = fastema.EMA(build_model(), decay=0.9)
    before = ema.state_dict()
    with pytest.raises(CheckpointError, match="a list of 1 tensors, which by their shapes"):
        load_into(ema, tmp_path / "ema.pt")
    assert_same(dict(ema.shadow), before["shadow"][0])


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_a_flipped_byte_is_found_when_it_is_looked_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "ema.any"
    model = nn.Linear(64, 64)
    ema = fastema.EMA(model, decay=0.9)
    save(ema, path.with_suffix(".safetensors")) if kind == "ours" else torch.save(
        ema.state_dict(), path
    )
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    at = data.index(ema.shadow["weight"][0, :2].numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert inspect(path).checked == "sizes"
    with pytest.raises(CheckpointError, match="is damaged"):
        inspect(path, check=True)


MALFORMED: dict[str, Any] = {
    "a count that is none": {"n_averaged": torch.tensor(float("nan")), "module.w": torch.ones(1)},
    "a negative count": {"n_averaged": -3, "module.w": torch.ones(1)},
    "a decay that is text": {"decay": "x", "num_updates": 1, "shadow_params": [torch.ones(1)]},
    "no list": {"decay": 0.9, "num_updates": 1, "shadow_params": 3},
    "an empty list": {"decay": 0.9, "num_updates": 1, "shadow_params": []},
    "an average of nothing": {"ema_state": {}},
    "ema_state is a number": {"ema_state": 4},
    "no model within": {"state": {"algorithms": [("EMA", {"ema_model": None})]}},
    "algorithms are a number": {"state": {"algorithms": 4, "x": {"ema_model": torch.ones(1)}}},
    "a schedule of ours that is none": {"format": "fastema", "schedule": 3, "shadow": [{}]},
    "a state of ours without averages": {"format": "fastema", "schedule": None},
    "a list": [torch.ones(2)],
    "keys that are numbers": {1: torch.ones(2), 2: {3: torch.ones(1)}},
    "several elements for a count": {"steps": torch.ones(3), "module.w": torch.ones(1)},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_state_is_a_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    torch.save(MALFORMED[name], tmp_path / "odd.pt")
    if name in ("a list", "keys that are numbers", "algorithms are a number"):
        assert load(tmp_path / "odd.pt").library == "model"
        return
    with pytest.raises(CheckpointError, match=r"odd\.pt"):
        load(tmp_path / "odd.pt")


def test_an_average_of_our_callback_is_found_in_lightnings_checkpoint(tmp_path: Path) -> None:
    model = build_model()
    ema = fastema.EMA(model, 0.5)
    move(model, 1)
    ema.update()
    callback = {"ema": ema.state_dict(), "decay": [0.5]}
    checkpoint = {
        "state_dict": model.state_dict(),
        "callbacks": {"ModelCheckpoint{}": {}, "fastema.lightning.EMACallback": callback},
    }
    torch.save(checkpoint, tmp_path / "epoch=1-step=16.ckpt")
    found = load(tmp_path / "epoch=1-step=16.ckpt")
    assert (found.library, found.num_updates) == ("fastema", 1)
    other = fastema.EMA(build_model(), 0.5)
    load_into(other, tmp_path / "epoch=1-step=16.ckpt")
    assert_same(dict(other.shadow), dict(ema.shadow))
