"""Checkpoints of every library: averages found, inspected, loaded and converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastema
from fastema.checkpoint import convert, inspect, load, load_into, save
from fastema.checkpoint.conversion import writable_libraries
from fastema.checkpoint.detection import known_layouts
from fastema.checkpoint.transfer import tensors_of
from fastema.errors import ArgumentError, CheckpointError
from fastema.rules import Aligned, Constant
from fastema.rules.ema import InverseGamma

from ..support.peers import PEERS
from ..support.states import flat, nested

NEEDS = ("safetensors", "torch")

pytestmark = pytest.mark.usefixtures("inside")

STATES = {
    name: one
    for name, one in PEERS.items()
    if not name.startswith("swa_utils ema")
    and name != "timm ModelEma"  # its state looks like any model's
    and one.ours in writable_libraries()
}
"""Classes whose states `fastema.checkpoint` recognizes."""


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


def train(ema: Any, model: nn.Module, steps: int = 5) -> Any:
    for step in range(steps):
        move(model, step)
        ema.update()
    return ema


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert found[name].dtype == one.dtype
        assert torch.equal(found[name], one), name


MODEL = build_model().state_dict()
WEIGHTS = build_model(4).state_dict()
PARAMETERS = [name for name, _ in build_model().named_parameters()]


@pytest.mark.parametrize("owner", ["ours", "theirs"])
@pytest.mark.parametrize("name", STATES)
def test_average_is_loaded_from_its_librarys_state(name: str, owner: str) -> None:
    peer = STATES[name]
    if owner == "theirs" and not peer.installed:
        pytest.skip(f"{peer.ours}'s package is not installed")
    model = build_model()
    options = peer.slow or next(iter(peer.schedules.values()))
    average = peer.make(peer.module(owner), model, **options)
    for step in range(4):
        move(model, step)
        peer.update(average, model, step)
    torch.save(peer.state(average), "ema.pt")
    wanted = {name: one.detach() for name, one in peer.averages(average, model).items()}
    ema = fastema.EMA(model, decay=0.5)
    before = {name: one.clone() for name, one in ema.shadow.items()}
    load_into(ema, "ema.pt")
    assert_same(dict(ema.shadow), {**before, **wanted})
    found = inspect("ema.pt", check=True)
    stored = found.average
    assert (stored.library, found.checked) == (peer.ours, "checksums")
    assert stored.num_updates in (4, None)
    assert ema.num_updates == (stored.num_updates or 0)
    read = tensors_of(stored.checkpoint)
    if stored.names == "places":
        read = dict(zip(PARAMETERS, read.values(), strict=True))
    if stored.names == "without dots":
        wanted = {name.replace(".", ""): one for name, one in wanted.items()}
    assert_same(read, wanted)


WRITTEN = {name.split()[0]: name for name in reversed(STATES) if name != "timm ModelEmaV2"}
"""Target library of a conversion, and the peer that loads the result."""


def load_with(to: str, path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Load a file's averages with the library's own class, or ours if it is not installed."""
    if to == "mmengine":
        average = nn.Module()
        average.module, average.steps = model, nn.Buffer(torch.tensor(0))
        average.load_state_dict(torch.load(path, weights_only=True))
        assert average.steps == 5
        return model.state_dict()
    if to == "d2go":
        averages: dict[str, Tensor] = torch.load(path, weights_only=True)["ema_state"]
        return averages
    peer = PEERS[WRITTEN[to]]
    options = {"include_online_model": False} if to == "ema_pytorch" else {}
    schedule = {**next(iter(peer.schedules.values())), **options}
    average = peer.make(peer.module("theirs" if peer.installed else "ours"), model, **schedule)
    state = torch.load(path, weights_only=True)
    if to == "timm":
        average.module.load_state_dict(state["state_dict_ema"])
    elif to == "ema_pytorch":  # the state has no online model
        missing, odd = average.load_state_dict(state, strict=False)
        assert odd == []
        assert all("ema_model" not in one for one in missing)
    else:
        average.load_state_dict(state)
    return peer.averages(average, model)


