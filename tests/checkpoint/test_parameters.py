"""Layouts that store the parameters alone: which tensors are parameters, and in which order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastema
from fastema.checkpoint import convert, load, load_into, save
from fastema.errors import CheckpointError

NEEDS = ("safetensors", "torch")

pytestmark = pytest.mark.usefixtures("inside")


class Block(nn.Module):
    """Parameters and a float buffer, all of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("offset", torch.randn(4))


def build(**options: Any) -> tuple[nn.Module, fastema.EMA]:
    model = nn.ModuleDict({"b": Block(), "a": Block()})
    if options:
        model["b"].bias.requires_grad_(False)
    ema = fastema.EMA(model, decay=0.5, **options)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn(4))
    ema.update()
    return model, ema


SOURCES = {
    "e.safetensors": lambda ema, path: save(ema, path),
    "e.pt": lambda ema, path: torch.save(ema.state_dict(), path),
    "within.pt": lambda ema, path: torch.save({"model": {}, "ema": ema.state_dict()}, path),
    "again.safetensors": lambda ema, path: (
        save(ema, "first.safetensors"),
        convert("first.safetensors", path, to="fastema"),
    ),
}


@pytest.mark.parametrize("to", ["torch_ema", "diffusers", "litema"])
@pytest.mark.parametrize("path", SOURCES)
def test_float_buffers_are_left_out_of_lists_and_named(path: str, to: str) -> None:
    model, ema = build()
    SOURCES[path](ema, path)
    done = convert(path, "out.pt", to=to)
    said, _, dropped = done.lost[0].partition(": ")
    assert said == "tensors that are not parameters"
    assert sorted(dropped.split(", ")) == ["a.offset", "b.offset"]
    state = torch.load("out.pt", weights_only=True)
    names = [name for name, _ in model.named_parameters()]
    if to == "litema":
        assert {*state} == {"decay", "num_updates", *(one.replace(".", "") for one in names)}
        found = [state[one.replace(".", "")] for one in names]
    else:
        found = state["shadow_params"]
    assert len(found) == len(names)
    for name, one in zip(names, found, strict=True):
        assert torch.equal(one, ema.shadow[name]), name
    other = build()[1]
    load_into(other, "out.pt")
    for name in names:
        assert torch.equal(other.shadow[name], ema.shadow[name])


def test_names_come_from_a_list_a_text_file_or_another_average(inside: Path) -> None:
    model, ema = build()
    names = [name for name, _ in model.named_parameters()]
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), "swa.pt")
    (inside / "names.txt").write_text("\n".join(names) + "\n")
    save(ema, "ema.safetensors")
    for given in (names, "names.txt", "ema.safetensors"):
        convert("swa.pt", "out.pt", to="torch_ema", names=given, decay=0.9)
        found = torch.load("out.pt", weights_only=True)["shadow_params"]
        for one, wanted in zip(found, model.parameters(), strict=True):
            assert torch.equal(one, wanted)


def test_list_that_needs_a_frozen_parameter_is_refused_unless_it_is_kept() -> None:
    model, ema = build(frozen="skip")
    save(ema, "skipped.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks\n.*'b.bias' is missing\n.*frozen='copy'"):
        convert("skipped.safetensors", "out.pt", to="diffusers")
    model, ema = build(frozen="copy")
    save(ema, "copied.safetensors")
    assert load("copied.safetensors").parameters == [name for name, _ in model.named_parameters()]
    convert("copied.safetensors", "out.pt", to="diffusers")
    found = torch.load("out.pt", weights_only=True)["shadow_params"]
    for one, (name, _) in zip(found, model.named_parameters(), strict=True):
        assert torch.equal(one, ema.shadow[name])
    other = build(frozen="copy")[1]  # its frozen parameter is between trained ones of equal shape
    load_into(other, "out.pt")
    for name, _ in model.named_parameters():
        assert torch.equal(other.shadow[name], ema.shadow[name]), name
