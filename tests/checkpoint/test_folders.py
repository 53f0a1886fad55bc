"""Averages of fastema in folders that hold a model too, and the names of what is written."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

import fastema
from fastema.checkpoint import (
    average,
    convert,
    inspect,
    load,
    load_into,
    load_state,
    open_checkpoint,
    save,
)
from fastema.checkpoint.folder import pieces
from fastema.checkpoint.merge import prepare
from fastema.checkpoint.stored import open_weights
from fastema.checkpoint.transfer import tensors_of
from fastema.distributed import consolidate
from fastema.errors import CheckpointError

from ..support.states import nested

NEEDS = ("safetensors", "torch")

pytestmark = [
    pytest.mark.usefixtures("inside"),
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


def build(decay: Any = 0.5) -> tuple[nn.Module, fastema.EMA]:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ema = fastema.EMA(model, decay=decay)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn(one.shape))
    ema.update()
    return model, ema


def save_dcp(model: nn.Module, ema: fastema.EMA, folder: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "epoch": 3, "opt": optimizer}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def save_trainer(model: nn.Module, ema: fastema.EMA, folder: str) -> None:
    Path(folder).mkdir()
    save_file(model.state_dict(), f"{folder}/model.safetensors")
    save(ema, f"{folder}/ema.safetensors")


def save_trainer_average(model: nn.Module, ema: fastema.EMA, folder: str) -> None:
    Path(folder).mkdir()
    save_file(dict(ema.shadow), f"{folder}/model.safetensors")
    save_file(model.state_dict(), f"{folder}/training_weights.safetensors")
    save(ema, f"{folder}/ema.safetensors")


FOLDERS = {"dcp": save_dcp, "trainer": save_trainer, "trainer, average": save_trainer_average}


@pytest.mark.parametrize("kind", FOLDERS)
def test_average_in_a_folder_is_described_converted_and_loaded(kind: str) -> None:
    model, ema = build()
    FOLDERS[kind](model, ema, "checkpoint-7")
    found = inspect("checkpoint-7", check=True)
    assert (found.average.library, found.average.num_updates) == ("fastema", 1)
    assert found.average.schedule == ema.schedule
    assert (found.checkpoint.step, found.checked) == (7, "checksums")
    if kind != "dcp":
        weights = tensors_of(found.average.weights)
        assert torch.equal(weights["0.weight"], model[0].weight)
    for out in ("out.safetensors", "out"):
        if kind != "dcp" and out == "out":
            continue  # the average is one file
        done = convert("checkpoint-7", out, to="safetensors")
        assert done.source.library == "fastema"
        assert Path(out).is_dir() == (out == "out")
        written = load_file(out if out != "out" else "out/model.safetensors")
        assert written.keys() == ema.shadow.keys()
        for name, one in written.items():
            assert torch.equal(one, ema.shadow[name]), name
    other = build(decay=0.25)[1]
    with pytest.warns(UserWarning, match="the saved schedule replaces"):
        load_into(other, "checkpoint-7")
    assert (other.num_updates, other.schedule) == (1, ema.schedule)
    for name, one in ema.shadow.items():
        assert torch.equal(other.shadow[name], one)


def test_key_and_index_select_an_average_in_a_distributed_folder() -> None:
    model, ema = build(decay=(0.5, 0.9))
    state = {"trainer": {"average": ema.state_dict(), "model": model.state_dict()}}
    dcp.save(state, checkpoint_id="dcp", no_dist=True)
    for index in (0, 1):
        found = load("dcp", key="trainer.average", index=index)
        assert (found.library, found.num_updates) == ("fastema", 1)
        convert("dcp", "out.safetensors", to="safetensors", key="trainer.average", index=index)
        for name, one in load_file("out.safetensors").items():
            assert torch.equal(one, ema.shadows[index][name])
    with pytest.raises(CheckpointError, match=r"nothing at 'trainer\.other'"):
        load("dcp", key="trainer.other")


def test_average_of_another_library_is_found_in_a_distributed_folder() -> None:
    model, _ = build()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    state = {"model": model.state_dict(), "ema": averaged.state_dict()}
    dcp.save(state, checkpoint_id="dcp", no_dist=True)
    found = load("dcp")
    assert (found.library, found.num_updates) == ("swa_utils", 1)
    assert set(found.checkpoint.tensors) == set(model.state_dict())


def test_flipped_bit_in_a_distributed_folder_is_found_by_check() -> None:
    model, ema = build()
    save_dcp(model, ema, "dcp")
    (part,) = Path("dcp").glob("*.distcp")
    data = bytearray(part.read_bytes())
    data[data.index(ema.shadow["0.weight"].numpy().tobytes())] ^= 1
    part.write_bytes(data)
    assert inspect("dcp").checked == "sizes"
    with pytest.raises(CheckpointError, match="is damaged"):
        inspect("dcp", check=True)


def test_column_major_tensor_of_a_distributed_folder_is_refused_by_name() -> None:
    w = torch.arange(6.0).reshape(2, 3)
    for folder, one in (("rows", w), ("columns", w.t().contiguous().t())):
        dcp.save({"w": one}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointError, match="w: its block is not row-major; load it"):
        average(["rows", "columns"], [0.5, 0.5], "mean.safetensors")


def test_pieces_of_a_block_are_in_its_order_and_small() -> None:
    for shape in ((), (0, 3), (7,), (5, 4), (3, 2, 6)):
        block = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
        for most in (8, 24, 10_000):
            found = [block[piece] for piece in pieces(shape, 8, most)]
            assert all(one.nbytes <= most for one in found)
            assert [n for one in found for n in one.flat] == block.ravel().tolist()
            assert most < 10_000 or len(found) == (block.size > 0)


def test_mean_of_models_that_are_averages_already_is_said_to_be_so() -> None:
    for step, kind in ((1, save_trainer_average), (2, save_trainer)):
        kind(*build(), f"checkpoint-{step}")
    said = "the model of checkpoint-1 is an average itself; its training weights are in training_"
    both = [open_weights(f"checkpoint-{step}") for step in (1, 2)]
    assert any(note.startswith(said) for note in prepare(both).notes)
    assert not any("an average itself" in note for note in prepare(both[1:]).notes)


def test_name_that_ends_in_safetensors_is_a_file_for_any_source(inside: Path) -> None:
    model, _ = build()
    for step in (1, 2):
        dcp.save(model.state_dict(), checkpoint_id=f"step-{step}", no_dist=True)
    average(["step-1", "step-2"], [0.5, 0.5], "mean.safetensors")
    for name, one in load_file("mean.safetensors").items():
        assert torch.equal(one, model.state_dict()[name])
    average(["step-1", "step-2"], [0.5, 0.5], "mean")
    assert (inside / "mean" / "model.safetensors").is_file()


def test_flat_state_of_many_tensors_is_read_from_a_distributed_checkpoint(inside: Path) -> None:
    """The description of such a folder names every tensor in a tuple of its own."""
    state = {f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(300)}
    dcp.save(state, checkpoint_id=inside / "flat", no_dist=True)
    read = tensors_of(open_checkpoint(inside / "flat"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], one) for name, one in state.items())


def save_trainer_folder(folder: Path) -> Any:
    """Save an average as the Trainer's callback does, beside a model, with one bit flipped."""
    ema = fastema.EMA(nn.Linear(3, 2), decay=0.9)
    folder.mkdir()
    save(ema, folder / "ema.safetensors")
    save_file(nn.Linear(3, 2).state_dict(), folder / "model.safetensors")
    return ema