@pytest.mark.parametrize("to", [*WRITTEN, "mmengine", "d2go"])
def test_target_library_loads_the_conversion_and_it_converts_back(to: str) -> None:
    model = build_model()
    torch.save(model.state_dict(), "model.pt")
    ema = train(fastema.EMA(model, decay=0.75), model)
    save(ema, "ema.safetensors")
    done = convert("ema.safetensors", "out.pt", to=to, names="model.pt")
    found = load_with(to, done.path, build_model(seed=8))
    wanted = dict(ema.shadow)
    if to in ("torch_ema", "diffusers", "litema"):
        wanted = {name: wanted[name] for name in PARAMETERS}
        assert any("not parameters: 1.num_batches_tracked" in one for one in done.lost)
        assert not any("schedule" in one for one in done.lost)
        assert load(done.path).schedule.rules[0] == Constant(0.75)
    assert_same({name: found[name].detach() for name in wanted}, wanted)
    convert("out.pt", "back.safetensors", to="fastema", names=PARAMETERS, decay=0.75)
    other = fastema.EMA(model, decay=0.1, buffers="skip" if len(wanted) < len(MODEL) else "copy")
    load_into(other, "back.safetensors")
    move(model, 9)
    for one in (ema, other):
        one.update()
    assert_same(dict(other.shadow), {name: ema.shadow[name] for name in wanted})


DOTLESS = {f"model_ema.{name.replace('.', '')}": one for name, one in MODEL.items()}
PARTS = {
    "named_parameters_dict": {name: MODEL[name] for name in PARAMETERS},
    "named_buffers_dict": {n: MODEL[n] for n in MODEL if n not in PARAMETERS},
}
IN_TRAINING = {"ema_model": dict(WEIGHTS), "ema_weights_active": True}
COMPOSER = {"algorithms": [("EMA", {"ema_model": MODEL})]}
OF_NEMO = {"opt": {}, "ema": tuple(MODEL[name] for name in PARAMETERS), "current_step": 8}
OURS = train(fastema.EMA({name: one.clone() for name, one in MODEL.items()}, 0.5), nn.Module(), 1)
WRAPPED_WEIGHTS = {f"module.{name}": one for name, one in WEIGHTS.items()}
WHOLE: dict[str, tuple[str, Any, int | None]] = {
    "a program of one's own": ("state dict", {"model": WEIGHTS, "ema": MODEL, "opt": {}}, None),
    "a program with a wrapped model": (
        "state dict", {"state_dict": WRAPPED_WEIGHTS, "model_ema": MODEL}, None,
    ),
    "a program with our state": ("fastema", {"ema": OURS.state_dict(), "updates": 5}, 1),
    "a program with our state under a key of its own": (
        "fastema", {"model": WEIGHTS, "fastema": OURS.state_dict()}, 1,
    ),
    "a program with our state under d2go's key": ("fastema", {"ema_state": OURS.state_dict()}, 1),
    "timm": ("timm", {"state_dict": WEIGHTS, "state_dict_ema": MODEL, "epoch": 3}, None),
    "lightning": ("lightning", {
        "state_dict": MODEL, "current_model_state": WEIGHTS,
        "averaging_state": {"n_averaged": torch.tensor(7)}, "pytorch-lightning_version": "2.6",
    }, 7),
    "our callback in lightning": ("fastema", {
        "state_dict": WEIGHTS,
        "callbacks": {"ModelCheckpoint{}": {}, "fastema.lightning.EMACallback": {
            "ema": OURS.state_dict(), "decay": [0.5],
        }},
    }, 1),
    "our callback in lightning, with the average as the model": ("fastema", {
        "state_dict": WEIGHTS, "current_model_state": WEIGHTS,
        "callbacks": {"fastema.lightning.EMACallback": {
            "ema": OURS.state_dict(), "model": "average",
        }},
    }, 1),
    "mmengine": ("mmengine", {
        "state_dict": MODEL,
        "ema_state_dict": {
            "steps": torch.tensor(6), **{f"module.{name}": one for name, one in WEIGHTS.items()},
        },
    }, 6),
    "the state of mmengine's average": ("mmengine", {
        "steps": torch.tensor(4), **{f"module.{name}": one for name, one in MODEL.items()},
    }, 4),
    "stable diffusion": ("litema", {
        "state_dict": {
            **{f"model.{name}": one for name, one in WEIGHTS.items()}, **DOTLESS,
            "model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(5),
        },
    }, 5),
    "composer": ("composer", {
        "state": {
            "model": WEIGHTS, "timestamp": {"Timestamp": {"batch": 12}},
            "algorithms": [("EMA", {"ema_model": PARTS, "ema_weights_active": False})],
        },
    }, 12),
    "composer, in training": (
        "composer", {"state": {"model": MODEL, "algorithms": {"EMA": IN_TRAINING}}}, None,
    ),
    "composer, in training on several devices": (
        "composer", {"state": {
            "model": {f"module.{name}": one for name, one in MODEL.items()},
            "algorithms": [("Mixup", {}), ("EMA", {**IN_TRAINING, "ema_started": True})],
            "timestamp": {"Timestamp": {"batch": 6, "epoch": 1}},
        }}, 6,
    ),
    "composer, an old state with both": (
        "composer",
        {"state": {"model": WEIGHTS, "algorithms": {"EMA": {
            "ema_model": MODEL, "training_model": WEIGHTS, "ema_weights_active": True,
        }}}}, None,
    ),
    "nemo": ("nemo", {"optimizer_states": [{**OF_NEMO, "decay": 0.5, "every_n_steps": 2}]}, 8),
    "d2go": ("d2go", {"model": WEIGHTS, "ema_state": MODEL}, None),
    "ultralytics": ("ultralytics", {"ema": MODEL, "updates": 9}, 9),
}  # fmt: skip
"""Checkpoints with more than an average: library, contents and number of updates."""


