"""States of fastema in any format: as strict as in its own files, and read without PyTorch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import fastema
from fastema.checkpoint import convert, load, load_into
from fastema.checkpoint.state import write_tensors
from fastema.errors import ArgumentError, CheckpointError

NEEDS = ("torch",)

pytestmark = [
    pytest.mark.usefixtures("inside"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def state_of(value: float = 7.25) -> dict[str, Any]:
    weights = {"w": torch.full((3,), value), "b": torch.zeros(2)}
    ema = fastema.EMA(weights, decay=0.9)
    ema.update()
    return ema.state_dict()


def write_torch(state: dict[str, Any]) -> str:
    torch.save(state, "ema.pt")
    return "ema.pt"


def write_folder(state: dict[str, Any]) -> str:
    shutil.rmtree("ema", ignore_errors=True)
    dcp.save(state, checkpoint_id="ema", no_dist=True)
    return "ema"


def write_own(state: dict[str, Any]) -> str:
    write_tensors("ema.safetensors", state)
    return "ema.safetensors"


WRITERS = {"torch": write_torch, "dcp": write_folder, "safetensors": write_own}

WITHOUT_TORCH = """
import sys
class Hidden:
    def find_spec(name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden)
import numpy as np, fastema
from fastema.checkpoint import convert, load_into
from fastema.errors import ArgumentError
ema = fastema.EMA({"w": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)}, decay=0.9)
load_into(ema, sys.argv[1])
assert ema.num_updates == 1 and ema.shadow["w"].tolist() == [7.25] * 3
for to in ("fastema", "safetensors"):
    convert(sys.argv[1], f"{to}.safetensors", to=to)
calls = {
    "swa_utils": lambda: convert(sys.argv[1], "out.pt", to="swa_utils"),
    "torch_ema": lambda: load_into(ema, "torch_ema.pt"),
}
for name, call in calls.items():
    try:
        call()
    except ArgumentError as error:
        assert name in str(error) and "needs PyTorch: pip install torch" in str(error), error
    else:
        raise AssertionError(name)
"""


@pytest.mark.parametrize("kind", WRITERS)
def test_own_states_are_read_without_torch_and_others_say_what_they_need(
    kind: str, inside: Path, python: Callable[..., str]
) -> None:
    path = WRITERS[kind](state_of())
    torch.save({"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(3)]}, "torch_ema.pt")
    python(WITHOUT_TORCH, path)
    ema = fastema.EMA({"w": torch.zeros(3), "b": torch.zeros(2)}, decay=0.9)
    load_into(ema, inside / "fastema.safetensors")
    assert ema.shadow["w"].tolist() == [7.25] * 3


def test_average_of_another_library_is_refused_for_arrays() -> None:
    torch.save(torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2)).state_dict(), "swa.pt")
    ema = fastema.EMA({"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)})
    with pytest.raises(ArgumentError, match=r"swa_utils \(swa.pt\).*PyTorch models alone"):
        load_into(ema, "swa.pt")


def test_flipped_bit_in_a_torch_file_is_not_loaded() -> None:
    ema = fastema.EMA({"w": torch.zeros(3), "b": torch.zeros(2)}, decay=0.9)
    for content in (
        state_of(),
        {"n_averaged": torch.tensor(1), "module.w": torch.full((3,), 7.25)},
    ):
        torch.save(content, "ema.pt")
        whole = Path("ema.pt").read_bytes()
        number = np.float32(7.25).tobytes()
        assert number in whole
        Path("ema.pt").write_bytes(whole.replace(number, b"abcd", 1))
        with pytest.raises(CheckpointError, match="is damaged"):
            load_into(ema, "ema.pt")
    assert ema.shadow["w"].tolist() == [0.0] * 3


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_refuses_what_load_state_dict_refuses(kind: str) -> None:
    state = state_of()
    ema = fastema.EMA({"w": torch.zeros(3), "b": torch.zeros(2)}, decay=0.9)
    path = WRITERS[kind]({**state, "other": torch.ones(2)})
    for call in (lambda: load(path), lambda: load_into(ema, path)):
        assert "'other' is unexpected: a state has no such entry" in refusal(call)
    header = json.loads(state["fastema"].numpy().tobytes())
    for count, fits in ((2**63 - 1, True), (2**63, False), (-1, False), (True, False)):
        text = json.dumps({**header, "num_updates": count}).ljust(len(state["fastema"])).encode()
        damaged = {**state, "fastema": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        path = WRITERS[kind](damaged)
        calls = (
            lambda state=damaged: ema.load_state_dict(state),
            lambda path=path: load(path),
            lambda path=path: load_into(ema, path),
            lambda path=path: convert(path, "out.safetensors", to="safetensors"),
        )
        for call in calls:
            if fits:
                call()
            else:
                assert f"num_updates is {count!r}" in refusal(call)