def test_damaged_average_in_a_folder_is_neither_loaded_nor_converted(inside: Path) -> None:
    folder = inside / "checkpoint-5"
    ema = save_trainer_folder(folder)
    whole = bytearray((folder / "ema.safetensors").read_bytes())
    whole[whole.index(ema.shadow["weight"].numpy().tobytes())] ^= 1
    (folder / "ema.safetensors").write_bytes(whole)
    before = ema.shadow["weight"].clone()
    for path in (folder, folder / "ema.safetensors"):
        for call in (
            lambda path=path: load_into(ema, path),
            lambda path=path: convert(path, "out.safetensors", to="fastema"),
            lambda path=path: convert(path, "out.pt", to="swa_utils"),
        ):
            with pytest.raises(CheckpointError, match="is damaged"):
                call()
    assert torch.equal(ema.shadow["weight"], before)
    assert {one.name for one in inside.iterdir()} == {"checkpoint-5"}


def test_a_model_with_names_like_a_states_is_not_taken_for_an_average(inside: Path) -> None:
    model = nn.ModuleDict({"shadow": nn.ModuleList([nn.Linear(2, 2)])})
    dcp.save({"model": model.state_dict()}, checkpoint_id=inside / "raw", no_dist=True)
    with pytest.raises(CheckpointError, match="holds 0 averages"):
        consolidate(inside / "raw", inside / "out")
    ema = fastema.EMA(model)
    state = {"model": model.state_dict(), "ema": ema.state_dict()}
    dcp.save(state, checkpoint_id=inside / "both", no_dist=True)
    consolidate(inside / "both", inside / "out")
    assert set(load_file(inside / "out" / "model.safetensors")) == set(ema.shadow)


def test_empty_tensor_is_read_from_a_distributed_checkpoint(inside: Path) -> None:
    ema = fastema.EMA({"a": torch.ones(0, 2), "b": torch.ones(2)})
    dcp.save(ema.state_dict(), checkpoint_id=inside / "dcp", no_dist=True)
    load_into(ema, inside / "dcp")
    assert ema.shadow["a"].shape == (0, 2)


def test_conversion_to_our_own_format_keeps_all_counters(inside: Path) -> None:
    weights = {"w": np.ones(2)}
    ema = fastema.EMA(weights, 0.9, zero_debias=True, on_nonfinite="skip", seed=5)
    for value in (2.0, np.nan, 3.0):
        weights["w"][:] = value
        ema.update()
    save(ema, "in.safetensors")
    convert("in.safetensors", "out.safetensors", to="fastema")
    states = [nested(load_state(path, weights)) for path in ("in.safetensors", "out.safetensors")]
    for state in states:
        assert (state["num_updates"], state["num_skipped"], state["seed"]) == (2, 1, 5)
    assert states[0]["log_decays"] == states[1]["log_decays"]
    sma = fastema.SMA(weights, window=2)
    save(sma, "sma.safetensors")
    convert("sma.safetensors", "ema.safetensors", to="fastema", decay=0.5)
    load_into(fastema.EMA(weights, 0.5), "ema.safetensors")


@pytest.mark.parametrize(
    ("name", "said"), [("decay", "LitEma's own entry"), ("a", "is there twice")]
)
def test_conversion_never_drops_a_tensor_in_silence(inside: Path, name: str, said: str) -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    torch.save({"decay": 0.9, "num_updates": 3, "shadow_params": tensors}, "list.pt")
    with pytest.raises(CheckpointError, match=said):
        convert("list.pt", "out.pt", to="litema", names=[name, "a"])
    assert not (inside / "out.pt").exists()