def test_one_layout_alone_claims_a_checkpoint() -> None:
    for library, content, _ in WHOLE.values():
        if library == "fastema":  # looked for before all others
            continue
        claims = [
            name
            for name, layouts in known_layouts().items()
            for one in layouts
            if one.find(content) is not None
        ]
        assert claims == ([] if library == "state dict" else [library])


@pytest.mark.parametrize("name", WHOLE)
def test_average_is_found_in_a_training_checkpoint(name: str) -> None:
    library, content, updates = WHOLE[name]
    torch.save(content, "last.pt")
    found = load("last.pt")
    assert (found.library, found.num_updates) == (library, updates)
    ema = fastema.EMA(build_model(5), decay=0.9)
    load_into(ema, "last.pt")
    kept = PARAMETERS if library == "nemo" else list(MODEL)
    assert_same({name: ema.shadow[name] for name in kept}, {name: MODEL[name] for name in kept})
    if library in ("fastema", "nemo", "ultralytics") or "state" in name:
        assert found.weights is None
    else:
        weights = tensors_of(found.weights)
        assert torch.equal(next(iter(weights.values())), next(iter(WEIGHTS.values())))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("steps", [1, 5, 6, 7])
def test_run_of_nemo_continues_at_its_steps_from_a_list_in_any_order(
    steps: int, every: int
) -> None:
    model = build_model()
    parameters = dict(model.named_parameters())
    averages = {name: one.detach().clone() for name, one in parameters.items()}

    def step(n: int) -> None:  # of NeMo's EMAOptimizer
        move(model, n)
        for name, average in averages.items():
            if n % every == 0:
                average.lerp_(parameters[name].detach(), 1 - 0.8)

    for n in range(steps):
        step(n)
    grouped = sorted(PARAMETERS, key=lambda name: parameters[name].ndim)  # as for weight decay
    counters = {"opt": {}, "current_step": steps, "decay": 0.8, "every_n_steps": every}
    for path, names in (("model.ckpt", PARAMETERS), ("grouped.ckpt", grouped)):
        state = {**counters, "ema": tuple(averages[name] for name in names)}
        torch.save({"state_dict": WEIGHTS, "optimizer_states": [state]}, path)
    mine = fastema.EMA(model, Aligned(0.8 ** (1 / every), phase=1), update_every=every)
    load_into(mine, "model.ckpt")
    with pytest.raises(CheckpointError, match="whose shapes are not those"):
        load_into(fastema.EMA(model), "grouped.ckpt")
    convert("grouped.ckpt", "ema.safetensors", to="fastema", names=grouped)
    theirs = fastema.EMA(model, decay=0.1, buffers="skip")
    load_into(theirs, "ema.safetensors")
    for n in range(steps, steps + 7):
        step(n)
        for ema in (mine, theirs):
            ema.update()
            for name, wanted in averages.items():
                torch.testing.assert_close(ema.shadow[name], wanted, rtol=1e-5, atol=1e-5)


