"""Get parameter shapes from a library's model, a checkpoint, a file, or GPT-2 small."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastema.errors import ArgumentError, CheckpointError

Shapes = list[torch.Size]


def shapes_of(args: argparse.Namespace) -> tuple[str, Shapes]:
    """Return a title for the model, and the shapes of all its parameters.

    Raises
    ------
    ArgumentError, CheckpointError
        For a model that does not exist, a missing library, or a file without shapes.
    """
    if args.model:
        return args.model, _of_model(args.model)
    if args.checkpoint:
        return Path(args.checkpoint).name, _of_checkpoint(args.checkpoint)
    if args.shapes:
        return Path(args.shapes).name, _of_file(args.shapes)
    return "GPT-2 small", _gpt2()


def _gpt2(layers: int = 12, width: int = 768, words: int = 50_257, context: int = 1_024) -> Shapes:
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    found: list[tuple[int, ...]] = [(words, width), (context, width), *(block * layers)]
    return [torch.Size(shape) for shape in [*found, (width,), (width,)]]


def _timm(name: str) -> Any:
    return import_module("timm").create_model(name)


def _torchvision(name: str) -> Any:
    return import_module("torchvision.models").get_model(name)


def _transformers(name: str) -> Any:
    transformers = import_module("transformers")
    return transformers.AutoModel.from_config(getattr(transformers, name)())


_LIBRARIES: dict[str, Callable[[str], Any]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def _of_model(given: str) -> Shapes:
    library, _, name = given.partition(":")
    if library not in _LIBRARIES or not name:
        known = ", ".join(f"{one}:NAME" for one in _LIBRARIES)
        raise ArgumentError(f"--model {given}: expected one of {known}")
    if find_spec(library) is None:
        raise ArgumentError(f"--model {given}: {library} is not installed: pip install {library}")
    try:
        with torch.device("meta"):  # shapes only: allocates nothing
            model = _LIBRARIES[library](name)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArgumentError(f"--model {given}: {library} cannot build it: {reason}") from None
    return [one.shape for one in model.parameters()]


def _of_checkpoint(path: str) -> Shapes:
    from fastema.checkpoint import open_checkpoint

    found = open_checkpoint(path)
    floats = [
        one
        for name, one in found.tensors.items()
        if one.kind.real is not None and name not in found.tied
    ]
    if not floats:
        raise CheckpointError(f"{path} has no floating-point tensors")
    return [torch.Size(one.shape) for one in floats]


def _of_file(path: str) -> Shapes:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        listed = list(found.values() if isinstance(found, dict) else found)
        shapes = [torch.Size(shape) for shape in listed]
        if not shapes or any(size < 0 for shape in shapes for size in shape):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ArgumentError(
            f'{path}: expected JSON with shapes, such as {{"weight": [768, 768]}} or [[768, 768]]'
        ) from None
    return shapes