def test_diffusers_state_or_folder_continues_with_its_decay(inside: Path) -> None:
    save_file(MODEL, inside / "diffusion_pytorch_model.safetensors")
    for options, rule in (
        ({"decay": 0.9, "min_decay": 0.9}, Constant(0.9)),
        ({"decay": 0.4}, Constant(0.4)),
        ({"decay": 0.9}, None),  # grows one step behind fastema's warm-up
        ({"use_ema_warmup": True, "power": 0.75}, InverseGamma(0.9999, 1.0, 0.75, 0.0)),
    ):
        options |= {"optimization_step": 9, "update_after_step": 0}
        torch.save({**options, "shadow_params": [torch.ones(2)]}, "ema.pt")
        (inside / "config.json").write_text(json.dumps(options))
        for path, names in (("ema.pt", "places"), (inside, "full")):
            found = load(path)
            assert (found.library, found.names, found.num_updates) == ("diffusers", names, 9)
            assert (found.schedule and found.schedule.rules[0]) == rule


STATE: dict[str, Callable[[str, Any], None]] = {
    "safetensors": lambda path, ema: save(ema, path),
    "torch.save": lambda path, ema: torch.save(ema.state_dict(), path),
    "within": lambda path, ema: torch.save({"ema": ema.state_dict(), "epoch": 3}, path),
}


@pytest.mark.parametrize("way", STATE)
def test_index_selects_one_of_several_averages(way: str) -> None:
    model = build_model()
    ema = train(fastema.EMA(model, decay=(0.5, 0.9)), model, 1)
    STATE[way]("ema.any", ema)
    for index in (0, 1):
        found = load("ema.any", index=index)
        assert (found.library, found.num_updates) == ("fastema", 1)
        assert found.schedule.rules == (Constant((0.5, 0.9)[index]),)
        assert_same(tensors_of(found.checkpoint), dict(ema.shadows[index]))
    with pytest.raises(ArgumentError, match=r"index=2: .* holds 2 averages"):
        load("ema.any", index=2)
    other = fastema.EMA(build_model(9), decay=(0.1, 0.2))
    load_into(other, "ema.any")
    assert other.schedule == ema.schedule
    for one, wanted in zip(other.shadows, ema.shadows, strict=True):
        assert_same(dict(one), dict(wanted))


@pytest.mark.parametrize(("offset", "kept"), [(10, True), (20, False)])
def test_warm_up_is_lost_where_the_library_has_another(offset: float, kept: bool) -> None:
    ema = fastema.EMA(nn.Linear(3, 2), decay=fastema.rules.warmup(0.9, offset))
    save(ema, "ema.safetensors")
    for to in ("torch_ema", "litema"):
        lost = convert("ema.safetensors", f"{to}.pt", to=to).lost
        assert any("the schedule" in one for one in lost) is not kept


def test_conversion_to_weights_writes_tied_names_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    torch.save(average.state_dict(), "swa.pt")
    done = convert("swa.pt", "w.safetensors", to="safetensors")
    assert set(load_file(done.path)) == {"a.weight", "a.bias", "b.bias"}
    assert done.lost[-2:] == ["the number of updates, 1", "the schedule, mean of all weights"]
    assert b'"b.weight": "a.weight"' in done.path.read_bytes()


# fmt: off
# Source, options and error message.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown library": ("list", {"to": "keras"}, r"to='keras': expected one of fastema, safete"),
    "a list without names": ("list", {"to": "swa_utils"}, r"torch_ema\) has no names of the model"),
    "too few names": ("list", {"to": "swa_utils", "names": ["w"]}, "1 names for the 2 tensors"),
    "a decay out of range": ("list", {"to": "torch_ema", "decay": 1.5}, "decay"),
    "itself": ("list", {"to": "torch_ema", "dst": "list"}, "is the source"),
    "the model": ("d2go", {"to": "torch_ema", "names": "m", "dst": "m"}, "names are taken from"),
    "no decay, fastema": ("d2go", {"to": "fastema"}, "pass decay"),
    **{
        f"no decay, {to}": ("d2go", {"to": to, "names": PARAMETERS}, "pass decay")
        for to in ("torch_ema", "litema", "diffusers")
    },
    **{
        f"parameters unknown, {to}": ("d2go", {"to": to}, "d2go does not tell them from buffers")
        for to in ("torch_ema", "litema", "diffusers")
    },
    "a model's state": ("d2go", {"to": "diffusers", "names": "m"}, "m does not tell them from"),
    "a model of other shapes": (
        "list", {"to": "swa_utils", "names": "m"}, "m does not tell parameters from buffers",
    ),
    "windowed mean": ("sma", {"to": "fastema"}, "only from its own file"),
}
# fmt: on


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_conversion_is_refused_and_writes_nothing(name: str, inside: Path) -> None:
    source, options, said = REFUSED[name]
    if source == "sma":
        sma = fastema.SMA(build_model(), window=2)
        sma.update()
        save(sma, "sma")
        assert any("in 'ring'" in note for note in load("sma").notes)
    tensors = [torch.ones(2), torch.zeros(3)]
    torch.save({"decay": 0.9, "num_updates": 3, "shadow_params": tensors}, "list")
    torch.save({"ema_state": MODEL}, "d2go")
    torch.save(MODEL, "m")
    before = {path: path.read_bytes() for path in inside.iterdir()}
    with pytest.raises((ArgumentError, CheckpointError), match=said):
        convert(source, **{"dst": "out", **options})
    assert {path: path.read_bytes() for path in inside.iterdir()} == before


COUNTERS = {"num_updates": 1, "num_skipped": 0, "seed": 0}


def test_plain_weights_and_averages_of_other_models_are_refused() -> None:
    torch.save(MODEL, "model.pt")
    assert load("model.pt").library == "model"
    done = convert("model.pt", "d2go.pt", to="d2go")
    assert done.lost == ["an average: the source holds only a model's weights"]
    convert("model.pt", "weights.safetensors", to="safetensors")
    assert load("weights.safetensors").library == "model"
    convert("d2go.pt", "average.safetensors", to="safetensors")
    assert load("average.safetensors").library == "fastema.average"
    ema = fastema.EMA(build_model(), decay=0.9)
    before = ema.state_dict()
    counters = {"decay": 0.9, "num_updates": 3}
    for content, said in (
        (MODEL, "holds a model's weights and no average"),
        ({**counters, "shadow_params": [torch.ones(2)]}, "a list of 1 tensors, whose shapes"),
        ({**counters, "shadow_params": 3}, "'shadow_params' is not a list of tensors"),
        ({**counters, "shadow_params": []}, "an average without tensors"),
        ({"n_averaged": torch.tensor(0.5), "module.w": torch.ones(1)}, "is 0.5, expected a count"),
        ({"n_averaged": torch.ones(3), "module.w": torch.ones(1)}, "'n_averaged' is not a number"),
        (
            flat({"version": 1, "kind": "EMA", **COUNTERS, "schedule": 3, "shadow": [MODEL]}),
            "schedule is inval",
        ),
        (flat({"version": 2, "kind": "EMA", "shadow": [MODEL]}), "version 2 is not known"),
        (flat({"version": 1, "kind": "X", "shadow": [MODEL]}), "saved by 'X', not by EMA"),
        ({"fastema": torch.ones(3), "shadow.0.w": torch.ones(1)}, "'fastema' is not JSON"),
        ({"fastema": torch.ones(3), **MODEL}, "a model's weights and no average"),
        ({"state_dict": WRAPPED_WEIGHTS}, "a model's weights and no average"),
        ({"state": {"algorithms": [("EMA", {"ema_model": None})]}}, "before its average began"),
        ({"model": MODEL, "ema_state": None}, "an average without tensors"),
        (IN_TRAINING, "the average is in the model, which is missing"),
        ({"model": MODEL, "state": {"algorithms": [("Mixup", {})]}}, "and no average"),
        ({"model": MODEL, "state": {"algorithms": None}}, "and no average"),
        ({**COMPOSER, "timestamp": {"Timestamp": None}}, "does not hold the state of an average"),
        ({**COMPOSER, "timestamp": {"Timestamp": {"batch": "6"}}}, "'batch' is not a number"),
        ({**COMPOSER, "timestamp": {"Timestamp": {"batch": -6}}}, "is -6, expected a count"),
    ):
        torch.save(content, "odd.pt")
        with pytest.raises(CheckpointError, match=f"odd.pt.*{said}"):
            load_into(ema, "odd.pt")
    assert_same(dict(ema.shadow), nested(before)["shadow"][0])


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("0.weight", None, r"'0\.weight' is missing"),
        ("more", torch.ones(2), "'more' is unexpected"),
        ("0.weight", torch.ones(3), r"'0\.weight' is \[3\], expected \[5, 3\]"),
        ("0.weight", torch.ones(5, 3, dtype=torch.int64), r"'0\.weight' is i64, expected f32"),
    ],
)
def test_average_that_does_not_fit_the_model_is_refused_by_name(
    name: str, tensor: Tensor | None, said: str
) -> None:
    averages = {**MODEL, name: tensor}
    kept = {name: one for name, one in averages.items() if one is not None}
    torch.save({"model": WEIGHTS, "ema_state": kept}, "d2go.pt")
    ema = fastema.EMA(build_model(5), decay=0.9)
    before = {name: one.clone() for name, one in ema.shadow.items()}
    with pytest.raises(CheckpointError, match=said):
        load_into(ema, "d2go.pt", num_updates=7)
    assert_same(dict(ema.shadow), before)
    assert ema.num_updates == 0


@pytest.mark.parametrize("kind", ["pt", "safetensors", "average"])
def test_flipped_bit_is_found_only_by_check(kind: str, inside: Path) -> None:
    path = inside / f"ema.{kind}"
    ema = fastema.EMA(nn.Linear(64, 64), decay=0.9)
    save(ema, path) if kind != "pt" else torch.save(ema.state_dict(), path)
    data = bytearray(path.read_bytes())
    data[data.index(ema.shadow["weight"][0, :2].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    assert inspect(path).checked == "sizes"
    with pytest.raises(CheckpointError, match="is damaged"):
        inspect(path, check=True)
